"""Hunyuan (dense): q and k are normalised after they are rotated; rope's base is stretched once, by `alpha`.

Source: `transformers.models.hunyuan_v1_dense`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx

from runner import blocks
from runner.cache import Batch
from runner.errors import ConfigError
from runner.fast import RMSNorm
from runner.models import llama
from runner.models.llama import LlamaConfig
from runner.rope import RopeScaling
from runner.weights import setting, weight


@dataclass(frozen=True, kw_only=True)
class HunyuanConfig(LlamaConfig):
    """`config.json` of a Hunyuan; "dynamic" with an `alpha` is a base of theta * alpha^(d / (d - 2)) at any length."""

    rms_norm_eps: float = 1e-5
    use_qk_norm: bool = True
    eod_token_id: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.use_qk_norm:
            raise ConfigError("config.json: use_qk_norm = false is not supported")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        place = "rope_parameters" if isinstance(raw.get("rope_parameters"), dict) else "rope_scaling"
        stretched = raw.get(place)
        alpha = stretched.get("alpha") if isinstance(stretched, dict) else None
        if not isinstance(stretched, dict) or alpha is None:
            return super().from_dict(raw)
        if not isinstance(alpha, int | float) or not 0 < alpha <= 1e9 or stretched.get("factor", 1.0) != 1.0:
            raise ConfigError(f"config.json: {place} {stretched!r} needs a positive alpha and a factor of 1")
        kept = {"rope_theta": stretched["rope_theta"], "rope_type": "default"} if "rope_theta" in stretched else None
        config = super().from_dict({**raw, place: kept})
        exponent = config.head_dim / max(config.head_dim - 2, 1)
        object.__setattr__(config, "rope_theta", config.rope_theta * alpha**exponent)
        object.__setattr__(config, "rope_scaling", RopeScaling())
        return config


@dataclass
class Attention(llama.Attention):
    """Rotated, then normalised."""

    query_layernorm: RMSNorm = weight("query_layernorm", "head_dim")
    key_layernorm: RMSNorm = weight("key_layernorm", "head_dim")
    rms_norm_eps: float = setting()

    def heads(self, qkv: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v = super().heads(qkv, batch)
        return self.query_layernorm(q, self.rms_norm_eps), self.key_layernorm(k, self.rms_norm_eps), v


@dataclass
class Block(llama.Block):
    """Llama's, with that attention."""

    self_attn: Attention = weight("self_attn")


@dataclass
class Hunyuan(blocks.Decoder):
    """Llama's frame with those blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
