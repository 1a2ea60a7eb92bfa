"""StableLM 2 and 3B: LayerNorms, a quarter of each head rotated, and in some checkpoints both sublayers side by side.

Source: arXiv:2402.17834, and `transformers.models.stablelm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.blocks import HIDDEN, ConfiguredBlock, LayerNormDecoder, Parallel, Q, Sequential
from runner.config import fixed, key
from runner.fast import LayerNorm
from runner.models import llama
from runner.models.llama import LlamaConfig
from runner.nn import JoinedHeadNorms, Linear
from runner.weights import weight


@dataclass(frozen=True, kw_only=True)
class LayerNormConfig(LlamaConfig):
    """What families with LayerNorms share; the keys that only some of them have are theirs to declare."""

    rms_norm_eps: float = fixed(0.0)
    attention_bias: bool = fixed(False)
    mlp_bias: bool = fixed(False)
    layer_norm_eps: float = 1e-5
    partial_rotary_factor: float = 1.0

    @property
    def norm_eps(self) -> float:
        return self.layer_norm_eps

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)


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
    """Biases on the way in only; each head has norms of its own."""

    o_proj: Linear = weight("o_proj", HIDDEN, Q)
    q_norm: JoinedHeadNorms | None = weight("q_layernorm.norms.{num_attention_heads}", "head_dim", when="qk_layernorm")
    k_norm: JoinedHeadNorms | None = weight("k_layernorm.norms.{num_key_value_heads}", "head_dim", when="qk_layernorm")


@dataclass
class Block(Sequential):
    """One sublayer after the other."""

    input_layernorm: LayerNorm = weight("input_layernorm", HIDDEN)
    self_attn: Attention = weight("self_attn")
    post_attention_layernorm: LayerNorm = weight("post_attention_layernorm", HIDDEN)
    mlp: llama.MLP = weight("mlp")


@dataclass
class ParallelBlock(Parallel):
    """Both at once."""

    input_layernorm: LayerNorm = weight("input_layernorm", HIDDEN)
    self_attn: Attention = weight("self_attn")
    mlp: llama.MLP = weight("mlp")


@dataclass
class StableLm(LayerNormDecoder):
    """A stack of one of those."""

    layers: Sequence[ConfiguredBlock] = weight("model.layers", length="num_hidden_layers")
