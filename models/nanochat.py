"""nanochat: RMSNorms without weights, one of them on the embeddings, QK-norm after RoPE, and RoPE that turns back.

Source: `transformers.models.nanochat`, and github.com/karpathy/nanochat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.models import llama
from runner.models.llama import LlamaConfig
from runner.nn.batch import Batch
from runner.nn.blocks import BaseDecoder, Sequential
from runner.nn.fast import PlainRMSNorm
from runner.nn.linear import HIDDEN, INTERMEDIATE, Linear
from runner.nn.mlp import PlainMLP
from runner.weights.tags import setting, weight


@dataclass(frozen=True, kw_only=True)
class NanoChatConfig(LlamaConfig):
    """`config.json` of a nanochat."""

    hidden_act: str = "relu2"
    final_logit_softcapping: float | None = 15.0

    @property
    def rope_scale(self) -> float:
        """What positions are multiplied by: RoPE turns the other way."""
        return -1.0


@dataclass
class Attention(llama.Attention):
    """Llama's attention with a weightless RMSNorm on each head's q and k after RoPE."""

    norm: PlainRMSNorm = weight("")
    rms_norm_eps: float = setting()

    def heads(self, qkv: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v = super().heads(qkv, batch)
        return self.norm(q, self.rms_norm_eps), self.norm(k, self.rms_norm_eps), v


@dataclass
class MLP(PlainMLP):
    """An MLP without a gate, stored as `fc1` (up) and `fc2` (down)."""

    up_proj: Linear = weight("fc1", INTERMEDIATE, HIDDEN)
    down_proj: Linear = weight("fc2", HIDDEN, INTERMEDIATE)


@dataclass
class Block(Sequential):
    """A pre-norm block whose norms have no weights."""

    input_layernorm: PlainRMSNorm = weight("")
    self_attn: Attention = weight("self_attn")
    post_attention_layernorm: PlainRMSNorm = weight("")
    mlp: MLP = weight("mlp")


@dataclass
class NanoChat(BaseDecoder):
    """The model: normalized embeddings, nanochat blocks, norm, head with capped logits."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    norm: PlainRMSNorm = weight("")

    def embed(self, batch: Batch) -> mx.array:
        return self.norm(super().embed(batch), self.norm_eps)
