"""Falcon: one, some or all heads have keys of their own; one, two or consecutive norms; RoPE or ALiBi.

Source: arXiv:2311.16867, and `transformers.models.falcon`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.cache import Batch, KVCache
from runner.config import Config, key
from runner.errors import ConfigError
from runner.fast import LayerNorm
from runner.models import bloom, gpt_neox, stablelm
from runner.models.llama import HIDDEN, VOCAB, Q
from runner.models.stablelm import LayerNormConfig
from runner.nn import Embedding, Linear
from runner.weights import Choice, Chooses, Header, Size, Tree, weight


@dataclass(frozen=True, kw_only=True)
class FalconConfig(LayerNormConfig):
    """`config.json` of a Falcon."""

    num_key_value_heads: int = key("num_kv_heads", default=0, minimum=0)
    intermediate_size: int = key("ffn_hidden_size", default=0, minimum=0)
    hidden_act: str = key("activation", default="gelu")
    layer_norm_eps: float = key("layer_norm_epsilon", default=1e-5)
    tie_word_embeddings: bool = True
    new_decoder_architecture: bool = False
    multi_query: bool = True
    parallel_attn: bool = True
    bias: bool = False
    alibi: bool = False
    num_ln_in_parallel_attn: int | None = None
    apply_residual_connection_post_layernorm: bool = False

    def __post_init__(self) -> None:
        if self.apply_residual_connection_post_layernorm:
            raise ConfigError("config.json: apply_residual_connection_post_layernorm is not supported for Falcon")
        one = 1 if self.multi_query else self.num_attention_heads
        heads = self.num_key_value_heads or self.num_attention_heads if self.new_decoder_architecture else one
        object.__setattr__(self, "num_key_value_heads", heads)
        object.__setattr__(self, "intermediate_size", self.intermediate_size or 4 * self.hidden_size)
        object.__setattr__(self, "attention_bias", self.bias)
        object.__setattr__(self, "mlp_bias", self.bias)
        super().__post_init__()

    @property
    def qkv_heads(self) -> int:
        """Heads of queries, keys and values together."""
        return self.num_attention_heads + 2 * self.num_key_value_heads

    @property
    def use_parallel_residual(self) -> bool:
        """Of the blocks with two norms."""
        return True

    @property
    def alibi_scale(self) -> float:
        """Distances are added before the scores are scaled."""
        return self.attention_scale

    @property
    def alibi_dtype(self) -> mx.Dtype:
        """The distances that the models were trained with are rounded."""
        return mx.bfloat16

    @property
    def block(self) -> type:
        """How a block is laid out."""
        if not self.parallel_attn and not self.new_decoder_architecture:
            return AlibiBlock if self.alibi else SequentialBlock
        if self.alibi:
            raise ConfigError("config.json: alibi is supported for Falcons without parallel_attn only")
        two = self.new_decoder_architecture and self.num_ln_in_parallel_attn in (None, 2)
        return TwoNormBlock if two else ParallelBlock


@dataclass
class Attention(gpt_neox.Attention):
    """Groups of queries, each with its key and value behind it."""

    qkv_proj: Linear = weight("query_key_value", "qkv_heads*head_dim", HIDDEN, bias="bias")
    o_proj: Linear = weight("dense", HIDDEN, Q, bias="bias")


@dataclass
class AlibiAttention(bloom.Attention):
    """The same, with distances added to the scores."""

    qkv_proj: Linear = weight("query_key_value", "qkv_heads*head_dim", HIDDEN, bias="bias")
    o_proj: Linear = weight("dense", HIDDEN, Q, bias="bias")


@dataclass
class SequentialBlock(stablelm.PreNorm):
    """One sublayer after the other."""

    self_attn: Attention = weight("self_attention")
    mlp: gpt_neox.MLP = weight("mlp")


@dataclass
class AlibiBlock(stablelm.PreNorm):
    """The same with ALiBi."""

    self_attn: AlibiAttention = weight("self_attention")
    mlp: gpt_neox.MLP = weight("mlp")


@dataclass
class ParallelBlock(stablelm.Parallel):
    """Both at once, behind one norm."""

    self_attn: Attention = weight("self_attention")
    mlp: gpt_neox.MLP = weight("mlp")


@dataclass
class TwoNormBlock(gpt_neox.Block):
    """Both at once, each behind its own norm."""

    input_layernorm: LayerNorm = weight("ln_attn", HIDDEN)
    self_attn: Attention = weight("self_attention")
    post_attention_layernorm: LayerNorm = weight("ln_mlp", HIDDEN)


class Block(Chooses):
    """One of those."""

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        raise NotImplementedError

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        assert isinstance(config, FalconConfig)
        return Choice(config.block, {})


@dataclass
class Falcon(stablelm.Decoder):
    """A LayerNorm frame under its own names."""

    embed_tokens: Embedding = weight("transformer.word_embeddings", VOCAB, HIDDEN)
    layers: Sequence[Block] = weight("transformer.h", length="num_hidden_layers")
    norm: LayerNorm = weight("transformer.ln_f", HIDDEN)
    lm_head: Linear = weight("lm_head|transformer.word_embeddings", VOCAB, HIDDEN, otherwise="tie_word_embeddings")
