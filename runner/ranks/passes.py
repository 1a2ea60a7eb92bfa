"""What rank 0 says of a pass, as JSON, and the same pass as the other ranks make of it."""

from __future__ import annotations

import mlx.core as mx

from runner.errors import UsageError
from runner.nn.batch import Batch, Segment
from runner.ranks.link import Message


def described(batch: Batch) -> Message:
    """All that there is to say of a pass but its ids.

    Raises:
        UsageError: it has a mask, or an offset for each row.
    """
    if batch.mask is not None or isinstance(batch.offset, mx.array):
        raise UsageError("a batch with a mask or with offsets of its own cannot be shared out over processes")
    several = bool(batch.segments)  # which say where each of their tokens is
    return {
        "shape": list(batch.ids.shape),
        "offset": None if several else batch.offset,
        "length": None if several else batch.length,
        "segments": [[segment.count, segment.offset, segment.length] for segment in batch.segments],
    }


def batch_of(message: Message, ids: mx.array) -> Batch:
    """The pass over `ids` that a message of `described` tells of."""
    if message["segments"]:
        return Batch.of(ids, [Segment(*segment) for segment in message["segments"]])
    return Batch(ids, message["offset"], message["length"])
