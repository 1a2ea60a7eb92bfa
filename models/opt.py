"""OPT: learned positions that start at 2, LayerNorms before the sublayers (350M: behind them, and narrow embeddings).

Source: arXiv:2205.01068, and `transformers.models.opt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.cache import Batch, KVCache
from runner.config import key
from runner.fast import LayerNorm
from runner.models import llama
from runner.models.llama import HIDDEN, INTERMEDIATE, KV, VOCAB, Q
from runner.models.stablelm import LayerNormConfig
from runner.nn import Activation, Embedding, Linear, positions
from runner.weights import setting, weight

FIRST = 2  # rows of the table before position 0
NARROW = "word_embed_proj_dim"


@dataclass(frozen=True, kw_only=True)
class OPTConfig(LayerNormConfig):
    """`config.json` of an OPT."""

    intermediate_size: int = key("ffn_dim", default=3072)
    hidden_act: str = key("activation_function", default="relu")
    tie_word_embeddings: bool = True
    do_layer_norm_before: bool = True
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    remove_final_layer_norm: bool = key("_remove_final_layer_norm", default=False)
    word_embed_proj_dim: int = key(default=0, minimum=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "word_embed_proj_dim", self.word_embed_proj_dim or self.hidden_size)
        super().__post_init__()

    @property
    def rotary_dim(self) -> int:
        return 0

    @property
    def rows(self) -> int:
        """Of the table of positions."""
        return self.max_position_embeddings + FIRST

    @property
    def narrow(self) -> bool:
        """Whether embeddings are projected to the width of the layers and back."""
        return self.word_embed_proj_dim != self.hidden_size

    @property
    def final_norm(self) -> bool:
        """Whether there is a norm before the head."""
        return self.do_layer_norm_before and not self.remove_final_layer_norm


@dataclass
class Attention(llama.Attention):
    """Biases everywhere."""

    qkv_proj: Linear = weight("{q,k,v}_proj", (Q, KV, KV), HIDDEN, bias="enable_bias")
    o_proj: Linear = weight("out_proj", HIDDEN, Q, bias="enable_bias")


@dataclass
class Block(llama.Layer):
    """Two sublayers, and norms before or behind them."""

    act: Activation
    self_attn: Attention = weight("self_attn")
    self_attn_layer_norm: LayerNorm = weight("self_attn_layer_norm", HIDDEN)
    fc1: Linear = weight("fc1", INTERMEDIATE, HIDDEN, bias="enable_bias")
    fc2: Linear = weight("fc2", HIDDEN, INTERMEDIATE, bias="enable_bias")
    final_layer_norm: LayerNorm = weight("final_layer_norm", HIDDEN)
    do_layer_norm_before: bool = setting()
    norm_eps: float = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        if self.do_layer_norm_before:
            x = x + self.self_attn(self.self_attn_layer_norm(x, self.norm_eps), batch, cache)
            return x + self.feed_forward(self.final_layer_norm(x, self.norm_eps))
        x = self.self_attn_layer_norm(x + self.self_attn(x, batch, cache), self.norm_eps)
        return self.final_layer_norm(x + self.feed_forward(x), self.norm_eps)

    def feed_forward(self, x: mx.array) -> mx.array:
        """Up, activation, down."""
        return self.fc2(self.act(self.fc1(x)))


@dataclass
class OPT:
    """A frame of its own: the norm and the projections at its ends may be missing."""

    embed_tokens: Embedding = weight("model.decoder.embed_tokens|decoder.embed_tokens", VOCAB, NARROW)
    embed_positions: Embedding = weight("model.decoder.embed_positions|decoder.embed_positions", "rows", HIDDEN)
    layers: Sequence[Block] = weight("model.decoder.layers|decoder.layers", length="num_hidden_layers")
    lm_head: Linear = weight(
        "lm_head|model.decoder.embed_tokens|decoder.embed_tokens", VOCAB, NARROW, otherwise="tie_word_embeddings"
    )
    project_in: Linear | None = weight("model.decoder.project_in|decoder.project_in", HIDDEN, NARROW, when="narrow")
    project_out: Linear | None = weight("model.decoder.project_out|decoder.project_out", NARROW, HIDDEN, when="narrow")
    norm: LayerNorm | None = weight(
        "model.decoder.final_layer_norm|decoder.final_layer_norm", HIDDEN, when="final_norm"
    )
    norm_eps: float = setting()

    def __call__(self, batch: Batch, caches: list[KVCache]) -> mx.array:
        """Hidden states `[B, L, word_embed_proj_dim]`."""
        x = self.embed_tokens(batch.ids)
        x = (x if self.project_in is None else self.project_in(x)) + self.embed_positions(positions(batch) + FIRST)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, batch, cache)
        x = x if self.norm is None else self.norm(x, self.norm_eps)
        return x if self.project_out is None else self.project_out(x)

    def logits(self, hidden: mx.array) -> mx.array:
        """`[..., word_embed_proj_dim] -> [..., vocab_size]`."""
        return self.lm_head(hidden)
