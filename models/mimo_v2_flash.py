"""MiMo-V2-Flash: narrow windows with sinks and twice the key-value heads, values narrower than keys, V3's experts.

Source: `transformers.models.mimo_v2_flash`, and the authors' own config for the keys about windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from runner.config.base import key
from runner.config.layer_types import FULL, SLIDING
from runner.config.layered import LayeredConfig, LayerRope
from runner.config.memory import Memory, Rows
from runner.config.rope_keys import OF_SLIDING
from runner.errors import ConfigError
from runner.models import llama
from runner.models.deepseek_v3 import ListedExpertsConfig
from runner.nn.attention import SinkAttend, split_heads
from runner.nn.batch import Batch
from runner.nn.blocks import ConfiguredDecoder as ConfiguredDecoder
from runner.nn.linear import HIDDEN, KV, Linear, Q
from runner.weights.tags import setting, tensor, weight

VALUES = "num_key_value_heads*v_head_dim"
PLAIN = LayerRope(rope_theta=10000.0)


@dataclass(frozen=True, kw_only=True)
class MiMoConfig(ListedExpertsConfig, LayeredConfig):
    """`config.json` of a MiMo-V2-Flash: `swa_*` keys are about windowed layers.

    The authors' `sliding_window_size` does not count the query's own token. `hybrid_layer_pattern` has 1 for a windowed
    layer, a listed `moe_layer_freq` 1 for a sparse one.
    """

    NULL: ClassVar[Mapping[str, object]] = {
        **ListedExpertsConfig.NULL,
        "routed_scaling_factor": 1.0,
        "attention_value_scale": 1.0,
    }
    INERT: ClassVar[frozenset[str]] = frozenset({"attention_chunk_size"})
    ONLY: ClassVar[Mapping[str, object]] = {
        "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False, "n_shared_experts": None,
    }  # fmt: skip
    num_key_value_heads: int = 4
    head_dim: int = 192
    v_head_dim: int = 128
    max_position_embeddings: int = 131072
    rms_norm_eps: float = key(also="layernorm_epsilon", default=1e-5)
    rope_theta: float = 5000000.0
    partial_rotary_factor: float = 0.334
    sliding_rope: LayerRope | None = key(OF_SLIDING, default=None)
    swa_rope_theta: float = 10000.0
    swa_num_key_value_heads: int | None = None
    swa_num_attention_heads: int | None = None
    swa_head_dim: int | None = None
    swa_v_head_dim: int | None = None
    sliding_window: int | None = 129
    sliding_window_size: int | None = None
    hybrid_layer_pattern: tuple[int, ...] | None = None
    moe_layer_freq: tuple[int, ...] | int = 1  # type: ignore[assignment]
    first_k_dense_replace: int = key(default=1, minimum=0)
    attention_value_scale: float = 0.707
    num_experts: int = key("n_routed_experts", also="num_local_experts", default=256)
    n_shared_experts: int = key("n_shared_experts", default=0, minimum=0)

    def __post_init__(self) -> None:
        if self.sliding_window_size is not None:
            object.__setattr__(self, "sliding_window", self.sliding_window_size + 1)
        pattern, sparse = self.hybrid_layer_pattern, self.moe_layer_freq
        if pattern is not None and self.layer_types is None:
            object.__setattr__(self, "layer_types", tuple(SLIDING if one else FULL for one in pattern))
        if not isinstance(sparse, int) and self.mlp_layer_types is None:
            object.__setattr__(self, "mlp_layer_types", tuple("sparse" if one else "dense" for one in sparse))
        super().__post_init__()
        if self.n_shared_experts:
            raise ConfigError("config.json: n_shared_experts is not supported for a MiMo-V2-Flash")

    @property
    def usual_layer_types(self) -> Sequence[str]:
        return [FULL if i == 0 or (i + 1) % 6 == 0 else SLIDING for i in range(self.num_hidden_layers)]

    def layer_settings(self, index: int) -> Mapping[str, Any]:
        if self.cache_window(index) is None:
            return super().layer_settings(index)
        own = {"num_attention_heads": self.swa_num_attention_heads, "head_dim": self.swa_head_dim}
        own |= {"v_head_dim": self.swa_v_head_dim}
        return {
            "rope_theta": self.swa_rope_theta,
            **super().layer_settings(index),
            "num_key_value_heads": self.swa_num_key_value_heads or 2 * self.num_key_value_heads,
            **{name: size for name, size in own.items() if size is not None},
        }

    def memory(self, index: int) -> tuple[Memory, ...]:
        layer = self.for_layer(index)
        return (Rows(layer.num_key_value_heads, layer.head_dim, layer.v_head_dim, self.cache_window(index)),)

    @property
    def attention_class(self) -> type:
        windowed = self.layer_index is not None and self.cache_window(self.layer_index) is not None
        return WindowedAttention if windowed else Attention

    def ignores(self, name: str) -> bool:
        return name.startswith("model.mtp.") or super().ignores(name)


@dataclass
class Attention(llama.Attention):
    """Llama's attention with values of another width than keys, times `attention_value_scale`."""

    qkv_proj: Linear = weight("{q,k,v}_proj", (Q, KV, VALUES), HIDDEN, bias="attention_bias")
    o_proj: Linear = weight("o_proj", HIDDEN, "num_attention_heads*v_head_dim")
    v_head_dim: int = setting()
    attention_value_scale: float = setting()

    def heads(self, qkv: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        both = (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        qk, v = mx.split(qkv, [both], axis=-1)
        rotated = self.rope(split_heads(qk, self.head_dim), batch.offset, batch.length, once=batch.once)
        q, k = mx.split(rotated, [self.num_attention_heads], axis=1)
        return q, k, split_heads(v, self.v_head_dim) * self.attention_value_scale


@dataclass
class Sinks(SinkAttend):
    """Attention with a sink for each head, under the authors' name or transformers'."""

    sinks: mx.array = tensor("attention_sink_bias|sinks", "num_attention_heads")


@dataclass
class WindowedAttention(Attention):
    """The attention of windowed layers: with sinks."""

    attend: Sinks
