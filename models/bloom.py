"""BLOOM: ALiBi instead of positions, a norm behind the embeddings; q, k and v of a head lie together.

Source: arXiv:2211.05100, ALiBi arXiv:2108.12409, and `transformers.models.bloom`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.cache import Batch, KVCache
from runner.config import key
from runner.fast import LayerNorm
from runner.models import gpt_neox, stablelm
from runner.models.llama import HIDDEN, VOCAB
from runner.models.stablelm import LayerNormConfig
from runner.nn import Alibi, Embedding, Linear, interleaved_heads, merge_heads
from runner.weights import setting, weight


@dataclass(frozen=True, kw_only=True)
class BloomConfig(LayerNormConfig):
    """`config.json` of a BLOOM; the last keys are about the authors' own kernels."""

    num_hidden_layers: int = key("n_layer", default=2)
    num_attention_heads: int = key("n_head", default=8)
    max_position_embeddings: int = key("seq_length", default=2048)
    intermediate_size: int = key("n_inner", default=0, minimum=0)
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = key("layer_norm_epsilon", default=1e-5)
    tie_word_embeddings: bool = True
    apply_residual_connection_post_layernorm: bool = False
    attention_softmax_in_fp32: bool = True
    bias_dropout_fusion: bool = True
    masked_softmax_fusion: bool = True
    skip_bias_add: bool = True
    skip_bias_add_qkv: bool = False
    slow_but_exact: bool = False
    offset_alibi: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "intermediate_size", self.intermediate_size or 4 * self.hidden_size)
        object.__setattr__(self, "attention_bias", True)
        object.__setattr__(self, "mlp_bias", True)
        super().__post_init__()


@dataclass
class Attention(gpt_neox.Attention):
    """NeoX's, with distances added to the scores."""

    alibi: Alibi = weight("")

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        q, k, v = interleaved_heads(self.qkv_proj(x), self.num_key_value_heads, self.head_dim)
        history = cache.append(k, v)
        return self.o_proj(merge_heads(self.attend(q, history, self.alibi(q, history.length))))


@dataclass
class Block(stablelm.PreNorm):
    """What is added to may be the norm's output."""

    self_attn: Attention = weight("self_attention")
    mlp: gpt_neox.MLP = weight("mlp")
    apply_residual_connection_post_layernorm: bool = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        post = self.apply_residual_connection_post_layernorm
        normed = self.input_layernorm(x, self.norm_eps)
        x = (normed if post else x) + self.self_attn(normed, batch, cache)
        normed = self.post_attention_layernorm(x, self.norm_eps)
        return (normed if post else x) + self.mlp(normed)


@dataclass
class Bloom(stablelm.Decoder):
    """A LayerNorm frame under its own names."""

    embed_tokens: Embedding = weight("transformer.word_embeddings|word_embeddings", VOCAB, HIDDEN)
    embed_norm: LayerNorm = weight("transformer.word_embeddings_layernorm|word_embeddings_layernorm", HIDDEN)
    layers: Sequence[Block] = weight("transformer.h|h", length="num_hidden_layers")
    norm: LayerNorm = weight("transformer.ln_f|ln_f", HIDDEN)
    lm_head: Linear = weight(
        "lm_head|transformer.word_embeddings|word_embeddings", VOCAB, HIDDEN, otherwise="tie_word_embeddings"
    )

    def embed(self, batch: Batch) -> mx.array:
        return self.embed_norm(super().embed(batch), self.norm_eps)
