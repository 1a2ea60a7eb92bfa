"""Guesses of a draft model, counted for whoever watches the server."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from runner.engine.draft import DraftModel
from runner.engine.speculation import Proposer

if TYPE_CHECKING:
    import mlx.core as mx

    from runner.engine.budget import Footprint
    from runner.engine.loaded import Loaded
    from runner.engine.sampler import SamplingState


class Guesses:
    """How many guesses a draft model has made for one model, and how many were right.

    Attributes:
        rounds: how often it has guessed.
        tokens: tokens that it has guessed.
        right: those of them that became part of an answer.
    """

    def __init__(self, draft: Loaded, vocab_size: int) -> None:
        """Count for a model whose logits are `vocab_size` wide."""
        self.rounds = self.tokens = self.right = 0
        self._draft = draft
        self._vocab_size = vocab_size

    @property
    def footprint(self) -> Footprint:
        """Bytes that the draft model's caches take for an answer."""
        return self._draft.footprint

    def proposer(self) -> Proposer:
        """What guesses for one answer; a job of the owner's thread."""
        return CountedProposer(DraftModel(self._draft, self._vocab_size), self)


class CountedProposer:
    """A proposer whose guesses are held against what came. All methods are jobs of the owner's thread."""

    def __init__(self, inner: Proposer, counts: Guesses) -> None:
        self._inner = inner
        self._counts = counts
        self._guessed: list[int] = []

    @property
    def free(self) -> bool:
        """Whether guesses cost next to nothing."""
        return self._inner.free

    @property
    def watches(self) -> bool:
        """Whether it is to be shown hidden states."""
        return self._inner.watches

    @property
    def nbytes(self) -> int:
        """Bytes of its caches."""
        return self._inner.nbytes

    def rest(self) -> None:
        """Let go of the caches."""
        self._inner.rest()

    def add(self, ids: Sequence[int]) -> None:
        """Append tokens that are certain."""
        pairs = zip(self._guessed, ids, strict=False)
        self._counts.right += sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._guessed = []
        self._inner.add(ids)

    def saw(self, hidden: mx.array, position: int) -> None:
        """Show it hidden states."""
        self._inner.saw(hidden, position)

    def propose(self, most: int, state: SamplingState) -> list[int] | None:
        """Guess up to `most` tokens; None: it is not ready yet."""
        found = self._inner.propose(most, state)
        self._guessed = found or []
        if self._guessed:
            self._counts.rounds += 1
            self._counts.tokens += len(self._guessed)
        return found
