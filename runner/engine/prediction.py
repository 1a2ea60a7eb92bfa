"""Guesses how a text goes on by the model's own layer for multi-token prediction."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from runner.cache.caches import Caches
from runner.config.base import Config
from runner.engine.loaded import Loaded
from runner.engine.sampler import Sampler, SamplingState
from runner.errors import UsageError
from runner.nn.batch import Batch
from runner.nn.blocks import BaseDecoder


def prediction_caches(config: Config) -> Caches:
    """Caches for the one layer: what the model's last layer remembers."""
    return Caches.of([config.memory(config.num_hidden_layers - 1)])


class Predicted:
    """One sequence in the layer for multi-token prediction. All methods are jobs of the owner's thread.

    The layer sees a token's embedding and the model's hidden state at the token before; of more than one token ahead it
    sees its own. What it has not seen (a prefix that was kept, tokens that were decoded while guesses did not pay) only
    makes its guesses worse.
    """

    free = False
    watches = True

    def __init__(self, loaded: Loaded) -> None:
        """Begin an empty sequence; `UsageError` where the model was loaded without that layer."""
        if loaded.prediction is None:
            raise UsageError("this model was loaded without its layer for multi-token prediction")
        assert isinstance(loaded.model, BaseDecoder)
        self._model = loaded.model
        self._layer = loaded.prediction.layer
        self._config = loaded.config
        self._sampler = Sampler(loaded.device.ops)
        self._ids: list[int] = []  # certain
        self.rest()

    @property
    def nbytes(self) -> int:
        """Bytes of the layer's cache, and of the hidden states that it has not been fed."""
        return self._caches.nbytes + (0 if self._hidden is None else self._hidden.nbytes)

    def rest(self) -> None:
        """Let go of all that was computed: the next guesses know less of what came before."""
        self._caches = prediction_caches(self._config)
        self._hidden: mx.array | None = None  # `[1, n, H]`, those that the layer has not been fed
        self._at = 0  # position of the first of them

    def add(self, ids: Sequence[int]) -> None:
        """Append tokens that are certain."""
        self._ids += ids

    def saw(self, hidden: mx.array, position: int) -> None:
        """Take the model's hidden states `[1, L, H]` at tokens from `position` on, all of them certain."""
        if position < self._at:  # the text is read anew
            self._caches, self._hidden, self._at = prediction_caches(self._config), None, position
        if self._hidden is not None and self._at + self._hidden.shape[1] == position:
            hidden, position = mx.concatenate([self._hidden, hidden], axis=1), self._at
        self._hidden, self._at = hidden, position
        # Of a prompt all but the last can be fed at once; nothing of it is kept then.
        count = min(hidden.shape[1], len(self._ids) - 1 - position)
        if count > 1:
            self._feed(count)
            mx.eval(self._caches.arrays)

    def propose(self, most: int, state: SamplingState) -> list[int]:
        """Up to `most` tokens, as the layer would draw them."""
        place = len(self._ids) - 1
        if self._hidden is None or self._at + self._hidden.shape[1] != place:
            return []
        hidden = self._feed(self._hidden.shape[1])[:, -1:]
        certain, later, tokens = self._caches.offset, state.after([]), []
        for index in range(most):
            token = self._sampler(self._model.logits(hidden)[0], [later]).tokens
            tokens.append(token)
            if index + 1 < most:
                hidden = self._predict(token[None], hidden)
        guesses: list[int] = mx.concatenate(tokens).tolist()  # type: ignore[assignment]
        self._caches.rewind(self._caches.reach(certain))
        return guesses

    def _feed(self, count: int) -> mx.array:
        """Feed the first `count` hidden states with the tokens behind them."""
        assert self._hidden is not None
        ids = mx.array([self._ids[self._at + 1 : self._at + 1 + count]], mx.int32)
        fed, left = self._hidden[:, :count], self._hidden[:, count:]
        self._hidden, self._at = (left if left.shape[1] else None), self._at + count
        return self._predict(ids, fed)

    def _predict(self, ids: mx.array, hidden: mx.array) -> mx.array:
        # Only distances count: the layer's first token stands at 0, wherever it is in the text.
        batch = Batch(ids, self._caches.offset)
        return self._layer.predict(self._model.embed(batch), hidden, batch, self._caches.layers[0])
