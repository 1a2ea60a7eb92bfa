"""AFM (Arcee): a Llama whose MLP has no gate and squares what it lets through.

Source: `transformers.models.arcee`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.models import llama
from runner.models.llama import LlamaConfig
from runner.nn import blocks
from runner.nn.mlp import PlainMLP
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class ArceeConfig(LlamaConfig):
    """`config.json` of an AFM."""

    hidden_act: str = "relu2"
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5


@dataclass
class Block(blocks.PreNorm):
    """A Llama block with an MLP without a gate."""

    self_attn: llama.Attention = weight("self_attn")
    mlp: PlainMLP = weight("mlp")


@dataclass
class Arcee(blocks.Decoder):
    """The model: embeddings, AFM blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
