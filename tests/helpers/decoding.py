"""Greedy decoding as plainly as it can be said: what answers of a scheduler are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import mlx.core as mx

from runner.cache.caches import Caches
from runner.engine.replay import Steps
from runner.families import Model
from runner.ops.table import PORTABLE, Ops

Step = TypeVar("Step", bound=tuple[mx.array | None, ...])
"""What sampling makes of a row of logits: lazy arrays, the first of which is the token."""


def decode(
    model: Model,
    logits: mx.array,
    caches: Caches,
    sample: Callable[[mx.array], Step],
    max_tokens: int,
    ops: Ops = PORTABLE,
) -> Iterator[Step]:
    """Yield what `sample` makes of the logits `[V]` of each of up to `max_tokens` tokens, one computed ahead."""
    steps = Steps(model, caches, ops)
    current = sample(logits)
    ops.schedule(*_arrays(current))
    for index in range(max_tokens):
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
