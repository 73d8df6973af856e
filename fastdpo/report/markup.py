"""Text of any kind, numbers and tables as HTML."""

import html
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from fastdpo.data.records import Text
from fastdpo.report.evaluation import Estimate

SHOWN_CHARS, SHOWN_LINES = 700, 16  # of a text, before it has to be opened
KEPT_CHARS = 6000  # of a text in all
KEPT_MESSAGES = 12  # of a prompt
# The end of a secret's name: not of tokens in general, as in --max-tokens or --tokenizer.
_SECRET = r"(?:keys?|token|secrets?|passwords?|passwd)(?![a-z])[\w.-]{0,60}"
_QUOTED = r"\\?\"[^\"]*\"|'[^']*'"  # in JSON with a backslash
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # categories that show nothing of their own


def visible(text: str, *, marked: bool = True) -> str:
    """Any text as HTML that shows what is there, for an element or an attribute in quotes.

    Characters that show nothing, or turn the order of what follows them (controls, bidi overrides
    and other format characters, lone surrogates, private and unassigned ones), appear as their code
    points, a run of one as its code point and its length; the two joiners stay, as scripts and
    emoji need them. `marked` puts code points in an element of their own.
    """
    return "".join(_visible_run(c, len(list(run)), marked) for c, run in groupby(text))


def _visible_run(c: str, length: int, marked: bool) -> str:
    if " " <= c <= "~" or c in "\n\t\u200c\u200d" or unicodedata.category(c) not in _HIDDEN:
        return html.escape(c) * length
    code = f"U+{ord(c):04X}" + (f" × {length:,}" if length > 1 else "")
    if not marked:
        return f"[{code}]"
    return f'<span class="code" title="{unicodedata.name(c, "no name")}">{code}</span>'


def clipped(text: str) -> str:
    """A text of any length: its beginning, and more of it to be opened, with its length told."""
    if not text.strip():
        return f'<p class="none">{"empty" if not text else "white space only"}</p>'
    lines = text.split("\n")
    shown = min(SHOWN_CHARS, len("\n".join(lines[:SHOWN_LINES])))
    if shown >= len(text):
        return f'<p class="text" dir="auto">{visible(text)}</p>'
    told = f"{count(len(text) - shown)} more of {count(len(text))} characters"
    rest = visible(text[shown:KEPT_CHARS])
    if len(text) > KEPT_CHARS:
        rest += (
            f'<span class="none"> … clipped here, after {count(KEPT_CHARS)} of '
            f"{count(len(text))} characters</span>"
        )
    return (
        f'<p class="text" dir="auto">{visible(text[:shown])}…</p><details><summary>{told}</summary>'
        f'<p class="text long" dir="auto" role="group" aria-label="The rest of the text" '
        f'tabindex="0">…{rest}</p></details>'
    )


def prompt_text(prompt: Text) -> str:
    """A prompt as it was given: a string, or messages, each with its role."""
    if isinstance(prompt, str):
        return clipped(prompt)
    parts = []
    for message in prompt[:KEPT_MESSAGES]:
        fields = message if isinstance(message, dict) else {"content": message}
        role = visible(as_text(fields.get("role", "message"))[:40])
        parts.append(f'<p class="role">{role}</p>{clipped(as_text(fields.get("content")))}')
    if len(prompt) > KEPT_MESSAGES:
        more = f"{KEPT_MESSAGES} of {count(len(prompt))} messages are shown"
        parts.append(f'<p class="none">{more}</p>')
    return "".join(parts)


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
    size, places = (max(halves), 1) if halves else (max(abs(e.value) for e in estimates), 3)
    return 0 if size == 0 else min(max(places - math.floor(math.log10(size)), 0), 6)


def fixed(value: float, digits: int, *, signed: bool = False) -> str:
    text = f"{value:,.{digits}f}" if abs(value) < 1e9 else f"{value:.3e}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")
    text = text.replace("-", "−")
    return f"+{text}" if signed and not text.startswith("−") else text


def told(estimate: Estimate, digits: int, *, unit: str = "", signed: bool = False) -> str:
    text = fixed(estimate.value, digits, signed=signed) + unit
    if estimate.half is None:
        return text
    return f'{text} <span class="pm">± {fixed(estimate.half, digits)}</span>'


def count(n: float) -> str:
    return f"{n:,.0f}"


def table(caption: str, head: Iterable[str], body: Iterable[Sequence[str]]) -> str:
    """A table whose first column names the rows; cells are HTML."""
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for first, *cells in body
    )
    return (
        f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table>'
        f"<caption>{caption}</caption><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody>"
        "</table></div>"
    )
