"""Finds special tokens in text and tells those of the chat template (parsed) from those of a user (plain text).

A chat's strings may spell a special token (`<|im_end|>`), which must not end the user's turn. Before rendering, each
such spelling is put between two marker characters from a private use area; after rendering the markers are removed, and
every match that touches a marked spelling stays plain text. A string that starts or ends with *part* of a token gets
one marker there, so that two strings side by side cannot form a token either. Not covered: a template that changes
letters (`content | lower`) into a token that no string spelled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

_PRIVATE_FIRST, _PRIVATE_LAST = 0xF0000, 0xFFFFD  # supplementary private use area A


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
    """A rendered text without its markers, and where they stood."""

    text: str
    covered: frozenset[int]
    """Indices of the characters that spell a token in a user's string."""
    breaks: frozenset[int]
    """Indices of the characters that had a marker right before them, across which no token may reach."""


class TokenScanner:
    """Finds added tokens in text: of those that overlap the leftmost, of those that start together the longest."""

    def __init__(self, tokens: Iterable[tuple[AddedToken, int]]) -> None:
        self._tokens = {token.content: (token, token_id) for token, token_id in tokens if token.content}
        self._lengths = sorted({len(content) for content in self._tokens}, reverse=True)
        starts = "".join(re.escape(first) for first in sorted({content[0] for content in self._tokens}))
        self._starts = re.compile(f"[{starts}]") if starts else None

    def find(self, text: str, marked: Marked | None = None) -> list[Match]:
        """Find every token in `text`, in order; with `marked`, only those that no user's string had a part in."""
        found: list[Match] = []
        taken = 0
        for start, end in self._spellings(text, marked):
            # White space goes to the token, as far as the token before has not taken it.
            token, token_id = self._tokens[text[start:end]]
            while token.lstrip and start > taken and text[start - 1].isspace():
                start -= 1
            while token.rstrip and end < len(text) and text[end].isspace():
                end += 1
            found.append(Match(start, end, token_id))
            taken = end
        return found

    def _spellings(self, text: str, marked: Marked | None) -> Iterable[tuple[int, int]]:
        """Start and end of each token in `text`, without white space around it."""
        if self._starts is None:
            return
        position = 0
        # Only places where some token's first character stands are tried, longest token first.
        while candidate := self._starts.search(text, position):
            start = candidate.start()
            end = next((start + n for n in self._lengths if self._accepts(text, start, start + n, marked)), None)
            if end is not None:
                yield start, end
            position = start + 1 if end is None else end

    def _accepts(self, text: str, start: int, end: int, marked: Marked | None) -> bool:
        """Whether `text[start:end]` is a token that may be matched at this place."""
        entry = self._tokens.get(text[start:end]) if end <= len(text) else None
        if entry is None:
            return False
        if entry[0].single_word and (_is_word(text[start - 1 : start]) or _is_word(text[end : end + 1])):
            return False
        # A break at `start` itself is harmless: the token lies on one side of it.
        if marked is None:
            return True
        return not (
            any(place in marked.covered for place in range(start, end))
            or any(place in marked.breaks for place in range(start + 1, end))
        )

    @cached_property
    def _heads(self) -> frozenset[str]:
        """Proper prefixes of all tokens."""
        return frozenset(content[:n] for content in self._tokens for n in range(1, len(content)))

    @cached_property
    def _tails(self) -> frozenset[str]:
        """Proper suffixes of all tokens."""
        return frozenset(content[n:] for content in self._tokens for n in range(1, len(content)))

    def touches(self, value: Any) -> bool:
        """Whether any string in `value` (JSON-like, keys included) spells a token, or part of a token at either end."""
        return any(self._mark(text, "[", "]") != text for text in _strings(value))

    def mark(self, value: Any, markers: tuple[str, str]) -> Any:
        """Return `value` with each token that its strings and keys spell put between the two markers."""
        if isinstance(value, str):
            return self._mark(value, *markers)
        if isinstance(value, Mapping):
            return {self.mark(key, markers): self.mark(item, markers) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(item, markers) for item in value]
        return value

    def _mark(self, text: str, opening: str, closing: str) -> str:
        if not self._tokens:
            return text
        pieces: list[str] = []
        position = 0
        for start, end in self._spellings(text, None):
            pieces += [text[position:start], opening, text[start:end], closing]
            position = end
        pieces.append(text[position:])
        # Parts of tokens at either end get a marker inside the white space, which a template may trim away.
        core = text.strip()
        longest = min(self._lengths[0] - 1, len(core))
        if any(core[:n] in self._tails for n in range(1, longest + 1)):
            lead = len(text) - len(text.lstrip())
            pieces[0] = pieces[0][:lead] + closing + pieces[0][lead:]
        if any(core[len(core) - n :] in self._heads for n in range(1, longest + 1)):
            tail = pieces[-1].rstrip()
            pieces[-1] = tail + closing + pieces[-1][len(tail) :]
        return "".join(pieces)

    def unmark(self, text: str, markers: tuple[str, str]) -> Marked:
        """Remove the markers from the rendered `text` and return it with the places where they stood."""
        opening, closing = markers
        pieces: list[str] = []
        covered: set[int] = set()
        breaks: set[int] = set()
        length, before = 0, ""
        for piece in re.split(f"([{opening}{closing}])", text):
            if piece in (opening, closing):
                # A pair counts only around a whole token: a template may have split the text between the two.
                if before == opening and piece == closing and pieces[-1] in self._tokens:
                    covered.update(range(length - len(pieces[-1]), length))
                before = piece
                breaks.add(length)
            else:
                pieces.append(piece)
                length += len(piece)
        return Marked("".join(pieces), frozenset(covered), frozenset(breaks))


def choose_markers(*values: Any) -> tuple[str, str]:
    """Choose two private-use characters that occur nowhere in `values` (strings and JSON-like data)."""
    used = {
        character for value in values for text in _strings(value) for character in text if character >= "\U000f0000"
    }
    free = (chr(code) for code in range(_PRIVATE_FIRST, _PRIVATE_LAST) if chr(code) not in used)
    return next(free), next(free)


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


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"
