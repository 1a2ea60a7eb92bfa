"""Finds which of many tokens start at places of a text, in time that the text cannot make grow beyond its length.

A place costs a number of look-ups that grows with the logarithm of the number of different token lengths, whatever the
text: it is a binary search over these lengths (Waldvogel et al. 1997, longest prefix match in routers).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator


class TokenSearch:
    """Searches for `tokens`, non-empty strings: of those that overlap the leftmost, of those that start together the
    longest.
    """

    def __init__(self, tokens: Collection[str]) -> None:
        self.longest = max(map(len, tokens), default=0)
        self._lengths = sorted({len(token) for token in tokens})
        self._firsts = frozenset(token[0] for token in tokens)
        self._lasts = frozenset(token[-1] for token in tokens)
        self._sorted = sorted(tokens)
        self._sorted_reversed = sorted(token[::-1] for token in tokens)
        self._candidates = _candidates(tokens)
        # Longest token that each key starts with, and the longest token that each token starts with besides itself.
        self._best: dict[str, str | None] = {}
        self._shorter: dict[str, str | None] = {}
        self._index(frozenset(tokens))

    def _index(self, tokens: frozenset[str]) -> None:
        """Fill the tables: each token leaves its beginnings at those lengths that a binary search for it passes."""
        keys: set[str] = set()
        for token in tokens:
            low, high = 0, len(self._lengths) - 1
            while low <= high:
                middle = (low + high) // 2
                if self._lengths[middle] > len(token):
                    high = middle - 1
                else:
                    keys.add(token[: self._lengths[middle]])
                    low = middle + 1
        # In sorted order a string comes after its beginnings: `open_tokens` holds those of the key at hand.
        open_tokens: list[str] = []
        for key in sorted(keys | tokens):
            while open_tokens and not key.startswith(open_tokens[-1]):
                open_tokens.pop()
            if key in tokens:
                self._shorter[key] = open_tokens[-1] if open_tokens else None
                open_tokens.append(key)
            self._best[key] = open_tokens[-1] if open_tokens else None

    def spellings(
        self, text: str, start: int, end: int, accept: Callable[[str, int], bool] | None = None
    ) -> Iterator[tuple[int, str]]:
        """Yield place and text of each token within `text[start:end]`.

        `accept(token, place)` may reject a token, in which case a shorter one that starts there is taken.
        """
        if self._candidates is None:
            return
        position = start
        while candidate := self._candidates.search(text, position, end):
            place = candidate.start()
            token = self._longest_at(text, place, end)
            while token is not None and accept is not None and not accept(token, place):
                token = self._shorter[token]
            if token is not None:
                yield place, token
            position = place + (1 if token is None else len(token))

    def _longest_at(self, text: str, place: int, end: int) -> str | None:
        """The longest token at `place` that ends at `end` at the latest."""
        lengths, known = self._lengths, self._best
        best: str | None = None
        low, high = 0, len(lengths) - 1
        while low <= high:
            middle = (low + high) // 2
            stop = place + lengths[middle]
            if stop <= end and (key := text[place:stop]) in known:
                best = known[key]
                low = middle + 1
            else:
                high = middle - 1
        return best

    def starts_inside(self, text: str) -> bool:
        """Whether `text` starts with the end of a token (not the whole of it)."""
        limit = min(self.longest - 1, len(text))
        return any(text[n] in self._lasts and _begins(self._sorted_reversed, text[n::-1]) for n in range(limit))

    def ends_inside(self, text: str) -> bool:
        """Whether `text` ends with the beginning of a token (not the whole of it)."""
        limit = min(self.longest - 1, len(text))
        return any(text[-n] in self._firsts and _begins(self._sorted, text[-n:]) for n in range(1, limit + 1))


def _begins(ordered: list[str], text: str) -> bool:
    """Whether one of the sorted strings starts with `text` and goes on after it."""
    place = bisect_right(ordered, text)
    return place < len(ordered) and ordered[place].startswith(text)


def _candidates(tokens: Collection[str]) -> re.Pattern[str] | None:
    """Expression for the places where a token may start: one of the first characters before one of the second ones."""
    singles = "".join(map(re.escape, sorted({token for token in tokens if len(token) == 1})))
    longer = [token for token in tokens if len(token) > 1]
    firsts = "".join(map(re.escape, sorted({token[0] for token in longer})))
    seconds = "".join(map(re.escape, sorted({token[1] for token in longer})))
    parts = [f"[{singles}]"] if singles else []
    parts += [f"[{firsts}](?=[{seconds}])"] if longer else []
    return re.compile("|".join(parts)) if parts else None
