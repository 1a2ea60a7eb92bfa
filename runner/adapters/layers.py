"""Layers with adapters: the base's result plus products with small matrices; the base's weights stay unchanged.

LoRA (arXiv:2106.09685): `y = W x + s B A x`. DoRA (arXiv:2402.09353): `y = m / ||W + s B A|| (W x + s B A x)`, where
the norm of each row is computed once, when the layer is made.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from runner.adapters.used import Used, Weights
from runner.nn.batch import Apart, together
from runner.nn.linear import Embedding, Linear, Update
from runner.nn.moe import ExpertLinear
from runner.ops.table import PORTABLE, Ops
from runner.weights.module import Module


@dataclass
class Delta(Module):
    """The low-rank update that one adapter adds to one field of a model.

    Where a field joins several stored matrices, `down` stacks the A of each, and `up` is zero where a row of the field
    has no part in one of them.

    Attributes:
        adapter: the adapter's name, its key in `weights`.
        down: `[R, in]`; for experts `[E, R, in]`; for embeddings `[vocab_size, R]`.
        up: `[out, R]`; for experts `[E, out, R]`.
        scale: `[R]` float32, or one number for all.
    """

    adapter: str
    down: mx.array
    up: mx.array
    scale: mx.array | float


@dataclass
class TokenRows(Module):
    """Rows `[n, width]` that replace the base table's rows for the ids `tokens` (`[n]` integers)."""

    adapter: str
    tokens: mx.array
    rows: mx.array

    def looked_up(self, ids: mx.array, y: mx.array) -> mx.array:
        """Replace rows of `y` `[..., width]`, which the table has for `ids` `[...]`, where an id is in `tokens`."""
        # Which of the tokens each id is; argmax of no hit is 0, which `where` discards.
        hits = ids[..., None] == self.tokens
        return mx.where(
            mx.any(hits, axis=-1, keepdims=True),
            self.rows[mx.argmax(hits.astype(mx.int32), axis=-1)].astype(y.dtype),
            y,
        )

    def scored(self, x: mx.array, y: mx.array, ops: Ops) -> mx.array:
        """Replace the logits of `tokens` in `y` `[..., vocab_size]`, the table's products with `x`."""
        y[..., self.tokens] = ops.linear(x, self.rows, None).astype(y.dtype)
        return y


@dataclass
class Magnitude(Module):
    """DoRA's magnitudes for a delta: `lengths` has m `[out]` of the field's rows, valid where `rows` (bool `[out]`)."""

    delta: Delta
    lengths: mx.array
    rows: mx.array

    def gain(self, matrix: mx.array) -> mx.array:
        """DoRA's factor for each row, `[out]` float32: `m / ||W + s B A||` with W `[out, in]`, or 1 without m."""
        delta = self.delta
        up = delta.up.astype(mx.float32) * delta.scale
        moved = matrix.astype(mx.float32) + up @ delta.down.astype(mx.float32)
        norm = mx.linalg.norm(moved, axis=1)
        return mx.where(self.rows, self.lengths.astype(mx.float32) / norm, 1.0)


@dataclass
class AdaptedLinear(Linear):
    """A linear layer with adapters.

    All layers of a model share one `used` object, so a change to it takes effect at the next call. A weight of 0
    turns its adapter off. An adapter with magnitudes or token rows has weight 0 or 1, and no other adapter changes the
    same stored matrix.
    """

    base: Linear
    deltas: list[Delta]
    tokens: list[TokenRows]
    magnitudes: list[Magnitude]
    used: Used
    ops: Ops = PORTABLE

    def __post_init__(self) -> None:
        # DoRA scales W x but not the bias b: gain * (W x + b) + (1 - gain) * b = gain * W x + b.
        self.gains: dict[str, tuple[mx.array, mx.array]] = {}
        for magnitude in self.magnitudes:
            matrix = self.base.matrix()
            bias = self.base(mx.zeros((1, matrix.shape[1])))[0].astype(mx.float32)  # output for zeros
            gain = magnitude.gain(matrix)
            shift = (1 - gain) * bias
            mx.eval(gain, shift)  # now, so that one dequantized matrix is in memory at a time
            self.gains[magnitude.delta.adapter] = gain, shift
        self.magnitudes = []  # the factors in `gains` replace them

    def __call__(self, x: mx.array) -> mx.array:
        return self.used.added(_names(self.deltas, self.tokens), x, self.base(x), self._added)

    def _added(self, weights: Weights, x: mx.array, y: mx.array) -> mx.array:
        for delta in self.deltas:
            weight = weights[delta.adapter]
            if not weight:
                continue
            # Scaled between the two products, where there are R values and not `out`.
            # Scales that differ are float32, which must not spread to the second product: it would cast its matrix.
            lows = self.ops.linear(x, delta.down, None) * (delta.scale * weight)
            more = self.ops.linear(lows.astype(x.dtype), delta.up, None)
            # A gain scales base and update together: an adapter with one is alone on its rows.
            if delta.adapter in self.gains:
                gain, shift = self.gains[delta.adapter]
                y = (gain * (y + more) + shift).astype(y.dtype)
            else:
                y = y + more.astype(y.dtype)
        # Token rows replace what the head computed for them, so they come last.
        for rows in self.tokens:
            y = rows.scored(x, y, self.ops) if weights[rows.adapter] else y
        return y

    @property
    def runs(self) -> list[int]:
        return _counts(self.used.runs(_names(self.deltas, self.tokens)))

    def of(self, token: int) -> AdaptedLinear:
        own = copy.copy(self)  # with the gains that were computed when it was made
        own.used = self.used.of(token)
        return own

    def matrix(self) -> mx.array:
        return self.base.matrix()

    def updates(self) -> list[Update]:
        weights, found = self.used.same(_names(self.deltas)), self.base.updates()
        for delta in self.deltas:
            if weight := weights[delta.adapter]:
                gain, _ = self.gains.get(delta.adapter, (None, None))
                found.append(Update(delta.down, delta.up, delta.scale * weight, gain))
        return found


@dataclass
class AdaptedExperts(ExpertLinear):
    """The experts' matrices of one field, with adapters."""

    base: ExpertLinear
    deltas: list[Delta]
    used: Used
    ops: Ops = PORTABLE

    def __call__(self, x: mx.array, experts: mx.array, *, sorted_indices: bool = False) -> mx.array:
        y, runs = self.base(x, experts, sorted_indices=sorted_indices), self.used.runs(_names(self.deltas))
        if len(runs) == 1:
            return self._added(runs[0][1], x, y, experts, sorted_indices)
        if experts.shape[:2] != (1, sum(count for count, _ in runs)):
            raise Apart(f"experts with adapters see {experts.shape}")
        pieces, start = [], 0
        for count, weights in runs:
            place = slice(start, start + count)
            pieces.append(self._added(weights, x[:, place], y[:, place], experts[:, place], False))
            start += count
        return together(pieces)

    def _added(self, weights: Weights, x: mx.array, y: mx.array, experts: mx.array, ordered: bool) -> mx.array:
        for delta in self.deltas:
            weight = weights[delta.adapter]
            if weight:
                lows = self.ops.gather_linear(x, delta.down, experts, sorted_indices=ordered) * (delta.scale * weight)
                y = y + self.ops.gather_linear(lows, delta.up, experts, sorted_indices=ordered).astype(y.dtype)
        return y

    @property
    def runs(self) -> list[int]:
        return _counts(self.used.runs(_names(self.deltas)))

    def matrices(self) -> mx.array:
        """The experts' matrices `[E, out, in]` in float32, with the adapters added."""
        weights = self.used.same(_names(self.deltas))
        result = self.base.matrices().astype(mx.float32)
        for delta in self.deltas:
            if weights[delta.adapter]:
                up = delta.up.astype(mx.float32) * (delta.scale * weights[delta.adapter])
                result = result + up @ delta.down.astype(mx.float32)
        return result

    @property
    def changeable(self) -> bool:
        return True


@dataclass
class AdaptedEmbedding(Embedding):
    """An embedding table with adapters: a token's row of `down` is looked up like its row of the table."""

    base: Embedding
    deltas: list[Delta]
    tokens: list[TokenRows]
    used: Used
    ops: Ops = PORTABLE

    def __call__(self, ids: mx.array) -> mx.array:
        return self.used.added(_names(self.deltas, self.tokens), ids, self.base(ids), self._added)

    def _added(self, weights: Weights, ids: mx.array, y: mx.array) -> mx.array:
        for delta in self.deltas:
            weight = weights[delta.adapter]
            if weight:
                lows = delta.down[ids] * (delta.scale * weight)
                y = y + self.ops.linear(lows, delta.up, None).astype(y.dtype)
        for rows in self.tokens:
            y = rows.looked_up(ids, y) if weights[rows.adapter] else y
        return y


def _names(deltas: list[Delta], tokens: list[TokenRows] | tuple[()] = ()) -> set[str]:
    """The adapters that a layer has something of."""
    return {delta.adapter for delta in deltas} | {rows.adapter for rows in tokens}


def _counts(runs: list[tuple[int, Weights]]) -> list[int]:
    """Of runs that differ, how many tokens each has."""
    return [count for count, _ in runs] if len(runs) > 1 else []


def factors(module: object, path: str = "") -> Iterator[tuple[str, mx.array | float]]:
    """What adapters do to a model besides the arrays of its fields: numbers, and what was computed from magnitudes."""
    if isinstance(module, list | tuple):
        for index, item in enumerate(module):
            yield from factors(item, f"{path}.{index}")
    elif isinstance(module, Delta):
        if not isinstance(module.scale, mx.array):
            yield f"{path} {module.adapter}", module.scale
    elif dataclasses.is_dataclass(module):
        if isinstance(module, AdaptedLinear):
            for adapter, pair in module.gains.items():
                yield from ((f"{path} {adapter} {index}", array) for index, array in enumerate(pair))
        for item in dataclasses.fields(module):
            yield from factors(vars(module).get(item.name), f"{path}.{item.name}")
