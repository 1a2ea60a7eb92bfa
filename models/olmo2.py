"""OLMo 2 and 3: norms after the sublayers instead of before, QK-norm over all heads together; OLMo 3 adds windows.

Source: arXiv:2501.00656, and `transformers.models.olmo2`, `olmo3`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import mlx.core as mx

from runner.config import layer_types
from runner.config.decoder import WindowedConfig
from runner.models import llama
from runner.models.llama import LlamaConfig
from runner.nn import blocks
from runner.nn.batch import Batch
from runner.nn.fast import RMSNorm
from runner.nn.linear import KV, Q
from runner.weights.tags import setting, weight


@dataclass(frozen=True, kw_only=True)
class Olmo2Config(LlamaConfig):
    """`config.json` of an OLMo 2: Llama's keys with another epsilon."""

    rms_norm_eps: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class Olmo3Config(Olmo2Config, WindowedConfig):
    """`config.json` of an OLMo 3: three of four layers have a sliding window, and those have no RoPE scaling."""

    rope_theta: float = 500000.0
    rope_local_base_freq: float | None = None

    @property
    def usual_layer_types(self) -> Sequence[str]:
        return layer_types.every(4, self.num_hidden_layers)

    def for_layer(self, index: int) -> Self:
        layer = super().for_layer(index)
        if self.cache_window(index) is not None:  # a windowed layer
            object.__setattr__(layer, "rope_scaling", None)
            object.__setattr__(layer, "rope_theta", self.rope_local_base_freq or self.rope_theta)
        return layer


@dataclass
class Attention(llama.Attention):
    """Llama's attention with RMSNorms over all query heads and all key heads together, before RoPE."""

    q_norm: RMSNorm = weight("q_norm", Q)
    k_norm: RMSNorm = weight("k_norm", KV)
    rms_norm_eps: float = setting()

    def heads(self, qkv: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        width = self.num_key_value_heads * self.head_dim  # of k and v; the norms act before heads are split
        q, k, v = mx.split(qkv, [qkv.shape[-1] - 2 * width, qkv.shape[-1] - width], axis=-1)
        normed = [self.q_norm(q, self.rms_norm_eps), self.k_norm(k, self.rms_norm_eps), v]
        return super().heads(mx.concatenate(normed, axis=-1), batch)


@dataclass
class Block(blocks.PostNorm):
    """OLMo 2's attention and Llama's MLP with a norm after each instead of before."""

    self_attn: Attention = weight("self_attn")
    mlp: llama.MLP = weight("mlp")


@dataclass
class Olmo2(blocks.Decoder):
    """The model: embeddings, OLMo 2 blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
