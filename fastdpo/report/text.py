"""Text of any kind, and numbers, as the page shows them; the templates mark them up."""

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from fastdpo.data.records import Text
from fastdpo.report.evaluation import Estimate

SHOWN_CHARS, SHOWN_LINES = 700, 16  # of a text, before it has to be opened
KEPT_CHARS = 6000  # of a text in all
KEPT_MESSAGES = 12  # of a prompt
# The end of a secret's name: not of tokens in general, as in --max-tokens or --tokenizer.
_SECRET = r"(?:keys?|token|secrets?|passwords?|passwd)(?![a-z])[\w.-]{0,60}"
_QUOTED = r"\\?\"[^\"]*\"|'[^']*'"  # in JSON with a backslash
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # categories that show nothing of their own
_CODE = Markup('<span class="code" title="{}">{}</span>')


class Told(NamedTuple):
    """A number as shown, half its interval, and its change to the start, where it has them."""

    value: str
    half: str = ""
    moved: "Told | None" = None


class Clipped(NamedTuple):
    """The beginning of a text, what is to be opened, and how long they and the whole text are."""

    shown: str
    rest: str
    more: int
    total: int


def visible(value: Any) -> Any:
    """Any text as HTML that shows what is there; what is markup already stays as it is.

    Characters that show nothing, or turn the order of what follows them (controls, bidi overrides
    and other format characters, lone surrogates, private and unassigned ones), appear as their code
    points, a run of one as its code point and its length, in an element of their own; the two
    joiners stay, as scripts and emoji need them.
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    parts = (_CODE.format(name, text) if name else escape(text) for text, name in _runs(value))
    return Markup("").join(parts)


def plain(text: str) -> str:
    """As `visible`, but without elements: the title of a page can hold none."""
    return "".join(f"[{shown}]" if name else shown for shown, name in _runs(text))


def _runs(text: str) -> list[tuple[str, str]]:
    """Runs of a character: what to show of it, and its name where that is its code point."""
    found = []
    for c, run in groupby(text):
        length = len(list(run))
        if " " <= c <= "~" or c in "\n\t\u200c\u200d" or unicodedata.category(c) not in _HIDDEN:
            found.append((c * length, ""))
        else:
            times = f" × {length:,}" if length > 1 else ""
            found.append((f"U+{ord(c):04X}{times}", unicodedata.name(c, "no name")))
    return found


def clipped(text: str) -> Clipped:
    """A text of any length, of which the page shows the beginning first, and not more than
    `KEPT_CHARS`.
    """
    lines = text.split("\n")
    shown = min(SHOWN_CHARS, len("\n".join(lines[:SHOWN_LINES]))) if text.strip() else 0
    return Clipped(text[:shown], text[shown:KEPT_CHARS], len(text) - shown, len(text))


def prompt_parts(prompt: Text) -> list[tuple[str | None, Clipped]]:
    """Role and text of a prompt's messages, as they were given; a string has no role."""
    if isinstance(prompt, str):
        return [(None, clipped(prompt))]
    parts = []
    for message in prompt[:KEPT_MESSAGES]:
        fields = message if isinstance(message, dict) else {"content": message}
        role = as_text(fields.get("role", "message"))[:40]
        parts.append((role, clipped(as_text(fields.get("content")))))
    return parts


def as_text(value: Any) -> str:
    """A JSON value: a string as it is, all else as JSON."""
    try:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "nested too deeply to show"


def masked(text: str) -> str:
    """The text, without the secrets that a URL or a command in it may hold.

    User and password of a URL, up to the last @ before its path, and the values of what is named a
    key, token, secret or password: NAME=VALUE, in a query or before a command too, and --NAME VALUE
    with all values up to the next option.
    """
    text = re.sub(r"://[^/\s]*@", "://•••@", text)
    text = re.sub(rf"({_SECRET}=)(?:{_QUOTED}|[^\s&#;\"']+)", r"\1•••", text, flags=re.IGNORECASE)
    value = rf"(?:{_QUOTED}|[^\s\"'-][^\s\"']*)"
    option = rf"(--?[\w.-]{{0,60}}{_SECRET}(?:\s+|[\"'],\s*[\"'])){value}(?:\s+{value})*"
    text = re.sub(option, r"\1•••", text, flags=re.IGNORECASE)
    return re.sub(r"(\bbearer\s+)[^\s\"']+", r"\1•••", text, flags=re.IGNORECASE)


def digits_of(estimates: Sequence[Estimate]) -> int:
    """Decimals for two digits of the widest interval, without intervals four of the value."""
    halves = [e.half for e in estimates if e.half]
    size = max(halves or [abs(e.value) for e in estimates], default=0.0)
    places = 1 if halves else 3
    return 0 if size == 0 else min(max(places - math.floor(math.log10(size)), 0), 6)


def fixed(value: float, digits: int, *, signed: bool = False) -> str:
    """With so many decimals, and a real minus sign; `signed` adds a plus."""
    sign = "+" if signed else ""
    if abs(value) >= 1e9:
        return f"{value:{sign}.3e}".replace("-", "−")
    return f"{round(value, digits) + 0.0:{sign},.{digits}f}".replace("-", "−")


def short(value: float) -> str:
    """Three significant digits, with a real minus sign."""
    return f"{value + 0.0:.3g}".replace("-", "−")


def told(estimate: Estimate, digits: int, *, unit: str = "", signed: bool = False) -> Told:
    """The value with its unit, and half its interval, with so many decimals."""
    half = "" if estimate.half is None else fixed(estimate.half, digits)
    return Told(fixed(estimate.value, digits, signed=signed) + unit, half)


def count(n: float) -> str:
    return f"{n:,.0f}"
