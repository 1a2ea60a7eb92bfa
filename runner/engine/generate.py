"""Generation: prefill the prompt in chunks, then decode with one token computed ahead of the one being read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeVar

import mlx.core as mx

from runner.cache.caches import Caches
from runner.cache.storage import PLAIN, Powers, Storage
from runner.config.base import Config
from runner.engine.replay import Steps
from runner.errors import UsageError
from runner.families import Model
from runner.nn.batch import Batch
from runner.ops.device import PREFILL_CHUNK
from runner.ops.table import PORTABLE, Ops

Step = TypeVar("Step", bound=tuple[mx.array | None, ...])
"""What sampling makes of a row of logits: lazy arrays, the first of which is the token."""


def new_caches(config: Config, storage: Storage = PLAIN, powers: Sequence[Powers | None] | None = None) -> Caches:
    """Make empty caches for what the layers of `config` remember, rows kept by `storage`."""
    return Caches.of([config.memory(index) for index in range(config.num_hidden_layers)], storage, powers)


class Cancelled(Exception):
    """Raised by `prefill` when its caller no longer wants an answer."""


def prefill_passes(
    model: Model,
    ids: Sequence[int],
    caches: Caches,
    *,
    chunk: int = PREFILL_CHUNK,
    cuts: Collection[int] = (),
    show: Callable[[mx.array, int], None] | None = None,
) -> Iterator[tuple[int, mx.array | None]]:
    """Run the prompt through the model, one chunk for each item: the tokens done, and after the last one the logits.

    The logits are `[V]` and follow the last token; no others are computed. Arguments and errors are `prefill`'s; a
    chunk also ends at each position of `cuts`. `show` is given the hidden states `[1, L, H]` of each, and the position
    of the first.
    """
    if not ids or chunk < 1:
        raise UsageError(
            f"prefill needs at least one token and a positive chunk size, not {len(ids)} tokens in chunks of {chunk}"
        )
    offset = caches.offset
    length = offset + len(ids)  # of the whole prompt: some RoPE types choose their frequencies by it
    start = 0
    while True:
        end = min([start + chunk, len(ids), *(cut - offset for cut in cuts if cut - offset > start)])
        piece = mx.array([list(ids[start:end])], dtype=mx.int32)
        hidden = model(Batch(piece, offset + start, length), caches)
        if show is not None:
            show(hidden, offset + start)
        if end == len(ids):
            # The last chunk stays lazy: it is computed together with the logits.
            yield len(ids), model.logits(hidden[:, -1:])[0, -1]
            return
        # Compute this chunk now, or the graphs of all chunks (and their activations) would be held at once.
        mx.eval(caches.arrays)
        yield end, None
        start = end


def prefill(
    model: Model,
    ids: Sequence[int],
    caches: Caches,
    *,
    chunk: int = PREFILL_CHUNK,
    on_progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> mx.array:
    """Run the prompt through the model and return the logits `[V]` after its last token; no others are computed.

    Args:
        ids: the prompt without the tokens that `caches` already hold.
        chunk: tokens per forward pass.
        on_progress: called after each chunk with the tokens done and the tokens in all.
        cancelled: asked before each chunk; true stops the prefill.

    Raises:
        UsageError: the prompt is empty, or `chunk` is not positive.
        Cancelled: `cancelled()` returned true.
    """
    passes = prefill_passes(model, ids, caches, chunk=chunk)
    while True:
        if cancelled is not None and cancelled():
            raise Cancelled
        done, logits = next(passes)
        if on_progress is not None:
            on_progress(done, len(ids))
        if logits is not None:
            return logits


def decode(
    model: Model,
    logits: mx.array,
    caches: Caches,
    sample: Callable[[mx.array], Step],
    max_tokens: int,
    ops: Ops = PORTABLE,
) -> Iterator[Step]:
    """Yield what `sample` makes of the logits `[V]` of each of up to `max_tokens` tokens, one computed ahead.

    While a token is read, the next is being computed. Tokens are fed back without leaving the device, whose operations
    `ops` holds. `caches` end before the last of `max_tokens` tokens; if the caller stops earlier, they include the last
    token that was yielded.
    """
    steps = Steps(model, caches, ops)
    current = sample(logits)
    ops.schedule(*_arrays(current))
    for index in range(max_tokens):
        # Schedule the next step before yielding: it runs while the caller reads and prints this token.
        following = None
        if index + 1 < max_tokens:
            token = current[0]
            assert token is not None
            following = sample(steps(token.reshape(1, 1))[0])
            ops.schedule(*_arrays(following))
        yield current
        if following is not None:
            current = following


def _arrays(step: tuple[mx.array | None, ...]) -> list[mx.array]:
    return [array for array in step if array is not None]
