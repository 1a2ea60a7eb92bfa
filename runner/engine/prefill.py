"""Reading a prompt by itself, and the caches to read it into."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from runner.cache.caches import Caches
from runner.cache.storage import PLAIN, Powers, Storage
from runner.config.base import Config
from runner.errors import UsageError
from runner.families import Model
from runner.nn.batch import Batch
from runner.ops.device import PREFILL_CHUNK


def new_caches(config: Config, storage: Storage = PLAIN, powers: Sequence[Powers | None] | None = None) -> Caches:
    """Make empty caches for what the layers of `config` remember, rows kept by `storage`."""
    return Caches.of([config.memory(index) for index in range(config.num_hidden_layers)], storage, powers)


def prefill(model: Model, ids: Sequence[int], caches: Caches, *, chunk: int = PREFILL_CHUNK) -> mx.array:
    """Run the prompt through the model and return the logits `[V]` after its last token, lazily; no others.

    Args:
        ids: the prompt without the tokens that `caches` already hold.
        chunk: tokens per forward pass.

    Raises:
        UsageError: the prompt is empty, or `chunk` is not positive.
    """
    if not ids or chunk < 1:
        raise UsageError(
            f"prefill needs at least one token and a positive chunk size, not {len(ids)} tokens in chunks of {chunk}"
        )
    offset = caches.offset
    length = offset + len(ids)  # of the whole prompt: some RoPE types choose their frequencies by it
    for start in range(0, len(ids), chunk):
        if start:
            # Compute a chunk before the next, or the graphs of all (and their activations) would be held at once.
            mx.eval(caches.arrays)
        piece = mx.array([list(ids[start : start + chunk])], dtype=mx.int32)
        hidden = model(Batch(piece, offset + start, length), caches)
    return model.logits(hidden[:, -1:])[0, -1]
