"""Guesses how a text goes on by how it went on before: prompt lookup, for answers that repeat parts of their prompt."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from runner.engine.sampler import SamplingState

LENGTHS = (4, 3, 2)
"""Lengths of the ends that are looked for earlier in the text, the longest first."""


class PromptLookup:
    """An index of one sequence's n-grams, kept up token by token."""

    free = True
    watches = False
    nbytes = 0

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # where an n-gram last ended, but for the end of the text

    def add(self, ids: Sequence[int]) -> None:
        """Append tokens that are certain."""
        for token in ids:
            # What ends here is known from the next token on: the end of the text itself is no place to go on from.
            self._index()
            self._ids.append(token)

    def rest(self) -> None:
        """There are no caches to let go of."""

    def saw(self, hidden: mx.array, position: int) -> None:
        """Hidden states tell nothing here."""

    def propose(self, most: int, state: SamplingState) -> list[int]:
        """Up to `most` tokens that followed the longest n-gram with which the text ends, where it last occurred."""
        for length in LENGTHS:
            place = self._after.get(tuple(self._ids[-length:]))
            if place is not None and len(self._ids) >= length:
                # Where the earlier occurrence runs into the end, the text repeats itself, and goes on doing so.
                period = len(self._ids) - place
                return [self._ids[place + index % period] for index in range(most)]
        return []

    def _index(self) -> None:
        for length in LENGTHS:
            if len(self._ids) >= length:
                self._after[tuple(self._ids[-length:])] = len(self._ids)
