"""One answer's way through passes of several tokens: guesses are read along, and kept where the draw says the same.

The draw at each position is a function of seed and position alone (`runner.engine.chance`), so a guess changes no
token: it is right, or the pass has already computed what is right in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

from runner.engine.sampler import SamplingState, Token
from runner.errors import NumericsError, RunnerError
from runner.nn.batch import Apart

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Bits = npt.NDArray[np.uint32]

MOST = 16
"""The most guesses in one pass."""

START = 8
"""Guesses in the first pass: a multiplication by many rows costs little more than one by a few."""

PAYS = 0.3
"""Share of the guesses that must be right: below it, passes of several tokens cost more than they save."""

MEMORY = 32
"""Guesses after which older ones count a third; each time counts as an eighth of them at least."""

PAUSE = 64
"""Tokens for which guesses that cost passes over another model are given up; twice as many each time."""


class Guide(Protocol):
    """Says which tokens may come next in one answer: `runner.guidance.Guide`."""

    def allowed(self) -> Bits | None: ...
    def add(self, token: int) -> None: ...
    def allowed_after(self, drafts: Sequence[int]) -> list[Bits | None]: ...
    def forced(self, most: int) -> list[int]: ...


class Proposer(Protocol):
    """Guesses how one sequence goes on.

    `add` tells it tokens that are certain; `propose` guesses up to `most` that follow them, to be drawn as `state`
    would, or is not ready yet: None; `free` says whether guesses cost next to nothing. One that `watches` is shown by
    `saw` the model's hidden states `[1, L, H]` at certain tokens from a position on, as far as passes have them to
    show. `nbytes` are those of its caches, which `rest` lets go of: it goes on by computing them anew, or by guessing
    worse.
    """

    @property
    def free(self) -> bool: ...
    @property
    def watches(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...
    def rest(self) -> None: ...
    def add(self, ids: Sequence[int]) -> None: ...
    def saw(self, hidden: mx.array, position: int) -> None: ...
    def propose(self, most: int, state: SamplingState) -> list[int] | None: ...


class Depth:
    """How many tokens to guess, by how many of the last guesses were right; none where that does not pay."""

    def __init__(self, free: bool) -> None:
        """Begin; guesses that are free must be seen to be right before passes are made of them."""
        self._free = free
        self._depth = START
        self._rate = 0.0 if free else 1.0
        self._pause = PAUSE
        self._paused = 0

    @property
    def pays(self) -> bool:
        """Whether passes should be made of guesses now."""
        return self._rate >= PAYS and not self._paused

    def now(self) -> int:
        """How many tokens to guess."""
        return self._depth

    def note(self, guessed: int, right: int) -> None:
        """Count guesses, in a pass or only for comparison."""
        self._rate += (right / guessed - self._rate) * min(MEMORY, max(MEMORY // 8, guessed)) / MEMORY
        self._depth = min(MOST, self._depth + 4) if right >= guessed else max(2, (self._depth + right) // 2)

    def none(self) -> None:
        """Count that there was nothing to guess."""
        self._rate -= self._rate / MEMORY

    def wait(self, tokens: int) -> None:
        """Count tokens of the answer; guesses that are not free are tried again after a pause, longer each time."""
        if self._paused:
            self._paused = max(0, self._paused - tokens)
            if not self._paused:
                self._rate, self._depth = 2 * PAYS, 2
        elif not self._free and self._rate < PAYS:
            self._paused, self._pause = self._pause, 2 * self._pause


class Continuation:
    """One answer as far as it is certain, and the guesses that go along with the next pass.

    A pass feeds the last certain token and the `drafts` behind it, and a token is picked from each row of its logits by
    the states of `rows`; `accept` then says which of them are the answer's.

    Attributes:
        state: the sampling state before the next token that is not certain.
        drafts: the guesses of the pass that is under way.
        rows: sampling states of that pass, one more than the drafts.
    """

    def __init__(
        self,
        state: SamplingState,
        ids: Sequence[int],
        *,
        guide: Guide | None = None,
        proposer: Proposer | None = None,
        single: bool = False,
    ) -> None:
        """Begin after the prompt `ids`.

        Args:
            single: passes have one token each, whatever there is to guess: how a model sees a token depends on how many
                come with it.
        """
        self.state = state
        self.guide = guide
        self.proposer = proposer
        self.drafts: list[int] = []
        self.rows: list[SamplingState] = []
        self._single = single
        self._depth = Depth(free=proposer is None or proposer.free)
        self._forced: list[int] | None = None
        self._compared: list[int] = []  # guesses that no pass was made of, to be compared with what comes
        self._met = 0  # how many of them have been right
        self._own = 0  # how many of the drafts are the proposer's
        self._failed: RunnerError | None = None  # what the guide has raised behind tokens that it has followed
        self._shown: tuple[mx.array, int] | None = None  # hidden states of the pass under way, and their first position
        if proposer is not None:
            proposer.add(ids)

    @property
    def plain(self) -> bool:
        """Whether each pass feeds one token and nothing needs to be known before the next is drawn."""
        return self.guide is None and self.proposer is None

    def waits(self, rows: int) -> bool:
        """Whether the next pass, of so many rows, is made only when its token is certain: there are guesses behind it.

        Reading a run of n tokens that must come spares n steps of one row; waiting, and building a pass and the next
        step anew, costs all rows about half a step.
        """
        if self._single:
            return False
        if self.guide is not None and len(self._run()) > max(1, rows // 2):
            return True
        return self.proposer is not None and self._depth.pays

    @property
    def watched(self) -> bool:
        """Whether passes should show their hidden states."""
        return self.proposer is not None and self.proposer.watches

    def saw(self, hidden: mx.array, position: int) -> None:
        """Show the hidden states `[1, L, H]` of a part of the prompt, whose first token is at `position`."""
        if self.proposer is not None:
            self.proposer.saw(hidden, position)

    def show(self, hidden: mx.array, position: int) -> None:
        """Hold the hidden states `[1, L, H]` of a pass with guesses: only those of right ones will be shown."""
        self._shown = hidden, position

    def plan(self, most: int) -> list[int]:
        """Choose up to `most` guesses for the next pass, and return them."""
        most = 0 if self._single else most
        guesses = self._run()[:most]
        self._own = 0
        if not guesses and most and self.proposer is not None and self._depth.pays:
            found: list[int] | None = []
            try:
                found = self.proposer.propose(min(self._depth.now(), most), self.state)
            except (RunnerError, Apart):  # its model was closed, say: it only guesses, and the answer goes on without
                self.proposer = None
            guesses = found or []
            self._own = len(guesses)
            if found == []:
                self._depth.none()
        # Where the guide has failed, nothing is asked of it any more: `accept` says so.
        masks = None if self.guide is None or self._failed is not None else self.guide.allowed_after(guesses)
        self.drafts = guesses if masks is None else guesses[: len(masks) - 1]
        ends = range(len(self.drafts) + 1)
        self.rows = [self.state.after(self.drafts[:end]) for end in ends] if self.drafts else [self.state]
        for row, mask in zip(self.rows, masks or (), strict=masks is not None):
            row.allowed = mask
        return self.drafts

    def accept(self, picked: Sequence[Token | NumericsError]) -> list[Token]:
        """Take what was picked from each row: the tokens that are certain now, at least one.

        Raises:
            NumericsError: none can be picked from the first row.
            RunnerError: what the guide has raised at the first token, or at the one behind the last of the pass before.
        """
        if self._failed is not None:
            raise self._failed
        tokens: list[Token] = []
        for row, token in enumerate(picked):
            if isinstance(token, NumericsError):
                if not tokens:
                    raise token
                break  # the next pass begins there, and ends there
            tokens.append(token)
            if row < len(self.drafts) and token.id != self.drafts[row]:
                break
        tokens = tokens if self.guide is None else self._followed(self.guide, tokens)
        self.state = self.rows[len(tokens) - 1]
        if self.proposer is not None:
            if self._shown is not None:
                self.proposer.saw(self._shown[0][:, : len(tokens)], self._shown[1])
                self._shown = None
            self._learn(self.proposer, [token.id for token in tokens])
        self._forced, self.drafts, self.rows = None, [], []
        return tokens

    def _followed(self, guide: Guide, tokens: list[Token]) -> list[Token]:
        """The tokens, as far as the guide follows them: at least one, or what it raises there."""
        for place, token in enumerate(tokens):
            try:
                guide.add(token.id)
            except RunnerError as error:
                if not place:
                    raise
                self._failed = error  # without guesses, the tokens before it would have come
                return tokens[:place]
        return tokens

    def _run(self) -> list[int]:
        """The next tokens that are the only ones the guide allows."""
        if self._forced is None:
            self._forced = [] if self.guide is None or self._failed is not None else self.guide.forced(MOST)
        return self._forced

    def _learn(self, proposer: Proposer, ids: list[int]) -> None:
        # What was forced says nothing about the proposer.
        if self._own:
            self._depth.note(self._own, min(len(ids) - 1, self._own))
        self._depth.wait(len(ids))
        self._own = 0
        proposer.add(ids)
        if not proposer.free or self._depth.pays:
            self._compared = []
            return
        # Free guesses go on being compared with what comes, to be taken up again once they are right.
        for token in ids:
            if self._compared:
                right = token == self._compared[self._met]
                self._met += right
                if right and self._met < len(self._compared):
                    continue
                self._depth.note(len(self._compared), self._met)
            self._compared, self._met = [], 0
        if not self._compared and not self._single:
            self._compared = proposer.propose(START, self.state) or []
