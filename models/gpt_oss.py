"""gpt-oss: attention sinks, a sliding window in every other layer, and a mixture of experts with biases in every layer.

Source: arXiv:2508.10925, and `transformers.models.gpt_oss`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from runner.config.base import key
from runner.config.decoder import WindowedConfig
from runner.config.layer_types import FULL, SLIDING
from runner.config.moe import LocalExpertsConfig
from runner.config.rope import RopeScaling
from runner.errors import ConfigError
from runner.models import llama
from runner.nn import blocks, moe
from runner.nn.attention import SinkAttend
from runner.nn.layouts import TurnedExperts
from runner.nn.linear import HIDDEN, INTERMEDIATE, Linear
from runner.nn.mlp import GLU
from runner.weights.tags import setting, weight
from runner.weights.transforms import HALVES

STRETCHED = RopeScaling(
    kind="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=4096
)


@dataclass(frozen=True, kw_only=True)
class GptOssConfig(LocalExpertsConfig, WindowedConfig):
    """`config.json` of a gpt-oss. The last two keys repeat `num_experts_per_tok` and RoPE's original context length;
    transformers reads neither.
    """

    num_key_value_heads: int = 8
    head_dim: int = 64
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 131072
    rope_theta: float = 150000.0
    rope_scaling: RopeScaling | None = STRETCHED
    attention_bias: bool = True
    sliding_window: int | None = 128
    num_local_experts: int = key(also="num_experts", default=128)
    num_experts_per_tok: int = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    experts_per_token: int | None = None
    initial_context_length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_act != "silu":
            raise ConfigError(f"config.json: hidden_act {self.hidden_act!r} is not supported for a gpt-oss, only silu")

    @property
    def usual_layer_types(self) -> Sequence[str]:
        return [FULL if i % 2 else SLIDING for i in range(self.num_hidden_layers)]

    @classmethod
    def reads_packed(cls, method: Mapping[str, Any]) -> bool:
        return set(method) <= {"quant_method", "modules_to_not_convert"} and method["quant_method"] == "mxfp4"


@dataclass
class Attention(llama.Attention):
    """Llama's attention with a learned sink per head: a logit that joins the softmax and has no value."""

    attend: SinkAttend


@dataclass
class ClampedGLU(GLU):
    """gpt-oss's SwiGLU, `gate * sigmoid(alpha * gate) * (up + 1)`; gate is clamped from above, up on both sides."""

    swiglu_alpha: float = setting()
    swiglu_limit: float = setting()

    def __call__(self, gate_up: mx.array) -> mx.array:
        return self.ops.clamped_glu(gate_up, self.swiglu_alpha, self.swiglu_limit)


@dataclass
class MoE(moe.MoE):
    """Experts with biases; the published `gate_up_proj` alternates rows of gate and up, mlx-lm stores the two apart."""

    glu: ClampedGLU
    router: Linear = weight("router", "num_local_experts", HIDDEN, bias=True, exact=True)
    gate_up_proj: TurnedExperts = weight(
        "experts.gate_up_proj[num_local_experts]|experts.{gate,up}_proj[num_local_experts]",
        (INTERMEDIATE, INTERMEDIATE),
        HIDDEN,
        bias=True,
        transform=HALVES,
    )
    down_proj: TurnedExperts = weight("experts.down_proj[num_local_experts]", HIDDEN, INTERMEDIATE, bias=True)


@dataclass
class Block(blocks.PreNorm):
    """A Llama block with sinks in its attention, and experts instead of the MLP."""

    self_attn: Attention = weight("self_attn")
    mlp: MoE = weight("mlp")


@dataclass
class GptOss(blocks.Decoder):
    """The model: embeddings, gpt-oss blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
