"""Nemotron-H, Nano v2 and Nemotron 3: blocks of one sublayer each (Mamba 2, attention without RoPE, MLP, experts).

Source: arXiv:2504.03624, and `transformers.models.nemotron_h`. Steps are limited by `time_step_limit`, as in the
authors' code; transformers 5.23 raises them to `time_step_min`, which only says how training began.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from runner.config import layer_types
from runner.config.activations import check_activation
from runner.config.base import Limit, fixed, key
from runner.config.decoder import DecoderConfig
from runner.config.layer_types import FULL, LINEAR
from runner.config.mamba import ENDLESS, TRAINED, Mamba2Config
from runner.config.memory import Memory
from runner.config.moe import check_routing
from runner.errors import ConfigError
from runner.models import llama
from runner.nn import blocks, moe
from runner.nn.batch import Batch
from runner.nn.fast import RMSNorm
from runner.nn.linear import HIDDEN, Linear
from runner.nn.mamba2 import Mamba2
from runner.nn.mlp import ConfiguredMLP, PlainMLP, Ungated
from runner.nn.moe import EXPERT, ExpertLinear
from runner.weights.module import Module
from runner.weights.tags import setting, weight

MLP, EXPERTS = "mlp", "moe"
LETTERS = {"M": LINEAR, "*": FULL, "-": MLP, "E": EXPERTS}
SHARED = "moe_shared_expert_intermediate_size"


@dataclass(frozen=True, kw_only=True)
class NemotronHConfig(Mamba2Config, DecoderConfig):
    """`config.json` of a Nemotron-H; its layers are counted by `hybrid_override_pattern` or `layers_block_type`."""

    INERT: ClassVar[frozenset[str]] = frozenset(
        {
            *("expand", "mamba_expand", "partial_rotary_factor", "num_logits_to_keep", "use_mamba_kernels"),
            *("mamba_ssm_cache_dtype", "moe_shared_expert_overlap", "n_shared_experts", "mamba_dt_min", "mamba_dt_max"),
            *("mamba_dt_init_floor", "mtp_layers_block_type", "mtp_hybrid_override_pattern"),
            *("num_nextn_predict_layers", *TRAINED),
        }
    )
    ONLY: ClassVar[Mapping[str, object]] = dict.fromkeys(
        ("attention_bias", "mamba_proj_bias", "residual_in_fp32"), False
    )
    num_hidden_layers: int = key(default=0, minimum=0)
    hybrid_override_pattern: str | None = None
    layers_block_type: tuple[str, ...] | None = key(also="layer_types", default=None)
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 21504
    max_position_embeddings: int = 4096
    hidden_act: str = key("mlp_hidden_act", default="relu2")
    rms_norm_eps: float = key("layer_norm_epsilon", also="norm_eps", default=1e-5)
    mamba_hidden_act: str = "silu"
    mamba_n_heads: int = key("mamba_num_heads", default=128)
    mamba_d_head: int = key("mamba_head_dim", default=64)
    mamba_n_groups: int = key("n_groups", also="mamba_n_groups", default=8)
    mamba_d_state: int = key("ssm_state_size", default=128)
    mamba_d_conv: int = key("conv_kernel", also="mamba_d_conv", default=4)
    mamba_chunk_size: int = key("chunk_size", also="mamba_chunk_size", default=128)
    mamba_conv_bias: bool = key("use_conv_bias", also="mamba_conv_bias", default=True)
    mamba_proj_bias: bool = key("use_bias", default=False)
    time_step_limit: tuple[Limit, ...] = key(also="mamba_dt_limit", default=ENDLESS)
    num_experts: int = key("n_routed_experts", also="num_local_experts", default=8)
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 7688
    moe_shared_expert_intermediate_size: int = 7688
    moe_latent_size: int | None = None
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    scoring_func: str = fixed("sigmoid")
    group_members: int = fixed(2)
    rotary_dim: int = fixed(0, minimum=0)
    output_router_logits: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_hidden_layers", len(self.kinds))
        super().__post_init__()
        check_activation(self.mamba_hidden_act, self.ACTS, "mamba_hidden_act")
        if EXPERTS in self.kinds:
            check_routing(self.num_experts, self.num_experts_per_tok, self.n_group, self.topk_group, self.group_members)

    @property
    def kinds(self) -> Sequence[str]:
        """The type of each layer."""
        listed, pattern = self.layers_block_type, self.hybrid_override_pattern
        if listed is None and pattern is not None:
            unknown = sorted(set(pattern) - LETTERS.keys())
            if unknown:
                raise ConfigError(f"config.json: hybrid_override_pattern has the letter {unknown[0]!r}, not {LETTERS}")
            listed = tuple(LETTERS[letter] for letter in pattern)
        listed = (LINEAR, EXPERTS, FULL, MLP) if listed is None else listed
        return layer_types.checked(listed, len(listed), (), tuple(LETTERS.values()))

    @property
    def kind(self) -> str:
        """The type of the layer that this copy of the config describes."""
        return self.kinds[self.layer_index or 0]

    def memory(self, index: int) -> tuple[Memory, ...]:
        return {FULL: super().memory(index), LINEAR: (self.state,)}.get(self.kinds[index], ())

    @property
    def mamba_inner(self) -> int:
        return self.mamba_n_heads * self.mamba_d_head

    @property
    def mamba_activation(self) -> str:
        return self.mamba_hidden_act

    @property
    def expert_width(self) -> int:
        """Width of what experts work on."""
        return self.moe_latent_size or self.hidden_size

    @property
    def block_class(self) -> type:
        return FeedForwardBlock if self.kind in (MLP, EXPERTS) else blocks.SingleBlock

    @property
    def attention_class(self) -> type:
        return llama.Attention if self.kind == FULL else Mamba2

    @property
    def mlp_class(self) -> type:
        return MoE if self.kind == EXPERTS else PlainMLP

    def ignores(self, name: str) -> bool:
        return name.startswith("mtp.")  # the layers for multi-token prediction


@dataclass
class SharedMLP(PlainMLP):
    """The expert that every token passes."""

    up_proj: Linear = weight("up_proj", SHARED, HIDDEN, bias="mlp_bias")
    down_proj: Linear = weight("down_proj", HIDDEN, SHARED, bias="mlp_bias")


@dataclass
class MoE(moe.MoE):
    """Experts without gates, on a latent if the config says so, chosen as in DeepSeek V3; and the shared one."""

    glu: Ungated
    shared: SharedMLP = weight("shared_experts")
    router: Linear = weight("gate", "num_experts", HIDDEN, exact=True)
    correction: mx.array = weight("gate.e_score_correction_bias", "num_experts", exact=True)
    gate_up_proj: ExpertLinear = weight(
        "experts.{num_experts}.up_proj|switch_mlp.fc1[num_experts]|experts.up_proj[num_experts]", EXPERT, "expert_width"
    )
    down_proj: ExpertLinear = weight(
        "experts.{num_experts}.down_proj|switch_mlp.fc2[num_experts]|experts.down_proj[num_experts]",
        "expert_width",
        EXPERT,
    )
    to_latent: Linear | None = weight(
        "fc1_latent_proj", "expert_width", HIDDEN, when="moe_latent_size", bias="mlp_bias"
    )
    from_latent: Linear | None = weight(
        "fc2_latent_proj", HIDDEN, "expert_width", when="moe_latent_size", bias="mlp_bias"
    )

    def __call__(self, x: mx.array) -> mx.array:
        chosen = self.route(x)
        latent = x if self.to_latent is None else self.to_latent(x)
        mixed = self.mixed(latent, *chosen)
        return (mixed if self.from_latent is None else self.from_latent(mixed)) + self.shared(x)


@dataclass
class FeedForwardBlock(Module, blocks.Layer):
    """A norm and one sublayer, an MLP or experts, whose output is added to the input."""

    norm: RMSNorm = weight("norm", HIDDEN)
    mixer: ConfiguredMLP = weight("mixer")
    norm_eps: float = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: tuple[()]) -> mx.array:
        return x + self.mixer(self.norm(x, self.norm_eps))


@dataclass
class NemotronH(blocks.Backbone):
    """The model: embeddings, blocks, RMSNorm, head."""

    layers: Sequence[blocks.ConfiguredBlock] = weight("backbone.layers|model.layers", length="num_hidden_layers")
