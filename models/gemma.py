"""Gemma: norms stored as the difference from one, embeddings scaled by sqrt(hidden_size), GELU in its tanh form.

Source: arXiv:2403.08295, and `transformers.models.gemma`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.models import llama
from runner.models.llama import LlamaConfig
from runner.nn import blocks
from runner.nn.batch import Batch
from runner.nn.fast import RMSNorm
from runner.nn.linear import HIDDEN
from runner.weights.tags import setting, weight
from runner.weights.transforms import PLUS_ONE


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(LlamaConfig):
    """`config.json` of a Gemma; `hidden_activation`, if set, overrides `hidden_act`."""

    num_key_value_heads: int = 16
    head_dim: int = 256
    max_position_embeddings: int = 8192
    hidden_act: str = "gelu_pytorch_tanh"
    hidden_activation: str | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_act", self.activation)  # before the parent checks it
        super().__post_init__()

    @property
    def activation(self) -> str:
        """The activation of the MLP: `hidden_activation` if set, else `hidden_act`; "gelu" means the tanh form."""
        named = self.hidden_activation or self.hidden_act
        return "gelu_pytorch_tanh" if named == "gelu" else named


@dataclass
class Block(llama.Block):
    """A Llama block whose norms add one to the stored weight."""

    input_layernorm: RMSNorm = weight("input_layernorm", HIDDEN, transform=PLUS_ONE)
    post_attention_layernorm: RMSNorm = weight("post_attention_layernorm", HIDDEN, transform=PLUS_ONE)


@dataclass
class Decoder(blocks.Decoder):
    """The decoder of all Gemmas: scaled embeddings, and a final norm that adds one to the stored weight."""

    norm: RMSNorm = weight("model.norm", HIDDEN, transform=PLUS_ONE)
    hidden_size: int = setting()

    def embed(self, batch: Batch) -> mx.array:
        x = super().embed(batch)
        return x * mx.array(self.hidden_size**0.5, dtype=x.dtype)  # the root is rounded to x's dtype first


@dataclass
class Gemma(Decoder):
    """The model: scaled embeddings, Gemma blocks, norm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
