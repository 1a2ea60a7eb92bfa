"""How large a model's keys and values are, channel by channel, before it has read anything."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from runner.cache.caches import Caches
from runner.cache.kv import KVCache
from runner.cache.storage import Powers, Storage
from runner.config.memory import Memory
from runner.families import Model
from runner.nn.batch import Batch

SAMPLE = 16
"""Tokens that are looked at, from all over the vocabulary."""


def channel_powers(
    model: Model, vocab_size: int, memories: Sequence[Sequence[Memory]], storage: Storage, exact: Storage
) -> list[Powers | None] | None:
    """The powers that each cache keeps its channels with, None for states; or None: `storage` needs none.

    They are those for a few fixed tokens, kept as they are in `exact`: so they depend on the weights alone. Powers that
    depended on the tokens of a sequence would make the bits of a row depend on those that were read together with it.

    Args:
        memories: what each layer remembers.
    """
    if storage.powers is None:
        return None
    caches = Caches.of(memories, exact)
    ids = [index * vocab_size // SAMPLE for index in range(SAMPLE)]
    mx.eval(model(Batch(mx.array([ids], dtype=mx.int32)), caches))
    histories = [cache.history if isinstance(cache, KVCache) else None for cache in caches]
    found = [history and storage.powers(history.keys, history.values) for history in histories]
    mx.eval([array for powers in found if powers is not None for array in powers])
    return found
