"""LFM2: gated short convolutions in most layers, and grouped-query attention with QK-norm in the others.

Source: `transformers.models.lfm2`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from runner.config.base import key
from runner.config.layer_types import CONV, FULL
from runner.errors import ConfigError
from runner.models import llama, qwen3
from runner.nn import blocks
from runner.nn.fast import RMSNorm
from runner.nn.gated_conv import GatedConv, GatedConvConfig
from runner.nn.linear import HIDDEN, Linear, Q
from runner.nn.mlp import ConfiguredMLP
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class ConvConfig(GatedConvConfig):
    """The keys of both LFM2 and its mixture of experts."""

    # Keys of the authors' own code, which repeat others or say how training began; transformers reads none of them.
    INERT: ClassVar[frozenset[str]] = frozenset(
        {
            *("block_dim", "block_norm_eps", "conv_dim", "conv_dim_out", "num_heads"),
            *("block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init", "conv_use_xavier_init"),
        }
    )
    ONLY: ClassVar[Mapping[str, object]] = {"block_use_swiglu": True, "use_pos_enc": True}
    num_key_value_heads: int = 8
    max_position_embeddings: int = 128000
    tie_word_embeddings: bool = key(also="tie_embedding", default=True)
    rms_norm_eps: float = key("norm_eps", default=1e-5)
    rope_theta: float = 1000000.0

    @property
    def usual_layer_types(self) -> Sequence[str]:
        return [FULL] * self.num_hidden_layers

    @property
    def attention_class(self) -> type:
        return Attention if self.attends else GatedConv

    @property
    def mlp_class(self) -> type:
        return MLP

    @property
    def mlp_width(self) -> int:
        """Width of the MLP's hidden layer."""
        return self.intermediate_size


@dataclass(frozen=True, kw_only=True)
class Lfm2Config(ConvConfig):
    """`config.json` of an LFM2; by `block_auto_adjust_ff_dim`, the MLP is narrower than `intermediate_size`."""

    intermediate_size: int = key(also="block_ff_dim", default=12288)
    block_auto_adjust_ff_dim: bool = True
    block_ffn_dim_multiplier: float | None = 1.0
    block_multiple_of: int = 256
    full_attn_idxs: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mlp_width < 1:
            raise ConfigError(
                f"config.json: intermediate_size = {self.intermediate_size} is adjusted to no width at all"
            )

    @property
    def usual_layer_types(self) -> Sequence[str]:
        attending = range(self.num_hidden_layers) if self.full_attn_idxs is None else self.full_attn_idxs
        return [FULL if index in attending else CONV for index in range(self.num_hidden_layers)]

    @property
    def mlp_width(self) -> int:
        if not self.block_auto_adjust_ff_dim:
            return self.intermediate_size
        width = 2 * self.intermediate_size // 3
        if self.block_ffn_dim_multiplier is None:
            return width
        multiples = -(-int(self.block_ffn_dim_multiplier * width) // self.block_multiple_of)  # rounded up
        return multiples * self.block_multiple_of


@dataclass
class Attention(qwen3.Attention):
    """Qwen 3's attention under LFM2's names."""

    q_norm: RMSNorm = weight("q_layernorm", "head_dim")
    k_norm: RMSNorm = weight("k_layernorm", "head_dim")
    o_proj: Linear = weight("out_proj", HIDDEN, Q)


@dataclass
class MLP(llama.MLP):
    """The gated MLP under LFM2's names, or those that mlx-lm gives it beside experts."""

    gate_up_proj: Linear = weight("{w1,w3}|{gate,up}_proj", ("mlp_width", "mlp_width"), HIDDEN)
    down_proj: Linear = weight("w2|down_proj", HIDDEN, "mlp_width")


@dataclass
class Block(blocks.ConfiguredPreNorm):
    """The block under LFM2's names."""

    input_layernorm: RMSNorm = weight("operator_norm", HIDDEN)
    post_attention_layernorm: RMSNorm = weight("ffn_norm", HIDDEN)
    mlp: ConfiguredMLP = weight("feed_forward")


@dataclass
class Lfm2(blocks.Decoder):
    """The model: embeddings, LFM2 blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    norm: RMSNorm = weight("model.embedding_norm", HIDDEN)
