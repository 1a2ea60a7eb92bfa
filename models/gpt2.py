"""GPT-2: learned positions, LayerNorms, an MLP without a gate, and matrices stored `[in, out]`.

Source: Radford et al. 2019, and `transformers.models.gpt2`. Tensor names start with `transformer.`, with nothing, or
(in files that mlx-lm wrote) with `model.`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from runner.config.base import key
from runner.config.decoder import UnrotatedConfig
from runner.models import llama
from runner.nn.batch import Batch
from runner.nn.blocks import LayerNormDecoder, Sequential
from runner.nn.fast import LayerNorm
from runner.nn.layouts import Conv1D
from runner.nn.linear import HIDDEN, INTERMEDIATE, KV, VOCAB, Embedding, Linear, Q
from runner.nn.mlp import PlainMLP
from runner.nn.positions import positions
from runner.weights.tags import setting, weight


@dataclass(frozen=True, kw_only=True)
class GPT2Config(UnrotatedConfig):
    """`config.json` of a GPT-2; defaults are those of `transformers.GPT2Config`."""

    INERT: ClassVar = frozenset(["n_ctx", "reorder_and_upcast_attn"])
    """`n_positions` sizes the position table, not `n_ctx`; scores are summed in float32 either way."""

    hidden_size: int = key("n_embd", also="hidden_size", default=768)
    num_hidden_layers: int = key("n_layer", also="num_hidden_layers", default=12)
    num_attention_heads: int = key("n_head", also="num_attention_heads", default=12)
    max_position_embeddings: int = key("n_positions", also="max_position_embeddings", default=1024)
    intermediate_size: int = key("n_inner", default=0, minimum=0)
    hidden_act: str = key("activation_function", default="gelu_new")
    layer_norm_eps: float = key("layer_norm_epsilon", default=1e-5)
    tie_word_embeddings: bool = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "intermediate_size", self.intermediate_size or 4 * self.hidden_size)
        super().__post_init__()

    @property
    def position_table(self) -> int:
        return self.max_position_embeddings

    @property
    def attention_scale(self) -> float:
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / ((self.layer_index or 0) + 1) if self.scale_attn_by_inverse_layer_idx else scale


@dataclass
class Attention(llama.Attention):
    """Llama's attention without rotation; q, k and v are stored as one matrix, `c_attn`, with biases."""

    qkv_proj: Conv1D = weight("c_attn", (Q, KV, KV), HIDDEN, bias=True)
    o_proj: Conv1D = weight("c_proj", HIDDEN, Q, bias=True)


@dataclass
class MLP(PlainMLP):
    """An MLP without a gate, stored as `c_fc` (up) and `c_proj` (down)."""

    up_proj: Conv1D = weight("c_fc", INTERMEDIATE, HIDDEN, bias=True)
    down_proj: Conv1D = weight("c_proj", HIDDEN, INTERMEDIATE, bias=True)


@dataclass
class NormedBlock(Sequential):
    """Pre-norm block with LayerNorms, stored as `ln_1` and `ln_2`."""

    input_layernorm: LayerNorm = weight("ln_1", HIDDEN)
    post_attention_layernorm: LayerNorm = weight("ln_2", HIDDEN)


@dataclass
class Block(NormedBlock):
    """The pre-norm block with GPT-2's attention and MLP, stored as `attn` and `mlp`."""

    self_attn: Attention = weight("attn")
    mlp: MLP = weight("mlp")


@dataclass
class PositionedDecoder(LayerNormDecoder):
    """A decoder with token plus position embeddings, blocks, norm and head, under GPT-2's names."""

    embed_tokens: Embedding = weight("transformer.wte|wte|model.wte", VOCAB, HIDDEN)
    embed_positions: Embedding = weight("transformer.wpe|wpe|model.wpe", "max_position_embeddings", HIDDEN)
    norm: LayerNorm = weight("transformer.ln_f|ln_f|model.ln_f", HIDDEN)
    lm_head: Linear = weight("lm_head||transformer.wte|wte|model.wte", VOCAB, HIDDEN, otherwise="tie_word_embeddings")
    max_position_embeddings: int = setting()

    def embed(self, batch: Batch) -> mx.array:
        return super().embed(batch) + self.embed_positions(positions(batch, self.max_position_embeddings))


@dataclass
class GPT2(PositionedDecoder):
    """The model: token plus position embeddings, GPT-2 blocks, norm, head."""

    layers: Sequence[Block] = weight("transformer.h|h|model.h", length="num_hidden_layers")
