"""Qwen 3.5: three Gated DeltaNet layers to each layer of attention, whose output a gate beside the queries scales.

Source: `transformers.models.qwen3_5`. All norms but the gated one are stored as the difference from one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import mlx.core as mx

from runner.cache.kv import KVCache
from runner.config.rope_keys import plain_positions
from runner.models import llama, qwen3
from runner.nn import blocks, delta_rule
from runner.nn.attention import merge_heads, split_heads
from runner.nn.batch import Batch
from runner.nn.delta_rule import CHANNELS, HEADS, VALUES, DeltaNetConfig, Projected
from runner.nn.fast import provided_ops
from runner.nn.layouts import OffsetNorm
from runner.nn.linear import HIDDEN, KV, Linear
from runner.ops.table import Ops
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class Qwen35Config(DeltaNetConfig):
    """`config.json` of a Qwen3.5's text model; the `mtp_*` keys are about multi-token prediction, which is not used."""

    INERT: ClassVar[frozenset[str]] = frozenset({"mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"})
    ONLY: ClassVar[Mapping[str, object]] = {"attn_output_gate": True, "mamba_ssm_dtype": "float32"}
    NULL: ClassVar[Mapping[str, object]] = {**DeltaNetConfig.NULL, "partial_rotary_factor": 1.0}
    num_key_value_heads: int = 4
    head_dim: int = 256
    max_position_embeddings: int = 32768
    partial_rotary_factor: float = 0.25

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        given = {name: raw[name] for name in ("rope_scaling", "rope_parameters") if name in raw}
        return super().from_dict({**raw, **{name: plain_positions(value) for name, value in given.items()}})

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def attention_class(self) -> type:
        return Attention if self.attends else GatedDeltaNet

    @property
    def mlp_class(self) -> type:
        return llama.MLP

    def ignores(self, name: str) -> bool:
        return name.startswith("mtp.")  # the layers for multi-token prediction


@dataclass
class Attention(qwen3.Attention):
    """Qwen 3's attention times the sigmoid of a gate; a head's rows of `q_proj` are its query, then its gate."""

    qkv_proj: Linear = weight("{q,k,v}_proj", ("2*num_attention_heads*head_dim", KV, KV), HIDDEN, bias="attention_bias")
    q_norm: OffsetNorm = weight("q_norm", "head_dim")
    k_norm: OffsetNorm = weight("k_norm", "head_dim")
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        heads, size = self.num_attention_heads, self.head_dim
        gated, k, v = mx.split(
            self.qkv_proj(x), [2 * heads * size, (2 * heads + self.num_key_value_heads) * size], axis=-1
        )
        q, gate = mx.split(split_heads(gated, 2 * size), 2, axis=-1)
        q, k, v = self.normed(q, split_heads(k, size), split_heads(v, size), batch)
        return self.o_proj(merge_heads(self.ops.gate(self.attend(q, cache.append(k, v), batch), gate)))


@dataclass
class GatedDeltaNet(delta_rule.GatedDeltaNet):
    """The layer with one matrix for queries, keys and values, and one for each gate; they are multiplied as one."""

    in_proj: Linear = weight("in_proj_{qkv,z,b,a}", (CHANNELS, VALUES, HEADS, HEADS), HIDDEN)

    def project(self, x: mx.array) -> Projected:
        z = self.linear_channels
        b = z + self.linear_num_value_heads * self.linear_value_head_dim
        return Projected(*mx.split(self.in_proj(x), [z, b, b + self.linear_num_value_heads], axis=-1))


@dataclass
class Block(blocks.ConfiguredPreNorm):
    """The block with norms stored as the difference from one."""

    input_layernorm: OffsetNorm = weight("input_layernorm", HIDDEN)
    post_attention_layernorm: OffsetNorm = weight("post_attention_layernorm", HIDDEN)


@dataclass
class Qwen35(blocks.Decoder):
    """The model: embeddings, blocks of two kinds, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    norm: OffsetNorm = weight("model.norm", HIDDEN)
