"""Guesses how a text goes on by a smaller model with the same vocabulary."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from runner.cache.kv import KVCache
from runner.engine.loaded import Loaded
from runner.engine.prefill import prefill
from runner.engine.replay import Steps
from runner.engine.sampler import Sampler, SamplingState
from runner.errors import UsageError
from runner.nn.batch import Batch
from runner.text.tokenizer import Tokenizer


class Worded(Protocol):
    """What has a tokenizer."""

    @property
    def tokenizer(self) -> Tokenizer: ...


class Drafter(Worded, Protocol):
    """A model with its tokenizer, as `runner.load` makes it."""

    @property
    def engine(self) -> Loaded: ...


def check_draft(draft: Drafter, model: Worded) -> None:
    """Refuse a draft model that cannot guess for `model`.

    Raises:
        UsageError: it is closed; its vocabulary is another; it cannot take back its guesses, being recurrent; or its
            RoPE's frequencies depend on the length.
    """
    draft.engine.check_open()
    if any(not isinstance(cache, KVCache) for cache in draft.engine.new_caches()):
        raise UsageError("a draft model must not be recurrent: it takes back guesses token by token")
    if draft.engine.config.rope_depends_on_length:
        raise UsageError("a draft model's RoPE must not depend on the length of its prompt")
    own, others = draft.tokenizer, model.tokenizer
    for token in range(min(own.vocab_size, others.vocab_size)):
        if own.piece(token) != others.piece(token):
            raise UsageError(
                f"a draft model needs the same vocabulary: token {token} is {own.piece(token)!r} in the draft's, and "
                f"{others.piece(token)!r} in the model's"
            )
    if others.vocab_size > draft.engine.config.vocab_size:
        raise UsageError(
            f"a draft model needs the same vocabulary: the draft's has {draft.engine.config.vocab_size} tokens, and "
            f"the model's {others.vocab_size}"
        )


class DraftModel:
    """One sequence in a draft model, which draws its guesses by the same numbers as the model that it guesses for.

    All methods are jobs of the owner's thread.
    """

    free = False
    watches = False

    def __init__(self, draft: Loaded, vocab_size: int) -> None:
        """Begin an empty sequence; `vocab_size` is that of the other model's logits, which may be padded otherwise."""
        self._vocab_size = vocab_size
        self._draft = draft
        self._sampler = Sampler(draft.device.ops)
        self._ids: list[int] = []  # certain
        self._knows = True  # whether its table has a row for each of them
        self.rest()

    @property
    def nbytes(self) -> int:
        """Bytes of the sequence's caches."""
        return self._caches.nbytes

    def rest(self) -> None:
        """Let go of the caches: the sequence is read again by the next `propose`."""
        self._caches = self._draft.new_caches()
        self._steps = Steps(self._draft.model, self._caches, self._draft.device.ops, self._draft.recordings)
        self._fed: list[int] = []  # in the caches

    def add(self, ids: Sequence[int]) -> None:
        """Append tokens that are certain."""
        self._ids += ids
        # The other model's table may be padded further than this one's: of such an id there is nothing to be read.
        self._knows = self._knows and max(ids, default=0) < self._draft.config.vocab_size

    def saw(self, hidden: mx.array, position: int) -> None:
        """The other model's hidden states tell nothing here."""

    def propose(self, most: int, state: SamplingState) -> list[int] | None:
        """Up to `most` tokens, each what the draft model itself would answer.

        None where only a piece of the text was read: others wait for no more than that.
        """
        most = min(most, self._draft.config.context_length - len(self._ids))
        if most < 1 or not self._knows:
            return []
        self._draft.use_adapters((1, self._draft.adapter_weights))
        pairs = zip(self._fed, self._ids[:-1], strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        place = self._caches.reach(common)
        self._caches.rewind(place)
        new, chunk = self._ids[place:], self._draft.device.chunk
        self._steps.forget()
        if len(new) > chunk:
            self._draft.model(Batch(mx.array([new[:chunk]], mx.int32), place, len(self._ids)), self._caches)
            mx.eval(self._caches.arrays)
            self._fed = self._ids[: place + chunk]
            return None
        logits = prefill(self._draft.model, new, self._caches, chunk=chunk)[None]
        later, tokens = state.after([]), []
        for index in range(most):
            token = self._sampler(self._fitted(logits), [later]).tokens
            tokens.append(token)
            self._draft.device.ops.schedule(token)  # before the next step, which may be a recorded one
            if index + 1 < most:
                logits = self._steps(token.reshape(1, 1))
        guesses: list[int] = mx.concatenate(tokens).tolist()  # type: ignore[assignment]
        self._fed = [*self._ids, *guesses[:-1]]
        return guesses

    def _fitted(self, logits: mx.array) -> mx.array:
        lacking = self._vocab_size - logits.shape[1]
        if lacking <= 0:
            return logits[:, : self._vocab_size]
        return mx.pad(logits, [(0, 0), (0, lacking)], constant_values=-math.inf)
