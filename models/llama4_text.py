"""Llama 4 (Scout, Maverick): attention within chunks, layers without RoPE but with a temperature, and experts.

An expert's score multiplies its input, where other families multiply its output. Source: `transformers.models.llama4`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from runner.config.base import fixed, key
from runner.config.decoder import DecoderConfig
from runner.config.layer_types import FULL
from runner.config.memory import Memory, Rows
from runner.config.moe import check_routing
from runner.errors import ConfigError
from runner.models import llama, ministral3
from runner.nn import blocks, moe
from runner.nn.batch import Batch
from runner.nn.fast import provided_ops
from runner.nn.layouts import TurnedExperts
from runner.nn.linear import HIDDEN, INTERMEDIATE, Linear
from runner.nn.mlp import ConfiguredMLP, GatedMLP
from runner.ops.table import Ops
from runner.weights.tags import setting, weight

CHUNKED = "chunked_attention"


@dataclass(frozen=True, kw_only=True)
class Llama4Config(DecoderConfig):
    """`text_config` of a Llama 4. A 1 in `no_rope_layers` means a layer *with* RoPE; the `router_*` keys matter in
    training only.
    """

    INERT: ClassVar[frozenset[str]] = frozenset({"cache_implementation", "for_llm_compressor"})  # for other programs
    head_dim: int = 128
    num_key_value_heads: int = 8
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    intermediate_size_mlp: int = 16384
    num_local_experts: int = 16
    num_experts_per_tok: int = 1
    moe_layers: tuple[int, ...] | None = None
    interleave_moe_layer_step: int = 1
    no_rope_layers: tuple[int, ...] | None = None
    no_rope_layer_interval: int = 4
    layer_types: tuple[str, ...] | None = None
    attention_chunk_size: int | None = 8192
    attn_temperature_tuning: bool | int = key(default=True, minimum=0)
    floor_scale: int = 8192
    attn_scale: float = 0.1
    use_qk_norm: bool = True
    router_aux_loss_coef: float | None = None
    router_jitter_noise: float | None = None
    output_router_logits: bool | None = None
    norm_topk_prob: bool = fixed(False)
    scoring_func: str = fixed("sigmoid")
    temperature_shift: int = fixed(1)  # the position that the first token counts as
    traditional: bool = fixed(True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_routing(self.num_local_experts, self.num_experts_per_tok)
        for name, listed in (("no_rope_layers", self.no_rope_layers), ("layer_types", self.layer_types)):
            if listed and len(listed) != self.num_hidden_layers:
                raise ConfigError(
                    f"config.json: {name} has {len(listed)} entries, but there are {self.num_hidden_layers} layers"
                )
        unknown = sorted(set(self.layer_types or ()) - {FULL, CHUNKED})
        if unknown:
            raise ConfigError(f"config.json: layer type {unknown[0]!r} is not known; known are {FULL}, {CHUNKED}")
        if self.attention_chunk_size is None and any(self.chunked(i) for i in range(self.num_hidden_layers)):
            raise ConfigError(f"config.json: layers are of type {CHUNKED}, but attention_chunk_size is null")

    def rotates(self, index: int) -> bool:
        """Whether layer `index` has RoPE."""
        return bool(self.no_rope_layers[index] if self.no_rope_layers else (index + 1) % self.no_rope_layer_interval)

    def chunked(self, index: int) -> bool:
        """Whether layer `index` attends within chunks."""
        return self.layer_types[index] == CHUNKED if self.layer_types else self.rotates(index)

    def memory(self, index: int) -> tuple[Memory, ...]:
        chunk = self.attention_chunk_size if self.chunked(index) else None
        return (Rows(self.num_key_value_heads, self.head_dim, self.head_dim, chunk=chunk),)

    @property
    def rotary_dim(self) -> int:
        return self.head_dim if self.layer_index is None or self.rotates(self.layer_index) else 0

    @property
    def qk_norm(self) -> bool:
        """Whether this layer normalizes queries and keys: not without RoPE."""
        return self.use_qk_norm and self.rotary_dim > 0

    @property
    def temperature_scale(self) -> float:
        """What the logarithm of a query's position, in periods, is multiplied by; 0 in layers with RoPE."""
        return self.attn_scale if self.attn_temperature_tuning and not self.rotary_dim else 0.0

    @property
    def temperature_period(self) -> int:
        """Tokens of a period."""
        return self.floor_scale

    def sparse(self, index: int) -> bool:
        """Whether layer `index` has experts."""
        listed, step = self.moe_layers, self.interleave_moe_layer_step
        return (index + 1) % step == 0 if listed is None else index in listed

    def layer_settings(self, index: int) -> Mapping[str, Any]:
        return {} if self.sparse(index) else {"intermediate_size": self.intermediate_size_mlp}

    @property
    def mlp_class(self) -> type:
        return MoE if self.sparse(self.layer_index or 0) else llama.MLP


@dataclass
class Attention(ministral3.Attention):
    """Llama's attention with a weightless RMSNorm on q and k after RoPE, or without RoPE and with a temperature."""

    qk_norm: bool = setting()
    rms_norm_eps: float = setting()
    ops: Ops = provided_ops()

    def heads(self, qkv: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v = super().heads(qkv, batch)
        if self.qk_norm:
            q, k = (self.ops.rms_norm(heads, None, self.rms_norm_eps) for heads in (q, k))
        return q, k, v


@dataclass
class MoE(moe.MoE):
    """Experts stored `[in, out]`, gate and up side by side, plus a shared expert that every token passes."""

    router: Linear = weight("router", "num_local_experts", HIDDEN, exact=True)
    gate_up_proj: TurnedExperts = weight(
        "experts.gate_up_proj[num_local_experts]|experts.{gate,up}_proj[num_local_experts]",
        (INTERMEDIATE, INTERMEDIATE),
        HIDDEN,
    )
    down_proj: TurnedExperts = weight("experts.down_proj[num_local_experts]", HIDDEN, INTERMEDIATE)
    shared: GatedMLP = weight("shared_expert", INTERMEDIATE)

    def __call__(self, x: mx.array) -> mx.array:
        experts, scores = self.route(x)
        # A row for each token and expert, as if it were a token with one expert.
        rows = (x[:, :, None] * scores[..., None].astype(x.dtype)).reshape(x.shape[0], -1, x.shape[-1])
        outputs = self.outputs(rows, experts.reshape(x.shape[0], -1, 1)).reshape(*experts.shape, -1)
        return self.complete(mx.sum(outputs, axis=2)) + self.shared(x)


@dataclass
class Block(blocks.PreNorm):
    """A Llama block with Llama 4's attention, and experts instead of the MLP in sparse layers."""

    self_attn: Attention = weight("self_attn")
    mlp: ConfiguredMLP = weight("feed_forward")


@dataclass
class Llama4(blocks.Decoder):
    """The model: embeddings, Llama 4 blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
