"""Matrices that checkpoints store in another order than layers multiply them; they are put in order when read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from runner.config.base import Config
from runner.nn.linear import Linear, PlainLinear, Quantization
from runner.nn.moe import ExpertLinear, PlainExperts, QuantizedExperts
from runner.weights.tags import Choice, Header, tensor
from runner.weights.transforms import IDENTITY, MX_BLOCKS, TRANSPOSE, permute_rows
from runner.weights.tree import Size, Tree, leaves, size_of


class Conv1D(Linear):
    """GPT-2's linear layer, stored `[in, out]`.

    Packed ones are `[out, in]`, whose groups lie along the inputs; so are those below `model.`, which mlx-lm wrote.
    """

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        choice = Linear.choose(tree, shape, headers, config)
        turned = choice.cls is PlainLinear and not next(leaves(tree)).name.startswith("model.")
        return Choice(choice.cls, {**choice.scope, "transform": TRANSPOSE if turned else IDENTITY})


class TurnedExperts(ExpertLinear):
    """gpt-oss's experts: `[experts, in, out]`, or MXFP4 with names of its own; or as mlx-lm names and orders them."""

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        name, width = next(leaves(tree)).name, shape[-1]
        assert isinstance(width, int)
        if f"{name}.weight" in headers:
            choice = super().choose(tree, shape, headers, config)
            return Choice(choice.cls, {**choice.scope, "transform": IDENTITY})
        if f"{name}_blocks" in headers:
            return Choice(PackedExperts, Quantization(4, 32, "mxfp4").scope(width))
        return Choice(TransposedExperts, {})


@dataclass
class TransposedExperts(PlainExperts):
    """Numbers `[experts, in, out]`."""

    weight: mx.array = tensor("", "$0", "$1", transform=TRANSPOSE)
    bias: mx.array | None = tensor("_bias", "$0", when="bias")


@dataclass
class PackedExperts(QuantizedExperts):
    """MXFP4: blocks of 32 numbers in 16 bytes, and an exponent for each; MLX's layout, byte for byte."""

    weight: mx.array = tensor("_blocks", "$0", "packed", dtypes=frozenset({"U8"}), transform=MX_BLOCKS)
    scales: mx.array = tensor("_scales", "$0", "groups", dtypes=frozenset({"U8"}))
    bias: mx.array | None = tensor("_bias", "$0", when="bias")


class FusedQKV(Linear):
    """One matrix for q, k and v, stored group by group: queries that share a key and value, then those two.

    With 4 heads in 2 groups the rows are those of q0 q1 k0 v0 q2 q3 k1 v1; read, they are q0 q1 q2 q3 k0 k1 v0 v1. Rows
    are outputs: packed matrices, their scales and the biases move in the same way.
    """

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        groups = size_of("num_key_value_heads", config, {})
        queries = config.num_attention_heads // groups
        choice = Linear.choose(tree, shape, headers, config)
        order = permute_rows(f"{groups} groups of {queries}", lambda rows: grouped_rows(rows, groups, queries))
        return Choice(choice.cls, {**choice.scope, "transform": order})


def grouped_rows(rows: int, groups: int, queries: int) -> list[int]:
    """Where each row of q, then k, then v is stored, with `queries` heads, a key and a value in each group."""
    head = rows // (groups * (queries + 2))
    heads = [group * (queries + 2) + i for group in range(groups) for i in range(queries)]
    heads += [group * (queries + 2) + queries + part for part in (0, 1) for group in range(groups)]
    return [place * head + i for place in heads for i in range(head)]
