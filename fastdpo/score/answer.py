"""The scorer "answer": whether a response gives the known answer; numbers and LaTeX are read."""

import re
from collections.abc import Sequence
from fractions import Fraction

from fastdpo.data.records import Candidate
from fastdpo.errors import DataError

_NUMBER = re.compile(
    r"""(?<![\w.]) -?
    (?: \d+ [ ]+ \d+/\d+ (?![\d/]) |  # 2 1/2
    (?: \d{1,3} (?:,\d{3})+ (?!\d|,\d) | \d+ | (?=\.\d) ) (?:\.\d+)?  # 1,234.5 or .5
    (?: [eE][-+]?\d{1,3}(?!\d) )?
    (?: /\d+ )? )""",
    re.VERBOSE,
)
_ARGUMENT = r"\s*(?:\{([^{}]+)\}|(\d))"  # \frac12 is \frac{1}{2}
_FRACTION = re.compile(rf"\\[dtc]?frac{_ARGUMENT}{_ARGUMENT}")
_LATEX = re.compile(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}|\\[!,;: ]|[$%]|\\(?=[$%])")
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,!:; ]|\{,\}|,\\!|[~\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_SPACE = re.compile(r"\\[,;: ]|~")
# 5\text{ cm}^2 and 5\,\mathrm{m}/\mathrm{s}
_WORDS = r"[\s/]*\\(?:text|mathrm|mathbf|operatorname)\{[^{}\d]*\}(?:\^(?:\d|\{-?\d+\}))?"
_UNIT = re.compile(rf"(?<=[\d}}])(?:{_WORDS})+|(?<=[\d}}])\s*\^(?:\\circ|\{{\\circ\}})")


def right_answer(rows: Sequence[Candidate]) -> list[float]:
    """1 where a response gives the answer in its prompt's column `answer`, else 0.

    `answer` is a number, a text, or a list of any that are right; of a text with `####`, as in
    GSM8K, what follows counts. A response gives what is in its last `\\boxed{...}`; without one,
    what follows its last `####`; without either its last number if the answer is a number, and its
    last line that isn't blank, or that line's end after ":" or "is", if the answer is a text.

    Numbers are compared exactly as rationals, so 0.5, 1/2, .50 and \\frac12 are the same, and so
    are 5/2, 2 1/2 and 2\\frac{1}{2}; signs of currency and percent, units in \\text{...} and commas
    between thousands don't count. Texts are compared without case, outer punctuation and markup.

    Raises DataError when a row has no such column. Within a prompt all scores are often the same;
    those prompts give no pair.
    """
    scores = []
    for row in rows:
        answers = row.extra.get("answer")
        answers = answers if isinstance(answers, list) else [answers]
        if not answers or any(x is None for x in answers):
            raise DataError(
                f"prompt {row.prompt_index} has no answer to compare with. Give the prompts a "
                "column 'answer', or use another scorer."
            )
        scores.append(float(any(_gives(row.response, str(x)) for x in answers)))
    return scores


def _gives(response: str, answer: str) -> bool:
    answer = _marked(answer) or answer
    said, number = _marked(response), _number(answer)
    if number is not None:
        if said is not None and _number(said) is not None:
            return _number(said) == number
        found = _NUMBER.findall(_spaced(response if said is None else said))
        return bool(found) and _value(found[-1]) == number
    if said is not None:
        return _same_text(said, answer)
    line = next((x for x in reversed(response.splitlines()) if x.strip()), "")
    ends = [line, line.rpartition(":")[2], line.rpartition(" is ")[2]]
    return any(_same_text(end, answer) for end in ends)


def _marked(text: str) -> str | None:
    """What is in the last `\\boxed{...}`, else what follows the last `####` on its line."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        start += len("\\boxed{")
        depth = 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start:end]
    _, mark, after = text.rpartition("####")
    return next(iter(after.strip().splitlines()), "") if mark else None


def _plain(text: str) -> str:
    return _LATEX.sub(r"\1", _FRACTION.sub(_slashed, text.replace("\u2212", "-")))


def _slashed(fraction: re.Match[str]) -> str:
    above, below = (fraction[1] or fraction[2]), (fraction[3] or fraction[4])
    return f"{above.strip()}/{below.strip()}"


def _spaced(text: str) -> str:
    """`_plain` of a text with numbers: what stands between two keeps them apart."""
    text = _UNIT.sub(" ", _SPACE.sub(" ", _THOUSANDS.sub("", text)))
    return _plain(re.sub(r"(?<=\d)\s*(?=\\[dtc]?frac)", " ", text))


def _number(text: str) -> Fraction | None:
    """The value of a text that is one number and nothing else."""
    text = _spaced(text).strip().strip("*").rstrip(".").strip()
    text = re.sub(r"^-\s+|(?<=\d)\s*/\s*(?=\d)", lambda mark: mark[0].strip(), text)
    return _value(text) if _NUMBER.fullmatch(text) else None


def _value(number: str) -> Fraction | None:
    """The value of what `_NUMBER` found; None of more digits than are read, and over 0."""
    sign = -1 if number.startswith("-") else 1
    whole, _, fraction = number.lstrip("-").replace(",", "").rpartition(" ")
    above, _, below = fraction.partition("/")
    try:
        part = Fraction(above) / Fraction(below or 1)
        if whole and part >= 1:  # two numbers, not a mixed one
            return None
        return sign * (Fraction(whole or 0) + part)
    except (ValueError, ZeroDivisionError):
        return None


def _same_text(a: str, b: str) -> bool:
    folded = [" ".join(_plain(x).casefold().split()).strip(" *_`\"'.,!?()") for x in (a, b)]
    return folded[0] == folded[1] != ""
