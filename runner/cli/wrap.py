"""Word wrap of text that comes in pieces: lines are broken between words, at the width that the terminal has now."""

from __future__ import annotations

from collections.abc import Callable

NARROWEST = 20
"""Columns below which nothing is wrapped: a terminal that does not know its width says 0."""
FENCE = "```"
CLOSING = frozenset("、。，．・：；？！）」』】》〉〕”’…ー々ぁぃぅぇぉっゃゅょァィゥェォッャュョ％,.:;?!)]}'\"%")
"""Characters that no line begins with beside a wide one (those of JIS X 4051 that are common)."""
JOINER = "\u200d"
"""Joins emoji to one."""


def width(text: str) -> int:
    """Return the number of columns that `text` takes, without tabs: 2 for East Asian wide characters and emoji.

    Combining and format characters take none (Unicode's categories Mn, Me and Cf; widths by UAX 11).
    """
    if text.isascii():
        return len(text)
    return sum(_width(character) for character in text)


def _width(character: str) -> int:
    import unicodedata  # a megabyte, which most answers do not need

    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


class WordWrap:
    """Breaks lines; colours must be added behind it, since every character counts here.

    A word is held back until it has ended, as only then is known whether it fits. Blocks of code between lines of
    three backquotes pass as they are, so that they can be copied.
    """

    def __init__(self, columns: Callable[[], int]) -> None:
        self._columns = columns
        self._column = 0
        self._gap = ""
        self._word = ""
        self._overlong = False  # a word that fits no line is under way: it is no longer held back
        self._line_start = ""
        self._code = False

    @property
    def holds(self) -> bool:
        """Whether there is text that has not come out yet."""
        return bool(self._word or self._gap)

    def feed(self, text: str) -> str:
        """Take a piece of text, and return what can be shown."""
        return "".join(map(self._character, text))

    def flush(self) -> str:
        """Return the text that was held back, as at the end of an answer."""
        placed = self._placed()
        columns = self._columns()
        spaces = self._spaces() if columns < NARROWEST or self._column + self._gap_width() <= columns else ""
        self._gap = ""
        return placed + spaces

    def _character(self, character: str) -> str:
        if character == "\n":
            return self._line_end()
        if len(self._line_start) < len(FENCE):
            self._line_start = (self._line_start + character).lstrip(" ")
        if self._code:
            return character
        if character in " \t":
            placed = self._placed()
            self._gap += character
            return placed
        placed = self._placed() if self._word and self._may_break(self._word[-1], character) else ""
        self._word += character
        return placed + (self._placed() if self._overlong or width(self._word) > self._columns() else "")

    @staticmethod
    def _may_break(before: str, after: str) -> bool:
        """Whether a line may end between two characters that no space parts: beside a wide one it may."""
        wide = (not before.isascii() and _width(before) == 2) or (not after.isascii() and _width(after) == 2)
        return wide and before != JOINER and after not in CLOSING and width(after) > 0

    def _line_end(self) -> str:
        text = self.flush() + "\n"
        if self._line_start == FENCE:
            self._code = not self._code
        self._column, self._line_start, self._overlong = 0, "", False
        return text

    def _placed(self) -> str:
        """The word behind its gap, or on the next line."""
        columns, word = self._columns(), self._word
        if not word:
            self._overlong = False
            return ""
        self._word = ""
        needed = width(word)
        fits = self._column + self._gap_width() + needed <= columns
        if fits or columns < NARROWEST or self._column == 0 or self._overlong:
            before = self._spaces()
        else:
            before, self._gap, self._column = "\n", "", 0
        self._overlong = self._overlong or needed > columns >= NARROWEST
        self._column += needed
        if columns >= NARROWEST and self._column > columns:
            self._column %= columns  # the terminal breaks it
        return before + word

    def _spaces(self) -> str:
        """The gap, which now stands."""
        gap = self._gap
        self._column += self._gap_width()
        self._gap = ""
        return gap

    def _gap_width(self) -> int:
        """Columns of the gap; a tab goes up to the next multiple of 8."""
        column = self._column
        for character in self._gap:
            column += 1 if character == " " else 8 - column % 8
        return column - self._column
