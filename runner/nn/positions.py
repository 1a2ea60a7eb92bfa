"""Positions other than rotary ones: tables that were learnt, and ALiBi's distances."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import mlx.core as mx

from runner.errors import UsageError
from runner.nn.batch import Batch
from runner.nn.fast import last_offset
from runner.ops.table import window_mask
from runner.weights.tags import setting


def positions(batch: Batch, limit: int) -> mx.array:
    """The position of each id, `[L]` or, with an offset for each row, `[B, L]`: rows of a table of `limit` positions.

    Raises:
        UsageError: a position behind the table's end.
    """
    offset, length = batch.offset, batch.ids.shape[1]
    last = last_offset(offset) + length - 1
    if last >= limit:
        raise UsageError(f"this model has learnt positions for {limit} tokens; position {last} is behind them")
    if isinstance(offset, mx.array) and offset.ndim:
        offset = offset[:, None]
    return mx.arange(length) + offset


@dataclass
class Alibi:
    """Distances instead of positions (arXiv:2108.12409): each head loses a share of a score per token it looks back."""

    num_attention_heads: int = setting()
    scale: float = setting("alibi_scale", default=1.0)
    dtype: mx.Dtype = setting("alibi_dtype", default=mx.float32)

    def __call__(self, batch: Batch, keys: int, activations: mx.Dtype) -> Batch:
        """`batch` with a mask `[1 or B, H, L, keys]` in the dtype `activations`: made once, added in every layer.

        The term of a key is `scale * slope * position`, position times slope rounded to `dtype` as the models were
        trained. A softmax does not see what a whole row shares, so that the query's own term is taken off in float32:
        what is near, and matters, is small, and keeps its digits in 16 bits.
        """
        length = batch.ids.shape[1]
        slopes = mx.array(alibi_slopes(self.num_attention_heads)).astype(self.dtype)[:, None]
        behind = batch.offset - (keys - length)  # 0, but for rows with padding before them
        start = behind.reshape(-1, 1, 1) if isinstance(behind, mx.array) else mx.full((1, 1, 1), behind)
        terms = (slopes * (mx.arange(keys) + start).astype(self.dtype)).astype(mx.float32) * self.scale  # [B, H, keys]
        distances = terms[:, :, None] - terms[:, :, keys - length :, None]
        mask = window_mask(length, keys, keys) if batch.mask is None else batch.mask
        seen = mx.where(mask, distances, -mx.inf) if mask.dtype == mx.bool_ else distances + mask
        return dataclasses.replace(batch, mask=seen.astype(activations))


def alibi_slopes(heads: int) -> list[float]:
    """A geometric row from 2^(-8/n) for n heads; for other n, then every other one of the next row."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 / power * (i + 1)) for i in range(power)]
    return slopes + [2.0 ** (-4.0 / power * (2 * i + 1)) for i in range(heads - power)]
