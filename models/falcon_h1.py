"""Falcon-H1: attention and Mamba 2 side by side in each layer, and multipliers on nearly everything.

Source: arXiv:2507.22448, and `transformers.models.falcon_h1`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import mlx.core as mx

from runner.cache.kv import KVCache
from runner.cache.recurrent import StateCache
from runner.config.base import Shaped, key
from runner.config.mamba import Mamba2Config
from runner.config.memory import Memory
from runner.errors import ConfigError
from runner.models import granite, llama
from runner.models.llama import LlamaConfig
from runner.nn import mamba2
from runner.nn.batch import Batch
from runner.nn.fast import RMSNorm
from runner.nn.linear import HIDDEN, Linear
from runner.nn.mamba2 import INNER
from runner.weights.module import Module
from runner.weights.tags import setting, weight


@dataclass(frozen=True, kw_only=True)
class FalconH1Config(Mamba2Config, LlamaConfig):
    """`config.json` of a Falcon-H1: a factor on the output or the input of each matrix."""

    INERT: ClassVar[frozenset[str]] = frozenset({"mlp_expansion_factor", "num_logits_to_keep"})
    ONLY: ClassVar[Mapping[str, object]] = {"mamba_use_mlp": True}
    NULL: ClassVar[Mapping[str, object]] = {**LlamaConfig.NULL, "mamba_d_ssm": 0}
    num_key_value_heads: int = 8
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    mamba_d_ssm: int = key(default=1024, minimum=0)
    mamba_rms_norm: bool = False
    mamba_norm_before_gate: bool = True
    projectors_bias: bool = False
    embedding_multiplier: float = 1.0
    lm_head_multiplier: float = 1.0
    key_multiplier: float = 1.0
    attention_in_multiplier: float = 1.0
    attention_out_multiplier: float = 1.0
    ssm_in_multiplier: float = 1.0
    ssm_out_multiplier: float = 1.0
    ssm_multipliers: tuple[float, ...] | None = None
    mlp_multipliers: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, count in (("ssm_multipliers", 5), ("mlp_multipliers", 2)):
            object.__setattr__(self, name, getattr(self, name) or (1.0,) * count)
            if len(getattr(self, name)) != count:
                raise ConfigError(f"config.json: {name} must be {count} numbers, not {getattr(self, name)}")

    @property
    def mamba_inner(self) -> int:
        return self.mamba_d_ssm or super().mamba_inner

    def stored_as(self, headers: Mapping[str, Shaped]) -> Self:
        """mlx-lm turns convolutions around and multiplies weights by their factors, but for those of keys, values."""
        conv = headers.get("model.layers.0.mamba.conv1d.weight")
        if conv is None or conv.shape[1:] != (self.mamba_d_conv, 1):
            return self
        if self.attention_bias or self.mlp_bias or self.mamba_proj_bias or self.projectors_bias:
            raise ConfigError("a Falcon-H1 with biases that mlx-lm wrote is not supported: it multiplies weights only")
        table = self.embedding_multiplier if self.tie_word_embeddings else self.lm_head_multiplier
        return dataclasses.replace(
            self, embedding_multiplier=1.0, lm_head_multiplier=self.lm_head_multiplier / table,
            attention_in_multiplier=1.0, attention_out_multiplier=self.attention_in_multiplier, ssm_in_multiplier=1.0,
            ssm_out_multiplier=1.0, ssm_multipliers=None, mlp_multipliers=None,
        )  # fmt: skip

    def memory(self, index: int) -> tuple[Memory, ...]:
        return (*super().memory(index), self.state)

    @property
    def attention_scale(self) -> float:
        return self.key_multiplier * super().attention_scale

    @property
    def logits_scaling(self) -> float:
        """What logits are divided by."""
        return 1 / self.lm_head_multiplier


@dataclass
class Mamba2(mamba2.Mamba2):
    """Mamba 2 whose five inputs (the gate, x, B, C and the steps) each have a factor."""

    out_proj: Linear = weight("out_proj", HIDDEN, INNER, bias="projectors_bias")
    ssm_in_multiplier: float = setting()
    ssm_multipliers: tuple[float, ...] = setting()
    factors: mx.array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        state = (self.mamba_channels - self.mamba_inner) // 2
        parts = zip((self.mamba_inner, state, state), self.ssm_multipliers[1:4], strict=True)
        self.factors = mx.concatenate([mx.full(size, factor) for size, factor in parts])

    def project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        gate, mixed, dt = super().project(x * self.ssm_in_multiplier)
        return gate * self.ssm_multipliers[0], mixed * self.factors.astype(x.dtype), dt * self.ssm_multipliers[4]


@dataclass
class MLP(llama.MLP):
    """The gated MLP with a factor on the gate, and one on the output."""

    mlp_multipliers: tuple[float, ...] = setting()

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        hidden = self.glu(mx.concatenate([gate * self.mlp_multipliers[0], up], axis=-1))
        return self.down_proj(hidden) * self.mlp_multipliers[1]


@dataclass
class Block(Module):
    """Attention and Mamba 2 on the same normalized input, summed; then the MLP."""

    input_layernorm: RMSNorm = weight("input_layernorm", HIDDEN)
    self_attn: llama.Attention = weight("self_attn")
    mamba: Mamba2 = weight("mamba")
    post_attention_layernorm: RMSNorm = weight("pre_ff_layernorm", HIDDEN)
    mlp: MLP = weight("feed_forward")
    rms_norm_eps: float = setting()
    attention_in_multiplier: float = setting()
    attention_out_multiplier: float = setting()
    ssm_out_multiplier: float = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: tuple[KVCache, StateCache]) -> mx.array:
        rows, states = cache
        normed = self.input_layernorm(x, self.rms_norm_eps)
        attended = self.self_attn(normed * self.attention_in_multiplier, batch, rows) * self.attention_out_multiplier
        mixed = self.mamba(normed, batch, states) * self.ssm_out_multiplier + attended
        x, normed = self.post_attention_layernorm.add(x, mixed, self.rms_norm_eps)
        return x + self.mlp(normed)


@dataclass
class FalconH1(granite.Decoder):
    """The model: scaled embeddings, Falcon-H1 blocks, RMSNorm, head with scaled logits."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    norm: RMSNorm = weight("model.final_layernorm", HIDDEN)
