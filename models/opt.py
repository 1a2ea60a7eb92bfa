"""OPT and Galactica: learned positions that start at row 2, LayerNorms before the sublayers (350M: after them).

Source: arXiv:2205.01068, and `transformers.models.opt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from runner.cache.kv import KVCache
from runner.config.base import fixed, key
from runner.config.decoder import UnrotatedConfig
from runner.models import llama
from runner.nn.batch import Batch
from runner.nn.blocks import BaseDecoder, ConfiguredBlock, Sequential
from runner.nn.fast import provided_ops
from runner.nn.linear import HIDDEN, INTERMEDIATE, VOCAB, Embedding, Linear, Q
from runner.nn.mlp import PlainMLP
from runner.nn.positions import positions
from runner.ops.table import Ops
from runner.weights.module import Module
from runner.weights.tags import setting, tensor, weight

FIRST = 2  # the table's row for position 0; the rows before it are unused
NARROW = "word_embed_proj_dim"


@dataclass(frozen=True, kw_only=True)
class OPTConfig(UnrotatedConfig):
    """`config.json` of an OPT; defaults are those of `transformers.OPTConfig`."""

    INERT: ClassVar = frozenset(["learned_embeddings"])
    """A key of Galactica's configs; position embeddings are always learned."""

    intermediate_size: int = key("ffn_dim", default=3072)
    hidden_act: str = key("activation_function", default="relu")
    layer_norm_eps: float = fixed(1e-5)
    tie_word_embeddings: bool = True
    do_layer_norm_before: bool = True
    attention_bias: bool = key("enable_bias", default=True)
    layer_norm_elementwise_affine: bool = True
    remove_final_layer_norm: bool = key("_remove_final_layer_norm", default=False)
    word_embed_proj_dim: int = key(default=0, minimum=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "word_embed_proj_dim", self.word_embed_proj_dim or self.hidden_size)
        super().__post_init__()

    @property
    def position_table(self) -> int:
        return self.max_position_embeddings

    @property
    def rows(self) -> int:
        """Rows of the position table."""
        return self.max_position_embeddings + FIRST

    @property
    def normed_at_the_end(self) -> bool:
        """Whether there is a final norm before the head."""
        return self.do_layer_norm_before and not self.remove_final_layer_norm

    @property
    def narrow(self) -> bool:
        """Whether the embeddings have another width than the layers, and are projected to it and back (350M)."""
        return self.word_embed_proj_dim != self.hidden_size

    @property
    def block_class(self) -> type:
        return Block if self.do_layer_norm_before else PostNormBlock


@dataclass
class Norm(Module):
    """A LayerNorm whose weight and bias exist only with `layer_norm_elementwise_affine`."""

    weight: mx.array | None = tensor("weight", HIDDEN, when="layer_norm_elementwise_affine")
    bias: mx.array | None = tensor("bias", HIDDEN, when="layer_norm_elementwise_affine")
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, eps: float) -> mx.array:
        return self.ops.layer_norm(x, self.weight, self.bias, eps)


@dataclass
class Attention(llama.Attention):
    """Llama's attention without rotation; the output projection is stored as `out_proj`."""

    o_proj: Linear = weight("out_proj", HIDDEN, Q, bias="attention_bias")


@dataclass
class MLP(PlainMLP):
    """An MLP without a gate, stored as `fc1` (up) and `fc2` (down); `enable_bias` covers its biases too."""

    up_proj: Linear = weight("fc1", INTERMEDIATE, HIDDEN, bias="attention_bias")
    down_proj: Linear = weight("fc2", HIDDEN, INTERMEDIATE, bias="attention_bias")


@dataclass
class Block(Sequential):
    """Pre-norm block: LayerNorm, sublayer, add; for attention, then for the MLP."""

    input_layernorm: Norm = weight("self_attn_layer_norm")
    self_attn: Attention = weight("self_attn")
    post_attention_layernorm: Norm = weight("final_layer_norm")
    mlp: MLP = weight("")


@dataclass
class PostNormBlock(Block):
    """Post-norm block (350M): sublayer, add, LayerNorm; for attention, then for the MLP."""

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        x = self.input_layernorm(x + self.self_attn(x, batch, cache), self.norm_eps)
        return self.post_attention_layernorm(x + self.mlp(x), self.norm_eps)


@dataclass(kw_only=True)
class OPT(BaseDecoder):
    """The model: token plus position embeddings, blocks, norm, head; in 350M, projections at both ends."""

    embed_tokens: Embedding = weight("model.decoder.embed_tokens|decoder.embed_tokens", VOCAB, NARROW)
    embed_positions: Embedding = weight("model.decoder.embed_positions|decoder.embed_positions", "rows", HIDDEN)
    layers: Sequence[ConfiguredBlock] = weight("model.decoder.layers|decoder.layers", length="num_hidden_layers")
    lm_head: Linear = weight(
        "lm_head||model.decoder.embed_tokens|decoder.embed_tokens", VOCAB, NARROW, otherwise="tie_word_embeddings"
    )
    project_in: Linear | None = weight("model.decoder.project_in|decoder.project_in", HIDDEN, NARROW, when="narrow")
    project_out: Linear | None = weight("model.decoder.project_out|decoder.project_out", NARROW, HIDDEN, when="narrow")
    norm: Norm | None = weight("model.decoder.final_layer_norm|decoder.final_layer_norm", when="normed_at_the_end")
    max_position_embeddings: int = setting()

    def embed(self, batch: Batch) -> mx.array:
        x = super().embed(batch)
        x = x if self.project_in is None else self.project_in(x)
        return x + self.embed_positions(positions(batch, self.max_position_embeddings) + FIRST)

    def logits(self, hidden: mx.array) -> mx.array:
        return super().logits(hidden if self.project_out is None else self.project_out(hidden))
