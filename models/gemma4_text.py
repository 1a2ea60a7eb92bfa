"""Gemma 4 (text): heads of two sizes, values that are keys, layers without keys, inputs for each layer, experts.

Each published size has some of these. Source: `transformers.models.gemma4`; no paper yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from runner.cache.several import Memories
from runner.config import layer_types
from runner.config.base import fixed, key
from runner.config.layer_types import FULL
from runner.config.layered import LayeredConfig, LayerRope
from runner.config.moe import check_routing
from runner.config.rope import RopeScaling
from runner.config.rope_keys import OF_SLIDING
from runner.errors import ConfigError
from runner.models import gemma, gemma3n_text, llama
from runner.nn import moe
from runner.nn.batch import Batch
from runner.nn.blocks import BothNorms, ConfiguredAttention
from runner.nn.fast import RMSNorm
from runner.nn.layer_inputs import LayerInput, LayerInputs
from runner.nn.linear import HIDDEN, KV, Linear, Q
from runner.nn.moe import EXPERT, ExpertLinear
from runner.nn.shared_keys import SharedAttention, SharingConfig
from runner.weights.tags import setting, weight

QUARTER = RopeScaling(kind="proportional", partial_rotary_factor=0.25)
PLAIN = LayerRope(rope_theta=10000.0)


@dataclass(frozen=True, kw_only=True)
class Gemma4Config(LayeredConfig, SharingConfig):
    """`config.json` of a Gemma 4's text model; among images' tokens only, some attend to later ones."""

    NULL: ClassVar[Mapping[str, object]] = {**LayeredConfig.NULL, "hidden_size_per_layer_input": 0}
    SIZES: ClassVar[frozenset[str]] = frozenset({"head_dim", "num_key_value_heads"})
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 30
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    vocab_size: int = 262144
    hidden_act: str = key("hidden_activation", default="gelu_pytorch_tanh")
    max_position_embeddings: int = 131072
    tie_word_embeddings: bool = True
    rope_theta: float = 1000000.0
    rope_scaling: RopeScaling | None = QUARTER
    sliding_rope: LayerRope | None = key(OF_SLIDING, default=PLAIN)
    mlp_bias: bool = fixed(False)
    sliding_window: int | None = 512
    final_logit_softcapping: float | None = None
    use_bidirectional_attention: str | None = None
    global_head_dim: int = 512
    num_global_key_value_heads: int | None = None
    attention_k_eq_v: bool = False
    use_double_wide_mlp: bool = False
    vocab_size_per_layer_input: int = 262144
    hidden_size_per_layer_input: int = key(default=256, minimum=0)
    enable_moe_block: bool = False
    num_experts: int | None = None
    num_experts_per_tok: int | None = key("top_k_experts", default=None)
    moe_intermediate_size: int | None = None
    attention_scale: float = fixed(1.0)  # queries and keys are normalized
    norm_topk_prob: bool = fixed(True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_bidirectional_attention == "all":
            raise ConfigError("config.json: use_bidirectional_attention = 'all' is not supported: no token is the last")
        if self.hidden_size_per_layer_input and self.vocab_size_per_layer_input < self.vocab_size:
            rows = f"vocab_size_per_layer_input = {self.vocab_size_per_layer_input}"
            raise ConfigError(f"config.json: {rows} is less than vocab_size = {self.vocab_size}")
        if self.enable_moe_block:
            if not self.num_experts or not self.num_experts_per_tok or not self.moe_intermediate_size:
                raise ConfigError(
                    "config.json: enable_moe_block needs num_experts, top_k_experts, moe_intermediate_size"
                )
            check_routing(self.num_experts, self.num_experts_per_tok)

    @property
    def usual_layer_types(self) -> Sequence[str]:
        return layer_types.every(6, self.num_hidden_layers)

    @property
    def kinds(self) -> Sequence[str]:
        return (*super().kinds[:-1], FULL)  # the last layer sees everything, whatever the file says

    def layer_settings(self, index: int) -> Mapping[str, Any]:
        changed: dict[str, Any] = {}
        # What transformers 5 writes as `per_layer_config`, repositories have as these two keys.
        if self.per_layer_config is None and self.kinds[index] == FULL:
            changed["head_dim"] = self.global_head_dim
            if self.attention_k_eq_v and self.num_global_key_value_heads:
                changed["num_key_value_heads"] = self.num_global_key_value_heads
        if self.use_double_wide_mlp and self.owner(index) is not None:
            changed["intermediate_size"] = 2 * self.intermediate_size
        return {**super().layer_settings(index), **changed}

    @property
    def attention_class(self) -> type:
        if self.shares:
            return SharedAttention
        full = self.layer_index is not None and self.kinds[self.layer_index] == FULL
        return EqualAttention if self.attention_k_eq_v and full else gemma3n_text.Attention


@dataclass
class EqualAttention(gemma3n_text.Attention):
    """Attention whose values are the keys before their norm and RoPE."""

    qkv_proj: Linear = weight("{q,k}_proj", (Q, KV), HIDDEN, bias="attention_bias")

    def heads(self, qkv: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        keys = qkv[..., self.num_attention_heads * self.head_dim :]
        return super().heads(mx.concatenate([qkv, keys], axis=-1), batch)


@dataclass
class Experts(moe.MoE):
    """Experts beside the MLP, each behind norms of its own; what they add counts by a scale for each expert."""

    router: Linear = weight("router.proj", "num_experts", HIDDEN, exact=True)
    gate_up_proj: ExpertLinear = weight(
        "experts.gate_up_proj[num_experts]|experts.switch_glu.{gate,up}_proj[num_experts]", (EXPERT, EXPERT), HIDDEN
    )
    down_proj: ExpertLinear = weight(
        "experts.down_proj[num_experts]|experts.switch_glu.down_proj[num_experts]", HIDDEN, EXPERT
    )
    router_scale: mx.array = weight("router.scale", HIDDEN, exact=True)
    expert_scale: mx.array = weight("router.per_expert_scale", "num_experts", exact=True)
    dense_norm: RMSNorm = weight("post_feedforward_layernorm_1", HIDDEN)
    input_norm: RMSNorm = weight("pre_feedforward_layernorm_2", HIDDEN)
    output_norm: RMSNorm = weight("post_feedforward_layernorm_2", HIDDEN)
    norm_eps: float = setting()

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        normed = self.ops.rms_norm(x.astype(mx.float32), self.router_scale, self.norm_eps)
        experts, routing_weights = super().route(normed * x.shape[-1] ** -0.5)
        return experts, routing_weights * self.expert_scale[experts]

    def beside(self, x: mx.array, dense: mx.array) -> mx.array:
        """What experts add to `x`, and the output `dense` of the MLP."""
        sparse = self.mixed(self.input_norm(x, self.norm_eps), *self.route(x))
        return self.dense_norm(dense, self.norm_eps) + self.output_norm(sparse, self.norm_eps)


@dataclass
class Block(BothNorms):
    """Gemma 2's order with norms stored as they are, then what the layer's input adds, all times a number."""

    self_attn: ConfiguredAttention = weight("self_attn")
    mlp: llama.MLP = weight("mlp")
    layer_scalar: mx.array = weight("layer_scalar", 1)
    experts: Experts | None = weight("", when="enable_moe_block")
    layer_input: LayerInput | None = weight("", when="hidden_size_per_layer_input")

    def __call__(self, x: mx.array, batch: Batch, cache: Any, given: mx.array | None = None) -> mx.array:
        """`given` is the layer's input `[B, L, width]`, if layers have one."""
        x = super().__call__(x, batch, cache)
        if self.layer_input is not None and given is not None:
            x = x + self.layer_input(x, given)
        return x * self.layer_scalar.astype(x.dtype)

    def feed(self, x: mx.array, normed: mx.array) -> mx.array:
        dense = super().feed(x, normed)
        return dense if self.experts is None else self.experts.beside(x, dense)


@dataclass
class Gemma4(gemma.Decoder):
    """The model: scaled embeddings, inputs for each layer, Gemma 4 blocks, norm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    norm: RMSNorm = weight("model.norm", HIDDEN)
    layer_inputs: LayerInputs | None = weight("model", when="hidden_size_per_layer_input")

    def run(self, x: mx.array, batch: Batch, caches: Memories) -> mx.array:
        inputs = None if self.layer_inputs is None else self.layer_inputs(batch.ids, x)
        for index, (layer, cache) in enumerate(zip(self.layers, caches.layers, strict=True)):
            given = None if inputs is None else inputs[:, :, index]
            x = self.begun(layer(x, batch, cache, given), index, batch, caches)
        return self.norm(x, self.norm_eps)
