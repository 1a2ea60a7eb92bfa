"""Solar Open: GLM-4.5's attention on whole heads, and DeepSeek V3's experts in every layer.

Source: `transformers.models.solar_open`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from runner.config.base import key
from runner.models.glm4_moe import Glm4Moe as Glm4Moe
from runner.models.glm4_moe import Glm4MoeConfig


@dataclass(frozen=True, kw_only=True)
class SolarOpenConfig(Glm4MoeConfig):
    """`config.json` of a Solar Open; `intermediate_size` is that of layers without experts, of which it has none."""

    NULL: ClassVar[Mapping[str, object]] = Glm4MoeConfig.NULL
    intermediate_size: int = 10240
    head_dim: int = 128
    rope_theta: float = 1000000.0
    partial_rotary_factor: float = 1.0
    first_k_dense_replace: int = key(default=0, minimum=0)
    moe_intermediate_size: int = 1280
    num_nextn_predict_layers: int = key(also="num_mtp_layers", default=0, minimum=0)
