"""GLM-4-0414: GLM with a norm behind each sublayer as well as before it.

Source: `transformers.models.glm4`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.blocks import HIDDEN
from runner.cache import Batch, KVCache
from runner.fast import RMSNorm
from runner.models import glm, llama
from runner.models.glm import GlmConfig as GlmConfig
from runner.weights import weight


@dataclass
class Block(glm.Block):
    """Norm, sublayer, norm, add; twice."""

    post_self_attn_layernorm: RMSNorm = weight("post_self_attn_layernorm", HIDDEN)
    post_mlp_layernorm: RMSNorm = weight("post_mlp_layernorm", HIDDEN)

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        eps = self.rms_norm_eps
        attended = self.post_self_attn_layernorm(self.self_attn(self.input_layernorm(x, eps), batch, cache), eps)
        x, normed = self.post_attention_layernorm.add(x, attended, eps)
        return x + self.post_mlp_layernorm(self.mlp(normed), eps)


@dataclass
class Glm4(llama.Llama):
    """Llama's, with those blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
