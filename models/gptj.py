"""GPT-J: attention and MLP in parallel behind one LayerNorm, and RoPE on neighbouring pairs of part of each head.

Source: `transformers.models.gptj`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from runner.config.base import fixed, key
from runner.config.decoder import LayerNormConfig
from runner.config.rope import RopeScaling
from runner.errors import ConfigError
from runner.models import llama
from runner.nn.blocks import LayerNormDecoder, Parallel
from runner.nn.fast import LayerNorm
from runner.nn.linear import HIDDEN, INTERMEDIATE, VOCAB, Embedding, Linear, Q
from runner.nn.mlp import PlainMLP
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class GPTJConfig(LayerNormConfig):
    """`config.json` of a GPT-J."""

    hidden_size: int = key("n_embd", also="hidden_size", default=4096)
    num_hidden_layers: int = key("n_layer", also="num_hidden_layers", default=28)
    num_attention_heads: int = key("n_head", also="num_attention_heads", default=16)
    num_key_value_heads: int = fixed(0)
    head_dim: int = fixed(0)
    max_position_embeddings: int = key("n_positions", also="max_position_embeddings", default=2048)
    intermediate_size: int = key("n_inner", default=0, minimum=0)
    hidden_act: str = key("activation_function", default="gelu_new")
    layer_norm_eps: float = key("layer_norm_epsilon", default=1e-5)
    rope_theta: float = fixed(10000.0)
    rope_scaling: RopeScaling | None = field(init=False, default=None)
    partial_rotary_factor: float = fixed(1.0)
    traditional: bool = fixed(True)
    rotated: int = key("rotary_dim", default=64)

    def __post_init__(self) -> None:
        object.__setattr__(self, "intermediate_size", self.intermediate_size or 4 * self.hidden_size)
        super().__post_init__()
        if self.rotated > self.head_dim:
            raise ConfigError(f"config.json: rotary_dim {self.rotated} is more than a head's {self.head_dim} numbers")
        if self.tie_word_embeddings:
            raise ConfigError("config.json: tie_word_embeddings is not supported for GPT-J, whose head has a bias")

    @property
    def rotary_dim(self) -> int:
        return self.rotated


@dataclass
class Attention(llama.Attention):
    """Llama's attention without biases; the output projection has another name."""

    o_proj: Linear = weight("out_proj", HIDDEN, Q)


@dataclass
class MLP(PlainMLP):
    """An MLP without a gate, stored as `fc_in` (up) and `fc_out` (down)."""

    up_proj: Linear = weight("fc_in", INTERMEDIATE, HIDDEN, bias=True)
    down_proj: Linear = weight("fc_out", HIDDEN, INTERMEDIATE, bias=True)


@dataclass
class Block(Parallel):
    """Attention and MLP in parallel, behind one LayerNorm."""

    input_layernorm: LayerNorm = weight("ln_1", HIDDEN)
    self_attn: Attention = weight("attn")
    mlp: MLP = weight("mlp")


@dataclass
class GPTJ(LayerNormDecoder):
    """The model: embeddings, parallel blocks, LayerNorm, and a head with a bias."""

    embed_tokens: Embedding = weight("transformer.wte|model.wte", VOCAB, HIDDEN)
    layers: Sequence[Block] = weight("transformer.h|model.h", length="num_hidden_layers")
    norm: LayerNorm = weight("transformer.ln_f|model.ln_f", HIDDEN)
    lm_head: Linear = weight("lm_head", VOCAB, HIDDEN, bias=True)
