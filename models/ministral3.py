"""Ministral 3 and Devstral Small 2: a Mistral with YaRN, whose queries are scaled up far into a sequence.

Source: `transformers.models.ministral3`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import mlx.core as mx

from runner.config.decoder import DecoderConfig
from runner.config.rope import RopeScaling
from runner.models import llama
from runner.models.llama import MistralConfig
from runner.nn.batch import Batch
from runner.nn.positions import Temperature
from runner.weights.tags import weight

STRETCHED = RopeScaling(
    kind="yarn", factor=16.0, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
    original_max_position_embeddings=16384,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TemperedConfig(DecoderConfig):
    """Config with `llama_4_scaling_beta` inside its RoPE settings: the scale of the queries' temperature.

    A file without RoPE settings has the defaults of the family, beta included; in one with settings that lack it,
    queries are not scaled.
    """

    llama_4_scaling_beta: float | None = 0.1

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        places = [name for name in ("rope_parameters", "rope_scaling") if isinstance(raw.get(name), Mapping)]
        values: dict[str, Any] = {**raw, "llama_4_scaling_beta": None} if places else dict(raw)
        for name in places:
            inner = dict(raw[name])
            values["llama_4_scaling_beta"] = inner.pop("llama_4_scaling_beta", values["llama_4_scaling_beta"])
            inner.pop("max_position_embeddings", None)  # transformers writes it there and reads it nowhere
            values[name] = inner
        return super().from_dict(values)

    @property
    def temperature_scale(self) -> float:
        """What the logarithm of a query's position, in periods, is multiplied by."""
        return self.llama_4_scaling_beta or 0.0

    @property
    def temperature_period(self) -> int:
        """Tokens of a period: the context length before YaRN stretched it."""
        scaling = self.rope_scaling
        return (scaling and scaling.original_max_position_embeddings) or self.max_position_embeddings


@dataclass(frozen=True, kw_only=True)
class Ministral3Config(TemperedConfig, MistralConfig):
    """`config.json` of a Ministral 3."""

    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 262144
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1000000.0
    rope_scaling: RopeScaling | None = STRETCHED
    sliding_window: int | None = None


@dataclass
class Attention(llama.Attention):
    """Llama's attention; queries are multiplied by their position's temperature."""

    temperature: Temperature = field(kw_only=True)

    def heads(self, qkv: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v = super().heads(qkv, batch)
        return self.temperature(q, batch), k, v


@dataclass
class Block(llama.Block):
    """A Llama block with Ministral 3's attention."""

    self_attn: Attention = weight("self_attn")


@dataclass
class Ministral3(llama.Llama):
    """A Llama made of Ministral 3 blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
