"""Layers with adapters: what the base computes, plus products with small matrices; the base's weights stay as they are.

LoRA (arXiv:2106.09685): `y = W x + s B A x`. DoRA (arXiv:2402.09353): `y = m / ||W + s B A|| (W x + s B A x)`, the norm
of each row taken once, when the layer is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from runner.nn.linear import Embedding, Linear
from runner.nn.moe import ExpertLinear
from runner.ops.table import PORTABLE, Ops


@dataclass
class Delta:
    """What one adapter adds to one field of a model, whose rows may come from several matrices: then `down` holds the
    A of each below one another, and `up` is zero where a row has no part in them.

    Attributes:
        adapter: its name, by which `weights` has its weight.
        down: `[R, in]`; of experts `[E, R, in]`; of embeddings `[vocab_size, R]`.
        up: `[out, R]`; of experts `[E, out, R]`.
        scale: `[R]` float32, or a number where all are the same.
    """

    adapter: str
    down: mx.array
    up: mx.array
    scale: mx.array | float


@dataclass
class TokenRows:
    """Rows of a table that stand in for the base's: those of `tokens` (`[n]` integers), `[n, width]`."""

    adapter: str
    tokens: mx.array
    rows: mx.array

    def looked_up(self, ids: mx.array, y: mx.array) -> mx.array:
        """`y` `[..., width]`, what the table has for `ids` `[...]`, with these rows in it."""
        hits = ids[..., None] == self.tokens
        return mx.where(
            mx.any(hits, axis=-1, keepdims=True),
            self.rows[mx.argmax(hits.astype(mx.int32), axis=-1)].astype(y.dtype),
            y,
        )

    def scored(self, x: mx.array, y: mx.array, ops: Ops) -> mx.array:
        """`y` `[..., vocab_size]`, the table's products with `x`, with those of these rows in it."""
        y[..., self.tokens] = ops.linear(x, self.rows, None).astype(y.dtype)
        return y


@dataclass
class Magnitude:
    """DoRA's part of a delta: for each row of the field its length m, `[out]`, where `rows` (bool `[out]`) has it."""

    delta: Delta
    lengths: mx.array
    rows: mx.array

    def gain(self, matrix: mx.array) -> mx.array:
        """`[out]` float32: `m / ||W + s B A||` with W `[out, in]`, and 1 for rows without m."""
        delta = self.delta
        up = delta.up.astype(mx.float32) * delta.scale
        moved = matrix.astype(mx.float32) + up @ delta.down.astype(mx.float32)
        norm = mx.linalg.norm(moved, axis=1)
        return mx.where(self.rows, self.lengths.astype(mx.float32) / norm, 1.0)


@dataclass
class AdaptedLinear(Linear):
    """A linear layer with adapters. `weights` is one object for all layers of a model: a change of it is seen at once.

    A weight of 0 leaves its adapter out. One with magnitudes or tokens has 0 or 1, and no other shares its rows.
    """

    base: Linear
    deltas: list[Delta]
    tokens: list[TokenRows]
    magnitudes: list[Magnitude]
    weights: Mapping[str, float]
    ops: Ops = PORTABLE

    def __post_init__(self) -> None:
        self.gains: dict[str, tuple[mx.array, mx.array]] = {}
        for magnitude in self.magnitudes:
            matrix = self.base.matrix()
            bias = self.base(mx.zeros((1, matrix.shape[1])))[0].astype(mx.float32)  # what the layer makes of nothing
            gain = magnitude.gain(matrix)
            shift = (1 - gain) * bias
            mx.eval(gain, shift)  # before the next layer's matrix is unpacked
            self.gains[magnitude.delta.adapter] = gain, shift
        self.magnitudes = []  # they have done their part

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        for delta in self.deltas:
            weight = self.weights[delta.adapter]
            if not weight:
                continue
            lows = self.ops.linear(x, delta.down, None) * (delta.scale * weight)
            more = self.ops.linear(lows, delta.up, None)
            if delta.adapter in self.gains:
                gain, shift = self.gains[delta.adapter]
                y = (gain * (y + more) + shift).astype(y.dtype)
            else:
                y = y + more.astype(y.dtype)
        for rows in self.tokens:
            y = rows.scored(x, y, self.ops) if self.weights[rows.adapter] else y
        return y

    @property
    def changeable(self) -> bool:
        return True

    def matrix(self) -> mx.array:
        """W `[out, in]` float32 with the adapters in it."""
        result = self.base.matrix().astype(mx.float32)
        for delta in self.deltas:
            weight = self.weights[delta.adapter]
            if weight:
                up = delta.up.astype(mx.float32) * (delta.scale * weight)
                result = result + up @ delta.down.astype(mx.float32)
                if delta.adapter in self.gains:
                    result = self.gains[delta.adapter][0][:, None] * result
        for rows in self.tokens:
            if self.weights[rows.adapter]:
                result[rows.tokens] = rows.rows.astype(mx.float32)
        return result


@dataclass
class AdaptedExperts(ExpertLinear):
    """A matrix for each expert, with adapters."""

    base: ExpertLinear
    deltas: list[Delta]
    weights: Mapping[str, float]
    ops: Ops = PORTABLE

    def __call__(self, x: mx.array, experts: mx.array, *, sorted_indices: bool = False) -> mx.array:
        y = self.base(x, experts, sorted_indices=sorted_indices)
        for delta in self.deltas:
            weight = self.weights[delta.adapter]
            if weight:
                lows = self.ops.gather_linear(x, delta.down, experts, sorted_indices=sorted_indices) * (
                    delta.scale * weight
                )
                y = y + self.ops.gather_linear(lows, delta.up, experts, sorted_indices=sorted_indices).astype(y.dtype)
        return y

    def matrices(self) -> mx.array:
        """`[E, out, in]` float32 with the adapters in them."""
        result = self.base.matrices().astype(mx.float32)
        for delta in self.deltas:
            if self.weights[delta.adapter]:
                up = delta.up.astype(mx.float32) * (delta.scale * self.weights[delta.adapter])
                result = result + up @ delta.down.astype(mx.float32)
        return result

    @property
    def changeable(self) -> bool:
        return True


@dataclass
class AdaptedEmbedding(Embedding):
    """A table with adapters: rows of `down` are looked up as the table's are."""

    base: Embedding
    deltas: list[Delta]
    tokens: list[TokenRows]
    weights: Mapping[str, float]
    ops: Ops = PORTABLE

    def __call__(self, ids: mx.array) -> mx.array:
        y = self.base(ids)
        for delta in self.deltas:
            weight = self.weights[delta.adapter]
            if weight:
                lows = delta.down[ids] * (delta.scale * weight)
                y = y + self.ops.linear(lows, delta.up, None).astype(y.dtype)
        for rows in self.tokens:
            y = rows.looked_up(ids, y) if self.weights[rows.adapter] else y
        return y
