"""Text in the cells of a terminal: wrapped to a width, and two texts side by side.

A cell holds a letter; letters of East Asian scripts and most emoji take two, marks that combine
with the one before take none (`unicodedata`). Terminals differ on emoji that are joined of several.
"""

import re
import unicodedata
from collections.abc import Sequence
from itertools import zip_longest

NARROWEST = 30  # cells of a column that is still read well
_GAP = " | "
_BIDI = re.compile(r"[\u202a-\u202e\u2066-\u2069]")  # they would turn the other column round


def clean(text: str) -> str:
    """The text without what moves the cursor, colors or rings: a model may write anything."""
    text = _BIDI.sub("", text)
    return "".join(x for x in text if x in "\n\t" or unicodedata.category(x) != "Cc").expandtabs(4)


def cells(text: str) -> int:
    """How many cells a text of one line takes."""
    return sum(map(_cells, text))


def _cells(letter: str) -> int:
    if unicodedata.category(letter) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in ("W", "F") else 1


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells (2 or more): broken at spaces, where there are none within a
    word. Line breaks and indentation stay."""
    return [line for given in clean(text).split("\n") for line in _wrapped(given, width)]


def _wrapped(text: str, width: int) -> list[str]:
    lines, line, used = [], "", 0
    for piece in re.findall(r" +|[^ ]+", text):
        size = cells(piece)
        if used + size > width and (piece[0] == " " or (size <= width and line.strip())):
            lines.append(line.rstrip())
            line, used = "", 0
            if piece[0] == " ":
                continue
        for letter in piece:
            more = _cells(letter)
            if used + more > width:
                lines.append(line)
                line, used = "", 0
            line, used = line + letter, used + more
    return [*lines, line.rstrip()]


class Flow:
    """Text that comes in pieces, to be printed as it comes and broken at spaces.

    Args:
        width: cells of a line; None breaks none.
    """

    def __init__(self, width: int | None) -> None:
        self.width, self.used, self.held = width, 0, ""

    def add(self, text: str, *, last: bool = False) -> str:
        """What to print after a further piece; a word that may go on is held back till the last."""
        if self.width is None:
            return clean(text)
        pieces, found = re.findall(r"\n| +|[^ \n]+", self.held + clean(text)), ""
        begun = not last and bool(pieces) and pieces[-1][-1] not in " \n"
        # Scripts of wide letters have no spaces between words.
        self.held = pieces.pop() if begun and _cells(pieces[-1][-1]) < 2 else ""
        for piece in pieces:
            size = cells(piece)
            if piece == "\n":
                found, self.used = found + piece, 0
                continue
            if self.used and self.used + size > self.width:
                found, self.used = found + "\n", 0
                if piece[0] == " ":
                    continue
            found += piece
            self.used = (self.used + size) % self.width if size > self.width else self.used + size
        return found


def column_width(width: int) -> int | None:
    """Cells of one of two columns on a terminal; None where it is too narrow for them."""
    each = (width - len(_GAP)) // 2
    return each if each >= NARROWEST else None


def side_by_side(left: Sequence[str], right: Sequence[str], width: int) -> str:
    """Lines of two columns, each of at most `width` cells."""
    rows = zip_longest(left, right, fillvalue="")
    return "\n".join(f"{a}{' ' * (width - cells(a))}{_GAP}{b}".rstrip() for a, b in rows)


def end_of(text: str, width: int) -> str:
    """The end of a text that fits `width` cells of one line."""
    text, used = " ".join(clean(text).split()), 0
    for at in range(len(text), 0, -1):
        used += _cells(text[at - 1])
        if used > width:
            return text[at:]
    return text
