"""Falcon: multi-query, grouped or multi-head attention, in sequence with or parallel to the MLP; RoPE or ALiBi.

Source: arXiv:2311.16867, and `transformers.models.falcon`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from runner.config.base import fixed, key
from runner.config.decoder import LayerNormConfig
from runner.errors import ConfigError
from runner.models import bloom, gpt_neox
from runner.nn.blocks import ConfiguredBlock, Parallel
from runner.nn.fast import LayerNorm
from runner.nn.linear import HIDDEN, VOCAB, Embedding, Linear
from runner.nn.positions import Alibi
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class FalconConfig(LayerNormConfig):
    """`config.json` of a Falcon; defaults are those of `transformers.FalconConfig`."""

    INERT: ClassVar = frozenset(["ff_factor"])
    """Redundant: `ffn_hidden_size` / `hidden_size`."""

    hidden_size: int = key(also="n_embed", default=4544)
    num_key_value_heads: int = key("num_kv_heads", default=0, minimum=0)
    intermediate_size: int = key("ffn_hidden_size", default=0, minimum=0)
    hidden_act: str = key("activation", default="gelu")
    layer_norm_eps: float = key("layer_norm_epsilon", default=1e-5)
    partial_rotary_factor: float = fixed(1.0)
    attention_bias: bool = key("bias", default=False)
    tie_word_embeddings: bool = True
    new_decoder_architecture: bool = False
    multi_query: bool = True
    parallel_attn: bool = True
    alibi: bool = False
    num_ln_in_parallel_attn: int | None = None
    apply_residual_connection_post_layernorm: bool = False

    def __post_init__(self) -> None:
        old = not self.new_decoder_architecture
        refused = {
            "apply_residual_connection_post_layernorm": self.apply_residual_connection_post_layernorm,
            "new_decoder_architecture without parallel_attn": not (old or self.parallel_attn),
            "num_ln_in_parallel_attn = 2 without new_decoder_architecture": old and self.two_norms,
        }
        for name in [name for name, found in refused.items() if found]:
            raise ConfigError(f"config.json: {name} is not supported for Falcon")
        # The old architecture ignores `num_kv_heads`: one key-value head, or one for each query head.
        one = 1 if self.multi_query else self.num_attention_heads
        heads = self.num_key_value_heads or self.num_attention_heads if self.new_decoder_architecture else one
        object.__setattr__(self, "num_key_value_heads", heads)
        object.__setattr__(self, "intermediate_size", self.intermediate_size or 4 * self.hidden_size)
        object.__setattr__(self, "mlp_bias", self.attention_bias)
        super().__post_init__()

    @property
    def two_norms(self) -> bool:
        """Whether the parallel sublayers have a norm each; otherwise they share one."""
        return (self.num_ln_in_parallel_attn or (2 if self.new_decoder_architecture else 1)) == 2

    @property
    def block_class(self) -> type:
        return TwoNormBlock if self.two_norms else ParallelBlock if self.parallel_attn else Block

    @property
    def rotary_dim(self) -> int:
        return 0 if self.alibi else self.head_dim

    @property
    def alibi_scale(self) -> float:
        """Factor of the ALiBi biases: Falcon adds them before it scales the scores."""
        return self.attention_scale

    @property
    def alibi_dtype(self) -> mx.Dtype:
        """Dtype that the ALiBi biases are rounded to, as in training."""
        return mx.bfloat16


@dataclass
class Block(gpt_neox.Block):
    """GPT-NeoX's sequential block; only the name of the attention differs."""

    self_attn: gpt_neox.Attention = weight("self_attention")


@dataclass
class ParallelBlock(Parallel):
    """Attention and MLP in parallel, behind one LayerNorm."""

    input_layernorm: LayerNorm = weight("input_layernorm", HIDDEN)
    self_attn: gpt_neox.Attention = weight("self_attention")
    mlp: gpt_neox.MLP = weight("mlp")


@dataclass
class TwoNormBlock(gpt_neox.ParallelBlock):
    """Attention and MLP in parallel, each behind its own LayerNorm."""

    input_layernorm: LayerNorm = weight("ln_attn", HIDDEN)
    self_attn: gpt_neox.Attention = weight("self_attention")
    post_attention_layernorm: LayerNorm = weight("ln_mlp", HIDDEN)


@dataclass
class Falcon(bloom.AlibiDecoder):
    """The model: embeddings, blocks of the variant that the config names, LayerNorm, head; ALiBi with `alibi`."""

    alibi: Alibi | None = weight("", when="alibi")
    embed_tokens: Embedding = weight("transformer.word_embeddings", VOCAB, HIDDEN)
    layers: Sequence[ConfiguredBlock] = weight("transformer.h", length="num_hidden_layers")
    norm: LayerNorm = weight("transformer.ln_f", HIDDEN)
    lm_head: Linear = weight("lm_head||transformer.word_embeddings", VOCAB, HIDDEN, otherwise="tie_word_embeddings")
