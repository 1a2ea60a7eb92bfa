"""Positions other than RoPE: learned position tables, ALiBi, and a temperature that grows with the position."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import mlx.core as mx

from runner.errors import UsageError
from runner.nn.batch import Batch
from runner.nn.fast import last_offset
from runner.ops.attention import window_mask
from runner.weights.module import Module
from runner.weights.tags import setting


def positions(batch: Batch, limit: int) -> mx.array:
    """Rows of a learned table of `limit` positions: `[L]`, or `[B, L]` if the batch has an offset for each row.

    `[T]` for the tokens of several requests.

    Raises:
        UsageError: a position is past the end of the table.
    """
    offset, length = batch.offset, batch.ids.shape[1]
    last = last_offset(offset) + (0 if isinstance(offset, tuple) else length - 1)
    if last >= limit:
        raise UsageError(
            f"this model has learned positions for {limit} tokens; position {last} is past the end: shorten the prompt"
        )
    if isinstance(offset, tuple):
        return mx.array(offset)
    if isinstance(offset, mx.array) and offset.ndim:
        offset = offset[:, None]
    return mx.arange(length) + offset


@dataclass
class Alibi(Module):
    """ALiBi (arXiv:2108.12409): no positions, but biases that lower each head's scores in proportion to distance."""

    num_attention_heads: int = setting()
    scale: float = setting("alibi_scale", default=1.0)
    dtype: mx.Dtype = setting("alibi_dtype", default=mx.float32)

    def __call__(self, batch: Batch, keys: int, activations: mx.Dtype) -> Batch:
        """`batch` with the biases in its mask, `[1 or B, H, L, keys]` in the dtype `activations`; once for all layers.

        The bias of a key is `scale * slope * position`; position, and position times slope, are rounded to `dtype`,
        as in training. Softmax ignores what is equal in a whole row, so the query's own term is subtracted, in float32:
        biases of near keys, which matter most, become small and keep their digits in 16 bits.
        """
        length = batch.ids.shape[1]
        slopes = mx.array(alibi_slopes(self.num_attention_heads)).astype(self.dtype)[:, None]
        # Position of the first key: 0, or negative for a row with padding before it.
        assert not isinstance(batch.offset, tuple), "a part of a batch"
        behind = batch.offset - (keys - length)
        start = behind.reshape(-1, 1, 1) if isinstance(behind, mx.array) else mx.full((1, 1, 1), behind)
        terms = (slopes * (mx.arange(keys) + start).astype(self.dtype)).astype(mx.float32) * self.scale  # [B, H, keys]
        # Relative to the query's own key, the last `length` keys being the queries'.
        distances = terms[:, :, None] - terms[:, :, keys - length :, None]
        mask = window_mask(length, keys, keys) if batch.mask is None else batch.mask
        # A boolean mask hides keys, any other mask is added.
        seen = mx.where(mask, distances, -mx.inf) if mask.dtype == mx.bool_ else distances + mask
        return dataclasses.replace(batch, mask=seen.astype(activations))


@dataclass
class Temperature(Module):
    """A factor on queries that sharpens attention far into a sequence (Llama 4, Ministral 3).

    It is `1 + scale * ln(1 + floor((position + shift) / period))`. A `scale` of 0 means no such factor.
    """

    scale: float = setting("temperature_scale", default=0.0)
    period: int = setting("temperature_period", default=1)
    shift: int = setting("temperature_shift", default=0)

    def __call__(self, queries: mx.array, batch: Batch) -> mx.array:
        """`queries` `[B, ..., L, N]` times the factors of their positions, in their dtype."""
        length = batch.ids.shape[1]
        last = last_of(batch)
        if not self.scale or (last is not None and last + self.shift < self.period):
            return queries  # all factors are 1
        factors = batch.once((Temperature, self.scale, self.period, self.shift), lambda: self.factors(batch, length))
        if factors.ndim == 3:  # a column for each row of the batch
            factors = factors.reshape(-1, *(1,) * (queries.ndim - 3), length, 1)
        return (queries * factors).astype(queries.dtype)

    def factors(self, batch: Batch, length: int) -> mx.array:
        """The factors in float32: one for a single token, else `[L, 1]`, or `[B, L, 1]` with an offset for each row."""
        offset = batch.offset
        if isinstance(offset, int | tuple):  # constants: steps that share them can be replayed
            places = range(offset, offset + length) if isinstance(offset, int) else offset
            found = [1 + self.scale * math.log1p((place + self.shift) // self.period) for place in places]
            return mx.array(found[0] if length == 1 else [[one] for one in found], dtype=mx.float32)
        offset = offset[:, None] if offset.ndim else offset
        steps = (mx.arange(length) + offset + self.shift) // self.period
        return 1 + self.scale * mx.log1p(steps.astype(mx.float32))[..., None]


def last_of(batch: Batch) -> int | None:
    """The largest position of the batch; None where it would have to be read from the device."""
    if isinstance(batch.offset, mx.array):
        return None
    return max(batch.offset) if isinstance(batch.offset, tuple) else batch.offset + batch.ids.shape[1] - 1


def alibi_slopes(heads: int) -> list[float]:
    """A slope for each of n heads: for a power of two, the powers 1 to n of 2^(-8/n).

    For another n, the slopes of the power of two below it, then every other slope of the power of two above it.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 / power * (i + 1)) for i in range(power)]
    return slopes + [2.0 ** (-4.0 / power * (2 * i + 1)) for i in range(heads - power)]
