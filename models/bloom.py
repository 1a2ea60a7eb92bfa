"""BLOOM: ALiBi instead of RoPE, a LayerNorm after the embeddings, an MLP without a gate; q, k, v stored head by head.

Source: arXiv:2211.05100, ALiBi arXiv:2108.12409, and `transformers.models.bloom`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from runner.cache.kv import KVCache
from runner.cache.several import Memories
from runner.config.base import fixed, key
from runner.config.decoder import UnrotatedConfig
from runner.models import gpt_neox
from runner.nn.batch import Batch
from runner.nn.blocks import BaseDecoder, ConfiguredBlock
from runner.nn.fast import LayerNorm
from runner.nn.linear import HIDDEN, VOCAB, Embedding, Linear
from runner.nn.positions import Alibi
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class BloomConfig(UnrotatedConfig):
    """`config.json` of a BLOOM; defaults are those of `transformers.BloomConfig`."""

    INERT: ClassVar = frozenset(
        ["attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi", "skip_bias_add",
         "skip_bias_add_qkv", "slow_but_exact"]
    )  # fmt: skip
    """Options of the authors' fused kernels: none of them changes the result."""

    hidden_size: int = key(also="n_embed", default=64)
    num_hidden_layers: int = key("n_layer", also="num_hidden_layers", default=2)
    num_attention_heads: int = key("n_head", also="num_attention_heads", default=8)
    max_position_embeddings: int = key("seq_length", default=2048)
    intermediate_size: int = key("n_inner", default=0, minimum=0)
    hidden_act: str = fixed("gelu_pytorch_tanh")
    layer_norm_eps: float = key("layer_norm_epsilon", default=1e-5)
    tie_word_embeddings: bool = True
    apply_residual_connection_post_layernorm: bool = False
    attention_bias: bool = fixed(True)
    mlp_bias: bool = fixed(True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "intermediate_size", self.intermediate_size or 4 * self.hidden_size)
        super().__post_init__()

    @property
    def block_class(self) -> type:
        return NormedResidualBlock if self.apply_residual_connection_post_layernorm else Block


@dataclass
class Block(gpt_neox.Block):
    """GPT-NeoX's sequential block; only the name of the attention differs."""

    self_attn: gpt_neox.Attention = weight("self_attention")


@dataclass
class NormedResidualBlock(Block):
    """A block whose residual branches start from the normalized input instead of the input itself."""

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        x = self.input_layernorm(x, self.norm_eps)
        x = self.post_attention_layernorm(x + self.self_attn(x, batch, cache), self.norm_eps)
        return x + self.mlp(x)


@dataclass
class AlibiDecoder(BaseDecoder):
    """A decoder that puts the ALiBi biases, if the model has them, into the mask that all layers share."""

    alibi: Alibi | None = weight("")

    def run(self, x: mx.array, batch: Batch, caches: Memories) -> mx.array:
        if self.alibi is not None:
            # Keys of this pass: those in the cache, then the new ones.
            parts = zip(batch.parts, caches.each, strict=True)
            batch = batch.with_parts([self.alibi(p, c.offset + p.ids.shape[1], x.dtype) for p, c in parts])
        return super().run(x, batch, caches)


@dataclass
class Bloom(AlibiDecoder):
    """The model: embeddings, their LayerNorm, blocks, norm, head; names with and without the prefix `transformer.`."""

    embed_tokens: Embedding = weight("transformer.word_embeddings|word_embeddings", VOCAB, HIDDEN)
    embed_norm: LayerNorm = weight("transformer.word_embeddings_layernorm|word_embeddings_layernorm", HIDDEN)
    layers: Sequence[ConfiguredBlock] = weight("transformer.h|h", length="num_hidden_layers")
    norm: LayerNorm = weight("transformer.ln_f|ln_f", HIDDEN)
    lm_head: Linear = weight(
        "lm_head||transformer.word_embeddings|word_embeddings", VOCAB, HIDDEN, otherwise="tie_word_embeddings"
    )

    def embed(self, batch: Batch) -> mx.array:
        return self.embed_norm(super().embed(batch), self.norm_eps)
