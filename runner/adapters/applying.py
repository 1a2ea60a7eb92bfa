"""Puts adapters into a model's plan: each field they change becomes a layer that computes base plus adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import mlx.core as mx

from runner.adapters.base import Base
from runner.adapters.layers import AdaptedEmbedding, AdaptedExperts, AdaptedLinear, Delta, Magnitude, TokenRows
from runner.adapters.parts import AllExperts, Factors, Parts, SavedRows
from runner.adapters.sites import Rows, Stack, in_field_order, kind_of, pieces_of, row_order, width_of
from runner.adapters.used import Used
from runner.nn.linear import Embedding, Linear
from runner.nn.moe import ExpertLinear
from runner.ops.table import Ops
from runner.weights.plan import ArrayPlan, ModulePlan, Value

_LAYERS: Mapping[type, type] = {Linear: AdaptedLinear, Embedding: AdaptedEmbedding, ExpertLinear: AdaptedExperts}


class Applying:
    """Rewrites a model's plan, with adapted layers in place of the fields that adapters change."""

    def __init__(
        self, base: Base, parts: Parts, names: Collection[str], used: Used, ops: Ops, dtype: mx.Dtype | None
    ) -> None:
        """`names` are those of all adapters, in the order in which they add up; `used` is what all layers share."""
        self.parts, self.names, self.used = parts, names, used
        self.ops, self.dtype = ops, dtype
        self.by_leaf = {(site.leaf, site.kind): name for name, site in base.sites.items()}
        self.by_path = {stack.path: stack for stack in base.stacks.values()}

    def module(self, item: ModulePlan) -> ModulePlan:
        """Return `item` with every adapted layer below it replaced."""
        kind = kind_of(item)
        if kind is not None:
            return self.adapted(item, kind)
        # A plan is frozen: its parts are replaced in a copy.
        fields: dict[str, Any] = {}
        for name, field in item.fields.items():
            if isinstance(field, list):
                fields[name] = [self.module(child) for child in field]
            else:
                fields[name] = self.module(field) if isinstance(field, ModulePlan) else field
        return dataclasses.replace(item, fields=fields)

    def adapted(self, item: ModulePlan, kind: type) -> ModulePlan:
        """Wrap the layer `item` in its adapters; returns `item` itself where none changes it."""
        array = item.fields["weight"]
        assert isinstance(array, ArrayPlan)
        # Adapters name stored matrices, of which a fused field joins several: collect what they have for any of them.
        pieces = pieces_of(array)
        names = [self.by_leaf.get((rows.leaf, kind), "") for matrix in pieces for rows in matrix]
        found = {factors.adapter for name in names for factors in self.parts.factors.get(name, ())}
        tokens = [rows for name in names for rows in self.parts.rows.get(name, ())]
        stack = self.by_path.get(item.path)
        stacked = {factors.adapter: factors for factors in self.parts.stacked.get(stack.name, ())} if stack else {}
        found |= stacked.keys()
        if not found and not tokens:
            return item
        # One delta per adapter, in the order the adapters were given.
        deltas: list[Delta] = []
        magnitudes: list[Magnitude] = []
        for adapter in self.names:
            if adapter not in found:
                continue
            # Factors for all experts at once are kept apart from those of single experts' matrices.
            if stack is not None and adapter in stacked:
                deltas.append(self.stack(stacked[adapter], stack))
                continue
            if kind is ExpertLinear:
                deltas.append(self.experts(adapter, width_of(item), pieces))
                continue
            delta, magnitude = self.delta(adapter, kind, array, pieces[0])
            deltas.append(delta)
            magnitudes += [] if magnitude is None else [magnitude]
        # The base's plan becomes a part of the new layer, so its arrays load as before.
        fields: dict[str, Any] = {
            "base": item,
            "deltas": Value(deltas),
            "used": Value(self.used),
            "ops": Value(self.ops),
        }
        if kind is Linear:
            fields["magnitudes"] = Value(magnitudes)
        if kind is not ExpertLinear:
            fields["tokens"] = Value([self.token_rows(rows) for rows in tokens])
        return ModulePlan(item.path, _LAYERS[kind], fields)

    def of(self, adapter: str, rows: Rows, kind: type) -> Factors | None:
        """The factors that `adapter` has for the site of `rows`, if any."""
        factors = self.parts.factors.get(self.by_leaf.get((rows.leaf, kind), ""), ())
        return next((item for item in factors if item.adapter == adapter), None)

    def delta(self, adapter: str, kind: type, array: ArrayPlan, matrix: list[Rows]) -> tuple[Delta, Magnitude | None]:
        """One adapter's delta for a field made of the stored rows `matrix`, with DoRA's magnitudes if it has them."""
        # Rows of the field without factors get zeros in B.
        parts = [(rows, factors) for rows in matrix if (factors := self.of(adapter, rows, kind)) is not None]
        out = sum(rows.stop - rows.start for rows in matrix)
        # Reading may permute the field's rows: those of B, and DoRA's magnitudes, must follow.
        order = row_order(array.transform, out)
        # Each matrix's A goes below the last one's, and its B into columns of its own.
        downs = [self.cast(factors.down(), array.exact) for _, factors in parts]
        ups = [self.cast(factors.up(), array.exact) for _, factors in parts]
        scale = _scales([factors.scale for _, factors in parts], [down.shape[0] for down in downs])
        whole = len(matrix) == 1 and matrix[0].stop - matrix[0].start == matrix[0].total
        down = downs[0] if len(downs) == 1 else mx.concatenate(downs)
        up = ups[0] if whole else _blocks(out, [(rows, up) for (rows, _), up in zip(parts, ups, strict=True)])
        up = up if order is None else up[order]
        # An embedding looks rows up in the factor `[vocab_size, R]`, which the other layers multiply with last.
        if kind is Embedding:
            down, up = up, down.T
        down, up = mx.contiguous(down), mx.contiguous(up)
        mx.eval(down, up)  # else the graph holds the tensors that were read
        delta = Delta(adapter, down, up, scale)
        if all(factors.magnitude is None for _, factors in parts):
            return delta, None
        # A row without a magnitude keeps the base's length: `there` marks those that have one.
        lengths, there = mx.ones(out), mx.zeros(out, dtype=mx.bool_)
        for rows, factors in parts:
            length = factors.lengths()
            if length is not None:
                place = slice(rows.offset, rows.offset + rows.stop - rows.start)
                lengths[place] = length[rows.start : rows.stop].astype(mx.float32)
                there[place] = True
        return delta, Magnitude(delta, *((lengths, there) if order is None else (lengths[order], there[order])))

    def token_rows(self, saved: SavedRows) -> TokenRows:
        """Read the rows that an adapter has for single tokens."""
        rows = self.cast(saved.read())
        mx.eval(rows)
        return TokenRows(saved.adapter, mx.array(saved.tokens), rows)

    def experts(self, adapter: str, width: int, pieces: list[list[Rows]]) -> Delta:
        """One adapter's delta for a field with experts, from factors of single matrices.

        Each expert stacks the A of its matrices and has their B, scaled, in blocks. All experts get the rank of the
        largest, with zeros where one has less or no factors.
        """
        found = [[self.of(adapter, rows, ExpertLinear) for rows in matrix] for matrix in pieces]
        # All experts share one array, so each column's rank is the largest that any expert has there.
        ranks = [max(0 if item is None else item.rank for item in column) for column in zip(*found, strict=True)]
        out = sum(rows.stop - rows.start for rows in pieces[0])
        downs, ups = [], []
        for matrix, row in zip(pieces, found, strict=True):
            down, up = mx.zeros((sum(ranks), width)), mx.zeros((out, sum(ranks)))
            start = 0
            for rows, item, rank in zip(matrix, row, ranks, strict=True):
                if item is not None:
                    end = start + item.rank
                    down[start:end] = item.down().astype(mx.float32)
                    up[rows.offset : rows.offset + rows.total, start:end] = item.up().astype(mx.float32) * item.scale
                start += rank
            downs.append(down)
            ups.append(up)
        stacked = self.cast(mx.stack(downs)), self.cast(mx.stack(ups))
        mx.eval(stacked)
        return Delta(adapter, *stacked, 1.0)

    def stack(self, factors: AllExperts, stack: Stack) -> Delta:
        """One adapter's delta for a field with experts, from factors of all experts at once."""
        down, up = self.cast(factors.downs), self.cast(mx.contiguous(in_field_order(stack, factors.ups)))
        mx.eval(down, up)
        return Delta(factors.adapter, down, up, factors.scale)

    def cast(self, array: mx.array, exact: bool = False) -> mx.array:
        """Convert to the dtype that the layer's own numbers are brought to, if they are: see `loading.build`."""
        return array if self.dtype is None else array.astype(mx.float32 if exact else self.dtype)


def _scales(scales: Sequence[float], ranks: Sequence[int]) -> mx.array | float:
    """One number where all factors have the same scale, else each scale repeated over its rank: `[R]`."""
    if len(set(scales)) == 1:
        return scales[0]
    return mx.concatenate([mx.full((rank,), scale) for scale, rank in zip(scales, ranks, strict=True)])


def _blocks(out: int, parts: Sequence[tuple[Rows, mx.array]]) -> mx.array:
    """Join B `[out, R]`: each part's rows at their place in the field, in columns of their own."""
    columns = []
    for rows, up in parts:
        piece = up[rows.start : rows.stop]
        columns.append(mx.pad(piece, [(rows.offset, out - rows.offset - piece.shape[0]), (0, 0)]))
    return mx.concatenate(columns, axis=1)
