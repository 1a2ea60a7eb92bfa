"""Configs of mixtures of experts: the keys that several families have, and whether a choice of experts is possible."""

from __future__ import annotations

from dataclasses import dataclass

from runner.config.decoder import DecoderConfig
from runner.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LocalExpertsConfig(DecoderConfig):
    """The experts of Mixtral, Granite MoE and gpt-oss.

    `router_aux_loss_coef` and `output_router_logits` are about training.
    """

    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float | None = None
    output_router_logits: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_routing(self.num_local_experts, self.num_experts_per_tok)

    @property
    def norm_topk_prob(self) -> bool:
        """Whether the weights of the chosen experts are scaled to add up to one: always, in these families."""
        return True


def check_routing(experts: int, chosen: int, groups: int = 1, kept: int = 1, members: int = 1) -> None:
    """Whether `chosen` experts can be had: of `kept` groups, each ranked by its `members` best.

    Raises:
        ConfigError: they cannot.
    """
    size = experts // groups
    if experts % groups or size < members or not kept <= groups or chosen > kept * size:
        shape = f"{chosen} of {experts} experts in {groups} groups, of which {kept} are kept"
        raise ConfigError(f"config.json: there is no choice of {shape}")
