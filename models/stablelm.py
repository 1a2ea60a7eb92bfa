"""StableLM 2 and 3B: LayerNorms, RoPE on a quarter of each head, and in some checkpoints attention and MLP in parallel.

Source: arXiv:2402.17834, and `transformers.models.stablelm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.config.base import key
from runner.config.decoder import LayerNormConfig
from runner.models import llama
from runner.nn.attention import JoinedHeadNorms
from runner.nn.blocks import ConfiguredBlock, LayerNormDecoder, Parallel, Sequential
from runner.nn.fast import LayerNorm
from runner.nn.linear import HIDDEN, Linear, Q
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class StableLmConfig(LayerNormConfig):
    """`config.json` of a StableLM; defaults are those of `transformers.StableLmConfig`."""

    max_position_embeddings: int = 4096
    num_key_value_heads: int = 32
    partial_rotary_factor: float = 0.25
    attention_bias: bool = key("use_qkv_bias", default=False)
    qk_layernorm: bool = False
    use_parallel_residual: bool = False

    @property
    def block_class(self) -> type:
        return ParallelBlock if self.use_parallel_residual else Block


@dataclass
class Attention(llama.NormedAttention):
    """Llama's attention with optional biases on q, k, v only; `qk_layernorm` gives each head's q and k its own norm."""

    o_proj: Linear = weight("o_proj", HIDDEN, Q)
    q_norm: JoinedHeadNorms | None = weight("q_layernorm.norms.{num_attention_heads}", "head_dim", when="qk_layernorm")
    k_norm: JoinedHeadNorms | None = weight("k_layernorm.norms.{num_key_value_heads}", "head_dim", when="qk_layernorm")


@dataclass
class Block(Sequential):
    """A Llama block with LayerNorms instead of RMSNorms."""

    input_layernorm: LayerNorm = weight("input_layernorm", HIDDEN)
    self_attn: Attention = weight("self_attn")
    post_attention_layernorm: LayerNorm = weight("post_attention_layernorm", HIDDEN)
    mlp: llama.MLP = weight("mlp")


@dataclass
class ParallelBlock(Parallel):
    """Attention and MLP in parallel, behind one LayerNorm (`use_parallel_residual`)."""

    input_layernorm: LayerNorm = weight("input_layernorm", HIDDEN)
    self_attn: Attention = weight("self_attn")
    mlp: llama.MLP = weight("mlp")


@dataclass
class StableLm(LayerNormDecoder):
    """The model: embeddings, blocks of the variant that `use_parallel_residual` names, LayerNorm, head."""

    layers: Sequence[ConfiguredBlock] = weight("model.layers", length="num_hidden_layers")
