"""Finds special tokens in text and tells those of the chat template (parsed) from those of a user (plain text).

A chat's strings may spell a special token (`<|im_end|>`), which must not end the user's turn. Before rendering, each
such spelling is put between two marker characters from a private use area; after rendering the markers are removed, and
every match that touches a marked spelling stays plain text. A string that starts or ends with *part* of a token gets
one marker there, so that two strings side by side cannot form a token either. Not covered: a template that changes
letters (`content | lower`) into a token that no string spelled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from runner.errors import TokenizerError
from runner.text.token_search import TokenSearch

_PRIVATE_FIRST, _PRIVATE_LAST = 0xF0000, 0xFFFFE  # supplementary private use area A; the last is not in it
_UNASSIGNED_FIRST, _UNASSIGNED_LAST = 0x40000, 0xE0000  # planes 4 to 13


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched as a whole before the model splits the text, with the flags that tokenizer.json gives it.

    `lstrip`/`rstrip`: white space on that side belongs to the token. `single_word`: matches only between non-word
    characters. `normalized`: matched after normalisation. `id`: None if the files leave it to the vocabulary's order.
    """

    content: str
    id: int | None = None
    special: bool = False
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class Match:
    """Place of the token `id` in a text: characters `[start, end)`, with white space that belongs to the token."""

    start: int
    end: int
    id: int


@dataclass(frozen=True)
class Marked:
    """A rendered text without its markers, and where a token of the template's may stand in it."""

    text: str
    free: tuple[tuple[int, int], ...]
    """Start and end of each part between two markers, apart from tokens that a user's string spelled. A token may lie
    in one of these parts, but not reach from one into the next.
    """


class TokenScanner:
    """Finds added tokens in text: of those that overlap the leftmost, of those that start together the longest."""

    def __init__(self, tokens: Iterable[tuple[AddedToken, int]]) -> None:
        self.tokens = tuple(tokens)
        self.ids = frozenset(token_id for _, token_id in self.tokens)
        self._tokens = {token.content: (token, token_id) for token, token_id in self.tokens if token.content}
        self._search = TokenSearch(self._tokens.keys())
        self._words = any(token.single_word for token, _ in self._tokens.values())

    def find(self, text: str, marked: Marked | None = None) -> list[Match]:
        """Find every token in `text`, in order; with `marked`, only those that no user's string had a part in."""
        found: list[Match] = []
        taken = 0
        for part in ((0, len(text)),) if marked is None else marked.free:
            for start, content in self._spellings(text, *part):
                # White space goes to the token, as far as the token before has not taken it.
                token, token_id = self._tokens[content]
                end = start + len(content)
                while token.lstrip and start > taken and text[start - 1].isspace():
                    start -= 1
                while token.rstrip and end < len(text) and text[end].isspace():
                    end += 1
                if start >= taken:
                    found.append(Match(start, end, token_id))
                    taken = end
        return found

    def _spellings(self, text: str, start: int, end: int) -> Iterator[tuple[int, str]]:
        """Place and text of each token within `text[start:end]`, without white space around it."""

        def fits(content: str, place: int) -> bool:
            if not self._tokens[content][0].single_word:
                return True
            after = place + len(content)
            return not (_is_word(text[place - 1 : place]) or _is_word(text[after : after + 1]))

        return self._search.spellings(text, start, end, fits if self._words else None)

    def touches(self, value: Any) -> bool:
        """Whether any string in `value` that `mark` looks at spells a token, or part of a token at either end."""
        return any(self._touches(text) for text in _markable(value))

    def _touches(self, text: str) -> bool:
        core = text.strip()
        return (
            self._search.starts_inside(core)
            or self._search.ends_inside(core)
            or next(self._spellings(text, 0, len(text)), None) is not None
        )

    def mark(self, value: Any, markers: tuple[str, str]) -> Any:
        """Return `value` with each token that its strings and keys spell put between the two markers.

        What templates look up and compare stays as it is: keys that are names, and names of roles and types.
        """
        if isinstance(value, str):
            return self._mark(value, *markers)
        if isinstance(value, Mapping):
            return {
                key if _is_name(key) else self.mark(key, markers): (
                    item if _is_compared(key, item) else self.mark(item, markers)
                )
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.mark(item, markers) for item in value]
        return value

    def _mark(self, text: str, opening: str, closing: str) -> str:
        pieces: list[str] = []
        position = 0
        for start, content in self._spellings(text, 0, len(text)):
            pieces += [text[position:start], opening, content, closing]
            position = start + len(content)
        pieces.append(text[position:])
        # Parts of tokens at either end get a marker inside the white space, which a template may trim away.
        core = text.strip()
        if self._search.starts_inside(core):
            lead = len(text) - len(text.lstrip())
            pieces[0] = pieces[0][:lead] + closing + pieces[0][lead:]
        if self._search.ends_inside(core):
            tail = pieces[-1].rstrip()
            pieces[-1] = tail + closing + pieces[-1][len(tail) :]
        return "".join(pieces)

    def unmark(self, text: str, markers: tuple[str, str]) -> Marked:
        """Remove the markers from the rendered `text` and return it with the places where they stood."""
        opening, closing = markers
        # Text and markers take turns, text first and last.
        pieces = re.split(f"([{opening}{closing}])", text)
        free: list[tuple[int, int]] = []
        length = 0
        for index in range(0, len(pieces), 2):
            piece = pieces[index]
            around = (pieces[index - 1] if index else None, pieces[index + 1] if index + 1 < len(pieces) else None)
            # A pair counts only around a whole token: a template may have split the text between the two.
            if piece and not (around == (opening, closing) and piece in self._tokens):
                free.append((length, length + len(piece)))
            length += len(piece)
        return Marked("".join(pieces[::2]), tuple(free))


def choose_markers(*values: Any) -> tuple[str, str]:
    """Choose two characters without a meaning that occur nowhere in `values` (strings and JSON-like data).

    Raises:
        TokenizerError: `values` hold all of them.
    """
    used = set().union(*(text for value in values for text in _strings(value)))
    # After the private use area, characters that Unicode has not assigned.
    codes = chain(range(_PRIVATE_FIRST, _PRIVATE_LAST), range(_UNASSIGNED_FIRST, _UNASSIGNED_LAST))
    free = (chr(code) for code in codes if chr(code) not in used)
    markers = list(islice(free, 2))
    if len(markers) < 2:
        raise TokenizerError(
            "the chat holds every private and unassigned character of Unicode, so that none is left to mark text with: "
            "shorten it"
        )
    return markers[0], markers[1]


def _strings(value: Any) -> Iterable[str]:
    """Every string in JSON-like data, keys of mappings included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _markable(value: Any) -> Iterable[str]:
    """The strings in JSON-like data that `TokenScanner.mark` looks at."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not _is_name(key):
                yield from _markable(key)
            if not _is_compared(key, item):
                yield from _markable(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _markable(item)
    elif isinstance(value, str):
        yield value


def _is_compared(key: Any, item: Any) -> bool:
    """Whether templates compare the item with words of their own, as a message's role."""
    return key in ("role", "type") and _is_name(item)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier()


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"
