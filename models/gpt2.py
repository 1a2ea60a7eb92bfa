"""GPT-2: learned positions, LayerNorms, matrices stored `[in, out]`; files with and without the `transformer.` prefix.

Source: Radford et al. 2019, and `transformers.models.gpt2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.cache import Batch
from runner.config import key
from runner.errors import ConfigError
from runner.fast import LayerNorm
from runner.models import llama, stablelm
from runner.models.llama import HIDDEN, INTERMEDIATE, KV, VOCAB, Q
from runner.models.stablelm import LayerNormConfig
from runner.nn import Activation, Embedding, Linear, positions
from runner.transforms import TRANSPOSE
from runner.weights import weight


@dataclass(frozen=True, kw_only=True)
class GPT2Config(LayerNormConfig):
    """`config.json` of a GPT-2."""

    hidden_size: int = key("n_embd", default=768)
    num_hidden_layers: int = key("n_layer", default=12)
    num_attention_heads: int = key("n_head", default=12)
    max_position_embeddings: int = key("n_positions", default=1024)
    intermediate_size: int = key("n_inner", default=0, minimum=0)
    hidden_act: str = key("activation_function", default="gelu_new")
    layer_norm_eps: float = key("layer_norm_epsilon", default=1e-5)
    tie_word_embeddings: bool = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    n_ctx: int | None = None  # n_positions, once more

    def __post_init__(self) -> None:
        object.__setattr__(self, "intermediate_size", self.intermediate_size or 4 * self.hidden_size)
        super().__post_init__()
        if self.n_ctx not in (None, self.max_position_embeddings):
            raise ConfigError(f"config.json: n_ctx {self.n_ctx} is not n_positions {self.max_position_embeddings}")

    @property
    def rotary_dim(self) -> int:
        return 0

    @property
    def attention_scale(self) -> float:
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / ((self.layer_index or 0) + 1) if self.scale_attn_by_inverse_layer_idx else scale


@dataclass
class Attention(llama.Attention):
    """One stored matrix, biases everywhere."""

    qkv_proj: Linear = weight("c_attn", (Q, KV, KV), HIDDEN, bias=True, transform=TRANSPOSE)
    o_proj: Linear = weight("c_proj", HIDDEN, Q, bias=True, transform=TRANSPOSE)


@dataclass
class MLP:
    """Up, activation, down."""

    act: Activation
    c_fc: Linear = weight("c_fc", INTERMEDIATE, HIDDEN, bias=True, transform=TRANSPOSE)
    c_proj: Linear = weight("c_proj", HIDDEN, INTERMEDIATE, bias=True, transform=TRANSPOSE)

    def __call__(self, x: mx.array) -> mx.array:
        return self.c_proj(self.act(self.c_fc(x)))


@dataclass
class Block(stablelm.PreNorm):
    """Under their own names."""

    input_layernorm: LayerNorm = weight("ln_1", HIDDEN)
    self_attn: Attention = weight("attn")
    post_attention_layernorm: LayerNorm = weight("ln_2", HIDDEN)
    mlp: MLP = weight("mlp")


@dataclass
class GPT2(stablelm.Decoder):
    """A LayerNorm frame under its own names, with a table of positions."""

    embed_tokens: Embedding = weight("transformer.wte|wte", VOCAB, HIDDEN)
    embed_positions: Embedding = weight("transformer.wpe|wpe", "max_position_embeddings", HIDDEN)
    layers: Sequence[Block] = weight("transformer.h|h", length="num_hidden_layers")
    norm: LayerNorm = weight("transformer.ln_f|ln_f", HIDDEN)
    lm_head: Linear = weight("lm_head|transformer.wte|wte", VOCAB, HIDDEN, otherwise="tie_word_embeddings")

    def embed(self, batch: Batch) -> mx.array:
        return super().embed(batch) + self.embed_positions(positions(batch))
