"""Adds adapters to the tensors of a model, matrix by matrix when they are read: what `convert` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.adapters.base import Base
from runner.adapters.parts import AllExperts, ExpertFactors, Factors, Parts, SavedRows
from runner.adapters.sites import HEAD, TABLE, Site, Stack, StackLeaf, in_field_order, numbers, stored_dtype
from runner.checkpoint.overlay import Change, Info
from runner.local_files import quoted
from runner.weights.finite import check_rounded
from runner.weights.loading import STORED
from runner.weights.transforms import MX_BLOCKS


def merged(base: Base, parts: Parts, weights: Mapping[str, float]) -> Base:
    """`base` with the adapters added to its tensors.

    A changed matrix keeps its dtype; a quantized one is dequantized to the dtype of its scales. All other tensors stay
    as they are. A head and embeddings that no longer agree become two tensors. Reading a
    changed tensor raises `CheckpointError` where its dtype cannot hold the sum.
    """
    return _Merging(base, parts, weights).result()


@dataclass(frozen=True)
class _Merging:
    """The changes to the tensors of `base` that adapters with these weights make."""

    base: Base
    parts: Parts
    weights: Mapping[str, float]

    def result(self) -> Base:
        """The merged model."""
        changes: dict[str, Change] = {}
        gone: set[str] = set()
        # Factors on head or embeddings alone pull a shared table apart; single token rows are shared by both.
        ends = [name for name, site in self.base.sites.items() if site.group in (HEAD, TABLE)]
        apart = any(self.parts.active(name, self.weights)[0] for name in ends)
        experts = self.experts()
        for name in dict.fromkeys([*self.parts.sites(), *experts]):
            site, (factors, rows) = self.base.sites[name], self.parts.active(name, self.weights)
            both = [*factors, *experts.get(name, ())]
            # A head that still shares the table changes with the table.
            if (both or rows) and (apart or site.leaf == name):
                changes[f"{name}.weight"] = self.matrix(site, both, rows)
        for name, stacked in self.parts.stacked.items():
            stack, active = self.base.stacks[name], [item for item in stacked if self.weights[item.adapter]]
            for leaf in stack.leaves if active else ():
                # gpt-oss's MXFP4 pair of blocks and scales becomes one plain tensor.
                if leaf.name.endswith("_blocks"):
                    plain = leaf.name.removesuffix("_blocks")
                    gone |= {leaf.name, f"{plain}_scales"}
                    changes[plain] = self.stack(stack, leaf, active)
                else:
                    changes[leaf.name] = self.stack(stack, leaf, active)
        return self.base.changed(changes, apart, frozenset(gone))

    def experts(self) -> dict[str, list[ExpertFactors]]:
        """Factors of all experts of a field, split where the checkpoint stores each expert's matrix by itself."""
        found: dict[str, list[ExpertFactors]] = {}
        for name, stacked in self.parts.stacked.items():
            for factors in stacked:
                if self.weights[factors.adapter]:
                    for expert, matrix in enumerate(self.base.stacks[name].pieces):
                        for part in matrix:
                            rows = ExpertFactors(factors, expert, part.offset, part.offset + part.total)
                            found.setdefault(part.leaf, []).append(rows)
        return found

    def matrix(self, site: Site, factors: Sequence[Factors | ExpertFactors], rows: Sequence[SavedRows]) -> Change:
        """The change that adds factors to a matrix and replaces rows of it."""
        source = self.base.source

        def read() -> mx.array:
            # Sums are made in float32 and rounded once; token rows replace whatever was added to them.
            stored = numbers(source, site.leaf, site.form)
            matrix = (stored.T if site.transposed else stored).astype(mx.float32)
            for item in factors:
                scale = item.scale * self.weights[item.adapter]
                matrix = matrix + scale * (item.up().astype(mx.float32) @ item.down().astype(mx.float32))
                lengths = item.lengths()
                if lengths is not None:
                    matrix = matrix * (lengths.astype(mx.float32) / mx.linalg.norm(matrix, axis=1))[:, None]
            for saved in rows:
                matrix[mx.array(saved.tokens)] = saved.read().astype(mx.float32)
            return _rounded(site.leaf, matrix.T if site.transposed else matrix, stored.dtype)

        return Change(Info(stored_dtype(source, site.leaf), site.shape[::-1] if site.transposed else site.shape), read)

    def stack(self, stack: Stack, leaf: StackLeaf, factors: Sequence[AllExperts]) -> Change:
        """The change that adds factors to one tensor of all experts.

        Published tensors (gpt-oss) have transformers' row order and are `[E, in, out]`; those that mlx-lm wrote
        (`.weight`) have the field's order and are `[E, out, in]`.
        """
        # Only a float dtype can hold the sum: bytes of a quantized tensor become bfloat16.
        source = self.base.source
        written = leaf.name.endswith(".weight")
        experts, _, width = stack.shape
        dtype = stored_dtype(source, leaf.name.removesuffix(".weight")) if written else source.headers[leaf.name].dtype
        dtype = dtype if dtype in STORED else "BF16"

        def read() -> mx.array:
            if written:
                matrix = numbers(source, leaf.name.removesuffix(".weight"), stack.form)
            elif leaf.name.endswith("_blocks"):
                words = MX_BLOCKS.apply(source.read(leaf.name))
                scales = source.read(f"{leaf.name.removesuffix('_blocks')}_scales")
                matrix = mx.dequantize(words, scales, None, group_size=32, bits=4, mode="mxfp4")
            else:
                matrix = source.read(leaf.name).swapaxes(-1, -2)
            # This tensor has a range of each expert's rows.
            matrix = matrix.astype(mx.float32)
            for item in factors:
                ups = in_field_order(stack, item.ups) if written else item.ups
                ups = ups[:, leaf.offset : leaf.offset + leaf.rows].astype(mx.float32)
                matrix = matrix + (item.scale * self.weights[item.adapter]) * (ups @ item.downs.astype(mx.float32))
            return _rounded(leaf.name, matrix if written else matrix.swapaxes(-1, -2), STORED[dtype])

        shape = (experts, leaf.rows, width) if written else (experts, width, leaf.rows)
        return Change(Info(dtype, shape), read)


def _rounded(name: str, matrix: mx.array, dtype: mx.Dtype) -> mx.array:
    """A sum in the dtype of its base; raises `CheckpointError` where that cannot hold it."""
    result = mx.contiguous(matrix).astype(dtype)
    check_rounded(f"{quoted(name)} with its adapters", matrix, result)
    return result
