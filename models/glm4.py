"""GLM-4-0414: GLM with a norm after each sublayer as well as before it.

Source: `transformers.models.glm4`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.models import glm
from runner.models.glm import GlmConfig as GlmConfig
from runner.nn import blocks
from runner.nn.fast import RMSNorm
from runner.nn.linear import HIDDEN
from runner.weights.tags import weight


@dataclass
class Block(blocks.BothNorms):
    """GLM's attention and MLP, each between two RMSNorms."""

    self_attn: glm.Attention = weight("self_attn")
    attention_norm: RMSNorm = weight("post_self_attn_layernorm", HIDDEN)
    post_attention_layernorm: RMSNorm = weight("post_attention_layernorm", HIDDEN)
    mlp: glm.MLP = weight("mlp")
    mlp_norm: RMSNorm = weight("post_mlp_layernorm", HIDDEN)


@dataclass
class Glm4(blocks.Decoder):
    """The model: embeddings, GLM-4 blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
