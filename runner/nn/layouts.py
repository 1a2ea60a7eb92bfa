"""Layers that are stored otherwise than they are computed with, in another order or less one; reading changes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from runner.config.base import Config
from runner.nn.fast import RMSNorm
from runner.nn.linear import Linear, PlainLinear, Quantization
from runner.nn.moe import ExpertLinear, PlainExperts, QuantizedExperts
from runner.weights.tags import Choice, Chooses, Header, tensor
from runner.weights.transforms import IDENTITY, MX_BLOCKS, PLUS_ONE, TRANSPOSE, permute_rows
from runner.weights.tree import Size, Tree, leaves, size_of


class Conv1D(Linear):
    """GPT-2's linear layer, stored `[in, out]`.

    Quantized ones are stored `[out, in]`, since their groups lie along the inputs; so are those with names below
    `model.`, which mlx-lm wrote.
    """

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        # Quantized or not is found as for any linear layer; only the plain form can need a transpose.
        choice = Linear.choose(tree, shape, headers, config)
        turned = choice.cls is PlainLinear and not next(leaves(tree)).name.startswith("model.")
        return Choice(choice.cls, {**choice.scope, "transform": TRANSPOSE if turned else IDENTITY})


class TurnedExperts(ExpertLinear):
    """gpt-oss's experts: floats `[experts, in, out]` or MXFP4 under their own names, or as mlx-lm stores experts."""

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        name, width = next(leaves(tree)).name, shape[-1]
        assert isinstance(width, int)
        # mlx-lm's names: nothing to transpose, nor to de-interleave (it stores gate and up apart).
        if f"{name}.weight" in headers:
            choice = super().choose(tree, shape, headers, config)
            return Choice(choice.cls, {**choice.scope, "transform": IDENTITY})
        # The published MXFP4 checkpoints; what is neither is in floating point.
        if f"{name}_blocks" in headers:
            return Choice(PackedExperts, Quantization(4, 32, "mxfp4").scope(width))
        return Choice(TransposedExperts, {})


@dataclass
class TransposedExperts(PlainExperts):
    """Experts stored as floating-point numbers `[experts, in, out]`."""

    weight: mx.array = tensor("", "$0", "$1", transform=TRANSPOSE)
    bias: mx.array | None = tensor("_bias", "$0", when="bias")


@dataclass
class PackedExperts(QuantizedExperts):
    """Experts in MXFP4: 32 numbers in 16 bytes, and an exponent for each such block; byte for byte MLX's layout."""

    weight: mx.array = tensor("_blocks", "$0", "packed", dtypes=frozenset({"U8"}), transform=MX_BLOCKS)
    scales: mx.array = tensor("_scales", "$0", "groups", dtypes=frozenset({"U8"}))
    bias: mx.array | None = tensor("_bias", "$0", when="bias")


class OffsetNorm(RMSNorm, Chooses):
    """An RMSNorm stored as the difference from one, but in files of mlx-lm, which adds the one.

    mlx-lm turns the convolutions around as well, which is how its files are told.
    """

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        names = (f"model.layers.{index}.linear_attn.conv1d.weight" for index in range(config.num_hidden_layers))
        conv = next((headers[name].shape for name in names if name in headers), ())
        turned = len(conv) == 3 and conv[1] > 1  # [channels, taps, 1] where PyTorch has [channels, 1, taps]
        return Choice(RMSNorm, {"transform": IDENTITY if turned else PLUS_ONE})


class FusedQKV(Linear):
    """One matrix for q, k and v, stored group by group: the query heads that share a key-value head, its key and value.

    With 4 heads in 2 groups the stored rows are q0 q1 k0 v0 q2 q3 k1 v1; reading reorders them to q0 q1 q2 q3 k0 k1 v0
    v1. Rows are outputs, so that quantized matrices, their scales and the biases are reordered in the same way.
    """

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        groups = size_of("num_key_value_heads", config, {})
        queries = config.num_attention_heads // groups
        choice = Linear.choose(tree, shape, headers, config)
        order = permute_rows(f"{groups} groups of {queries}", lambda rows: grouped_rows(rows, groups, queries))
        return Choice(choice.cls, {**choice.scope, "transform": order})


def grouped_rows(rows: int, groups: int, queries: int) -> list[int]:
    """The stored row of each row of q, then k, then v; a group has `queries` query heads, a key and a value."""
    head = rows // (groups * (queries + 2))
    # Heads in stored order are numbered through; `heads` lists those numbers in the order q, k, v.
    heads = [group * (queries + 2) + i for group in range(groups) for i in range(queries)]
    heads += [group * (queries + 2) + queries + part for part in (0, 1) for group in range(groups)]
    return [place * head + i for place in heads for i in range(head)]
