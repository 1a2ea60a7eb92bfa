"""Youtu-LLM: DeepSeek's latent attention in a dense model with tied embeddings.

Source: `transformers.models.youtu`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from runner.config.base import fixed
from runner.models import llama
from runner.nn import blocks
from runner.nn.mla import LatentAttention, LatentConfig
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class YoutuConfig(LatentConfig):
    """`config.json` of a Youtu-LLM."""

    NULL: ClassVar[Mapping[str, object]] = {**LatentConfig.NULL, "rope_interleave": False}
    INERT: ClassVar[frozenset[str]] = frozenset({"embedding_initializer_range"})
    max_position_embeddings: int = 131072
    tie_word_embeddings: bool = True
    mlp_bias: bool = fixed(False)
    rope_interleave: bool = True

    @property
    def traditional(self) -> bool:
        return self.rope_interleave


@dataclass
class Block(blocks.PreNorm):
    """A Llama block with latent attention."""

    self_attn: LatentAttention = weight("self_attn")
    mlp: llama.MLP = weight("mlp")


@dataclass
class Youtu(blocks.Decoder):
    """The model: embeddings, Youtu blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
