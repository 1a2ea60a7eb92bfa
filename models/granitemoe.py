"""Granite 3 MoE: Granite's multipliers, and a mixture of experts stored as one tensor per projection.

Source: `transformers.models.granitemoe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.config.moe import LocalExpertsConfig
from runner.models import granite, llama
from runner.models.granite import GraniteConfig
from runner.nn import moe
from runner.nn.linear import HIDDEN, INTERMEDIATE, Linear
from runner.nn.moe import ExpertLinear
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class GraniteMoeConfig(LocalExpertsConfig, GraniteConfig):
    """`config.json` of a Granite MoE: Granite's keys and `LocalExpertsConfig`'s."""


@dataclass
class MoE(moe.MoE):
    """Experts stored stacked; `input_linear` holds each expert's gate rows, then its up rows (mlx-lm: two tensors).

    The last names are those that transformers 5 holds them by.
    """

    router: Linear = weight("router.layer|router", "num_local_experts", HIDDEN, exact=True)
    gate_up_proj: ExpertLinear = weight(
        "input_linear[num_local_experts]|switch_mlp.{gate,up}_proj[num_local_experts]"
        "|experts.gate_up_proj[num_local_experts]",
        (INTERMEDIATE, INTERMEDIATE),
        HIDDEN,
    )
    down_proj: ExpertLinear = weight(
        "output_linear[num_local_experts]|switch_mlp.down_proj[num_local_experts]|experts.down_proj[num_local_experts]",
        HIDDEN,
        INTERMEDIATE,
    )


@dataclass
class Block(granite.ScaledPreNorm):
    """A Granite block with experts instead of the MLP."""

    self_attn: llama.Attention = weight("self_attn")
    mlp: MoE = weight("block_sparse_moe")


@dataclass
class GraniteMoe(granite.Decoder):
    """The model: scaled embeddings, Granite MoE blocks, RMSNorm, head with scaled logits."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
