"""Trinity (AFMoE): gated attention, RoPE in windowed layers only, norms around each sublayer, DeepSeek V3's experts.

Source: arXiv:2602.17004, and `transformers.models.afmoe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from runner.config import layer_types
from runner.config.base import fixed, key
from runner.config.decoder import WindowedConfig
from runner.models import deepseek_v2, gemma, llama
from runner.models.deepseek_v3 import BalancedConfig
from runner.nn import blocks
from runner.nn.attention import merge_heads, split_heads
from runner.nn.batch import Batch
from runner.nn.fast import RMSNorm, provided_ops
from runner.nn.linear import HIDDEN, Linear, Q
from runner.nn.mlp import ConfiguredMLP
from runner.nn.moe import EXPERT, ExpertLinear
from runner.ops.table import Ops
from runner.weights.tags import setting, weight


@dataclass(frozen=True, kw_only=True)
class AfmoeConfig(BalancedConfig, WindowedConfig):
    """`config.json` of a Trinity; `load_balance_coeff` matters in training only."""

    INERT: ClassVar[frozenset[str]] = frozenset({"load_balance_coeff", "use_grouped_mm"})
    ONLY: ClassVar[Mapping[str, object]] = {
        "n_group": 1, "topk_group": 1, "num_expert_groups": 1, "num_limited_groups": 1, "route_norm": True,
        "score_func": "sigmoid",
    }  # fmt: skip
    head_dim: int = 128
    max_position_embeddings: int = 16384
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = 1024
    global_attn_every_n_layers: int = 4
    mup_enabled: bool = False
    first_k_dense_replace: int = key("num_dense_layers", default=1, minimum=0)
    moe_intermediate_size: int = 1408
    num_experts: int = 64
    num_experts_per_tok: int = 6
    n_group: int | None = fixed(1)
    topk_group: int | None = fixed(1)
    n_shared_experts: int = key("num_shared_experts", default=2)
    routed_scaling_factor: float = key("route_scale", default=1.0)

    @property
    def usual_layer_types(self) -> Sequence[str]:
        return layer_types.every(self.global_attn_every_n_layers, self.num_hidden_layers)

    @property
    def rotary_dim(self) -> int:
        return 0 if self.layer_index is not None and self.cache_window(self.layer_index) is None else self.head_dim

    @property
    def experts_class(self) -> type:
        return MoE


@dataclass
class GatedAttention(llama.NormedAttention):
    """Attention with QK-norm, whose output a gate scales by a sigmoid, number by number."""

    gate_proj: Linear = weight("gate_proj", Q, HIDDEN)
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, batch: Batch, cache: Any) -> mx.array:
        q, k, v = self.heads(self.qkv_proj(x), batch)
        gate = self.gate_proj(x)
        gate = split_heads(gate, gate.shape[-1] // self.num_attention_heads)
        return self.o_proj(merge_heads(self.opened(self.attend(q, cache.append(k, v), batch), gate)))

    def opened(self, attended: mx.array, gate: mx.array) -> mx.array:
        """What a gate for each number leaves of attention's output; both `[B, H, L, head_dim]`."""
        return self.ops.gate(attended, gate)


@dataclass
class Attention(GatedAttention):
    """Gated attention with Qwen 3's norms."""

    q_norm: RMSNorm = weight("q_norm", "head_dim")
    k_norm: RMSNorm = weight("k_norm", "head_dim")


@dataclass
class MoE(deepseek_v2.MoE):
    """V2's experts beside shared ones, chosen with a correction; mlx-lm stacks them under the hub's names."""

    router: Linear = weight("router.gate", "num_experts", HIDDEN, exact=True)
    gate_up_proj: ExpertLinear = weight(
        "experts.{num_experts}.{gate,up}_proj|experts.gate_up_proj[num_experts]|experts.{gate,up}_proj[num_experts]",
        (EXPERT, EXPERT),
        HIDDEN,
    )
    down_proj: ExpertLinear = weight("experts.{num_experts}.down_proj|experts.down_proj[num_experts]", HIDDEN, EXPERT)
    correction: mx.array = weight("expert_bias", "num_experts", exact=True)


@dataclass
class Block(blocks.BothNorms):
    """Gemma 2's order of norms, gated attention, and experts instead of the MLP in sparse layers."""

    self_attn: Attention = weight("self_attn")
    attention_norm: RMSNorm = weight("post_attention_layernorm", HIDDEN)
    post_attention_layernorm: RMSNorm = weight("pre_mlp_layernorm", HIDDEN)
    mlp: ConfiguredMLP = weight("mlp")
    mlp_norm: RMSNorm = weight("post_mlp_layernorm", HIDDEN)


@dataclass
class Afmoe(gemma.Decoder):
    """The model: embeddings, multiplied by sqrt(hidden_size) if `mup_enabled`, AFMoE blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    norm: RMSNorm = weight("model.norm", HIDDEN)
    mup_enabled: bool = setting()

    def embed(self, batch: Batch) -> mx.array:
        return super().embed(batch) if self.mup_enabled else self.embed_tokens(batch.ids)
