"""Picks the next token of many sequences at once: what sampling remembers of each, and operations over all rows."""

from __future__ import annotations

import copy
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import mlx.core as mx

from runner.engine.chance import chance
from runner.engine.sampling import SMALLEST, SamplingParams
from runner.errors import NumericsError, UsageError
from runner.ops.picking import Draw
from runner.ops.table import PORTABLE, Ops

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Token(NamedTuple):
    """A token that was read from the device: its id, and its log-probabilities where they were asked for."""

    id: int
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None


class SamplingState:
    """What sampling knows of one sequence: its options, the position of its next token, and the tokens seen so far.

    Attributes:
        position: of the token that is picked next.
        allowed: the tokens that may be picked next, `[ceil(V / 32)]`: bit j of word i stands for token 32 i + j. None:
            all.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, ids: Sequence[int], *, choice: int = 0) -> None:
        """Prepare to sample after `ids`; a job of the owner's thread.

        Args:
            choice: which of several answers to one prompt it is: each draws by numbers of its own.

        Raises:
            UsageError: a `logit_bias` id is outside the vocabulary.
        """
        for token in params.logit_bias:
            if not 0 <= token < vocab_size:
                raise UsageError(f"logit_bias: token {token} is not in the vocabulary (0 to {vocab_size - 1})")
        self.params = params
        self.choice = choice
        self.position = len(ids)
        self.allowed: npt.NDArray[np.uint32] | None = None
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.bias = _bias(params.logit_bias, vocab_size)
        self.seen: _Seen | None = None  # None: nothing is penalised
        self.row = 0  # in `seen`
        self.counted = 0  # tokens within the penalty window
        if params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0:
            window = params.penalty_window
            kept = list(ids[-window:] if window else ids) if params.penalize_prompt else []
            self.seen, self.counted = _Seen.of(kept, vocab_size, window), len(kept)

    def draw(self) -> Draw:
        """How to draw the token at `position`."""
        params = self.params
        if params.temperature < SMALLEST:
            return GREEDY
        number = chance(self.seed, self.choice, self.position)
        return Draw(number, params.temperature, params.top_k, params.top_p, params.min_p)

    def after(self, ids: Sequence[int]) -> SamplingState:
        """A copy that has seen `ids` as well, to pick the token that follows them."""
        later = copy.copy(self)
        if self.seen is not None and ids:
            later.seen, later.row = _Seen.joined([self]), 0
            for token in ids:
                later.seen.add(mx.array([token], mx.uint32), [later])
                later.counted += 1
        later.position += len(ids)
        later.allowed = None
        return later


GREEDY = Draw(0.0, 0.0)


class Sampled(NamedTuple):
    """Lazy arrays for R rows: the picked tokens `[R]`, the greatest of the logits that each was picked from and the
    tokens' log-probabilities, and ids and log-probabilities `[R, n]` of the most likely tokens, in descending order.
    None for what no row's `SamplingParams.logprobs` asked for."""

    tokens: mx.array
    peaks: mx.array
    logprobs: mx.array | None = None
    top_ids: mx.array | None = None
    top_logprobs: mx.array | None = None

    def read(self, states: Sequence[SamplingState]) -> list[Token | NumericsError]:
        """Wait for the arrays and return each row's token, or why none can be picked from its logits.

        A maximum tells: NaN anywhere makes it NaN, plus infinity anywhere makes it that, and without a finite entry it
        is minus infinity.
        """
        peaks, tokens = cast(list[float], self.peaks.tolist()), cast(list[int], self.tokens.tolist())
        values = [None] * len(tokens) if self.logprobs is None else cast(list[float], self.logprobs.tolist())
        likeliest: list[list[tuple[int, float]]] = [[] for _ in tokens]
        if self.top_ids is not None and self.top_logprobs is not None:
            ids, tops = (
                cast(list[list[int]], self.top_ids.tolist()),
                cast(list[list[float]], self.top_logprobs.tolist()),
            )
            likeliest = [list(zip(*pair, strict=True)) for pair in zip(ids, tops, strict=True)]
        found: list[Token | NumericsError] = []
        for row, (state, peak) in enumerate(zip(states, peaks, strict=True)):
            wanted = state.params.logprobs
            if not math.isfinite(peak):
                kind = "NaN" if math.isnan(peak) else "infinity" if peak > 0 else "no finite number"
                found.append(NumericsError(kind))
            elif wanted is None:
                found.append(Token(tokens[row]))
            else:
                found.append(Token(tokens[row], values[row], likeliest[row][:wanted] if wanted else None))
        return found


class Sampler:
    """Picks a token for each of R rows of logits, by as many operations as for one.

    What comes of a row depends on no other. The rows may be others at each call; arrays of their options are made anew
    only when they are.
    """

    def __init__(self, ops: Ops = PORTABLE) -> None:
        self._ops = ops
        self._states: list[SamplingState] = []
        self._bias: mx.array | None = None
        self._penalties: _Penalties | None = None

    def __call__(self, given: mx.array | Callable[[], mx.array], states: Sequence[SamplingState]) -> Sampled:
        """Pick a token from each row of logits `[R, V]`, without evaluating anything, and move the states on by one.

        Where a function is given that waits for the logits, it is called when all else is ready.
        """
        same = len(states) == len(self._states) and all(a is b for a, b in zip(states, self._states, strict=True))
        # The same sequences may have been counted by another sampler meanwhile, as the one that goes with a kernel.
        if not same or (self._penalties is not None and not self._penalties.current):
            self._gather(list(states))
        draws = [state.draw() for state in states]
        logits = given() if callable(given) else given
        # Greedy decoding without log-probabilities needs no float32: the order of the logits is all that counts. With
        # penalties it does: what these come to would be rounded as neighbours ask.
        greedy = all(draw is GREEDY for draw in draws)
        raw = logits if greedy and not self._scored and self._penalties is None else logits.astype(mx.float32)
        logits = raw if self._bias is None else raw + self._bias
        if self._penalties is not None:
            logits = self._penalties.apply(logits)
        if any(state.allowed is not None for state in states):
            logits = self._ops.masked(logits, _bits(states, logits.shape[1]))
        tokens, peaks = self._ops.greatest(logits) if greedy else self._ops.draw(logits, draws)
        if self._penalties is not None:
            self._penalties.remember(tokens)
        for state in states:
            state.position += 1
        # Log-probabilities are the model's own: of the raw logits, not of those that were biased and filtered.
        if not self._scored:
            return Sampled(tokens, peaks)
        return Sampled(tokens, peaks, *self._ops.log_probabilities(raw, tokens, self._tops))

    def _gather(self, states: list[SamplingState]) -> None:
        self._states = states
        self._tops = [-1 if state.params.logprobs is None else state.params.logprobs for state in states]
        self._scored = max(self._tops) >= 0
        biases = [state.bias for state in states if state.bias is not None]
        same = len(biases) == len(states) and all(bias is biases[0] for bias in biases)
        if biases and not same:
            zero = mx.zeros_like(biases[0])
            biases = [zero if state.bias is None else state.bias for state in states]
        self._bias = biases[0] if same and biases else _stacked(biases) if biases else None
        self._penalties = _Penalties(states) if any(state.seen is not None for state in states) else None


class _Seen:
    """How often each token was seen in R sequences, and the latest of them where a window forgets the others."""

    def __init__(self, counts: mx.array, recent: mx.array) -> None:
        """`counts` is `[R, V]`; `recent` `[R, W]`, the newest last, is as wide as the widest window."""
        self.counts = counts
        self.recent = recent
        self._rows = mx.arange(counts.shape[0])

    @classmethod
    def of(cls, ids: Sequence[int], vocab_size: int, window: int) -> _Seen:
        """What one sequence has seen."""
        counts = mx.zeros((1, vocab_size), dtype=mx.float32)
        if ids:
            counts = counts.at[0, mx.array(list(ids))].add(1)  # a token that comes twice counts twice
        recent = [0] * (window - len(ids)) + list(ids) if window else []
        return cls(counts, mx.array(recent, mx.uint32)[None])

    @classmethod
    def joined(cls, states: Sequence[SamplingState]) -> _Seen:
        """A copy for these sequences; those that count nothing have rows of zeros."""
        found = [(state.seen, state.row) for state in states]
        width = max(state.params.penalty_window for state in states if state.seen is not None)
        nothing = next(mx.zeros_like(seen.counts[0]) for seen, _ in found if seen is not None)
        rows = [nothing if seen is None else seen.counts[row] for seen, row in found]
        latest = [
            mx.zeros((width,), mx.uint32) if seen is None else _widened(seen.recent[row], width) for seen, row in found
        ]
        return cls(_stacked(rows), _stacked(latest))

    def count(self, ids: Sequence[int]) -> None:
        """Count tokens of a single sequence that forgets none."""
        self.counts = self.counts.at[0, mx.array(list(ids))].add(1)

    def add(self, tokens: mx.array, states: Sequence[SamplingState]) -> None:
        """Count `tokens` `[R]` as seen by each sequence that counts any, and forget what leaves its window."""
        adds = [float(state.seen is not None) for state in states]
        self.counts = self.counts.at[self._rows, tokens].add(adds[0] if len(set(adds)) == 1 else mx.array(adds))
        width = self.recent.shape[1]
        if not width:
            return
        windows = [state.params.penalty_window if state.seen is not None else 0 for state in states]
        full = [float(0 < window <= state.counted) for window, state in zip(windows, states, strict=True)]
        if any(full):
            places = mx.array([width - window if window else 0 for window in windows])
            leaving = mx.take_along_axis(self.recent, places[:, None], axis=1)[:, 0]
            self.counts = self.counts.at[self._rows, leaving].add(-mx.array(full))
        self.recent = mx.concatenate([self.recent[:, 1:], tokens[:, None].astype(mx.uint32)], axis=1)


class _Penalties:
    """The penalties of R sequences."""

    def __init__(self, states: Sequence[SamplingState]) -> None:
        self._states = states
        params = [state.params for state in states]
        self._repetition = _column([each.repetition_penalty for each in params])
        self._presence = _column([each.presence_penalty for each in params])
        self._frequency = _column([each.frequency_penalty for each in params])
        self._repeats = any(each.repetition_penalty != 1 for each in params)
        self._seen = _Seen.joined(states)
        for row, state in enumerate(states):
            if state.seen is not None:
                state.seen, state.row = self._seen, row

    @property
    def current(self) -> bool:
        """Whether nobody else has counted for these sequences since."""
        return all(state.seen is None or state.seen is self._seen for state in self._states)

    def apply(self, logits: mx.array) -> mx.array:
        counts = self._seen.counts
        seen = counts > 0
        if self._repeats:
            repeated = mx.where(logits > 0, logits / self._repetition, logits * self._repetition)
            logits = mx.where(seen, repeated, logits)
        result: mx.array = logits - seen * self._presence - counts * self._frequency
        return result

    def remember(self, tokens: mx.array) -> None:
        self._seen.add(tokens, self._states)
        for state in self._states:
            state.counted += 1


def _column(values: Sequence[float]) -> Any:
    """One number where all rows have the same, as a rule, else a column of theirs."""
    return values[0] if len(set(values)) == 1 else mx.array(list(values))[:, None]


def _stacked(rows: Sequence[mx.array]) -> mx.array:
    return mx.stack(list(rows))


def _widened(recent: mx.array, width: int) -> mx.array:
    lacking = width - recent.shape[0]
    if lacking <= 0:
        return recent[-lacking:]
    return mx.concatenate([mx.zeros((lacking,), mx.uint32), recent])


def _bits(states: Sequence[SamplingState], size: int) -> mx.array:
    import numpy as np  # not for a short answer from a cold process: whoever has bits has it loaded

    every = np.full(-(-size // 32), 0xFFFFFFFF, np.uint32)
    return mx.array(np.stack([every if state.allowed is None else state.allowed for state in states]))


def _bias(biases: Mapping[int, float], vocab_size: int) -> mx.array | None:
    if not biases:
        return None
    ids = mx.array(list(biases))
    return mx.zeros((vocab_size,)).at[ids].add(mx.array(list(biases.values()), dtype=mx.float32))
