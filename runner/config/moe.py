"""Config of mixture-of-experts models: the keys that several families share, and the check of the routing settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.config.decoder import DecoderConfig
from runner.config.problems import short
from runner.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LocalExpertsConfig(DecoderConfig):
    """Config of a decoder whose experts are described as in Mixtral, Granite MoE and gpt-oss.

    `router_aux_loss_coef` and `output_router_logits` only matter in training and are not used.
    """

    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float | None = None
    output_router_logits: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_local_experts:  # 0, where a family allows it: no experts at all
            check_routing(self.num_local_experts, self.num_experts_per_tok)

    @property
    def norm_topk_prob(self) -> bool:
        """Whether the routing weights of the chosen experts are scaled to sum to one: always, in these families."""
        return True


def check_listed(kinds: Sequence[str] | None, layers: int) -> None:
    """Check a `mlp_layer_types`; raises `ConfigError` unless it has dense or sparse for each of `layers` layers."""
    if kinds is not None and (len(kinds) != layers or set(kinds) - {"dense", "sparse"}):
        raise ConfigError(
            f"config.json: mlp_layer_types must have dense or sparse for each of {layers} layers, "
            f"not {short(list(kinds))}"
        )


def check_routing(experts: int, chosen: int, groups: int = 1, kept: int = 1, members: int = 1) -> None:
    """Check that a router can choose as many experts per token as the config asks for.

    Args:
        experts: number of experts.
        chosen: experts chosen for each token.
        groups: number of equal groups that the experts are divided into.
        kept: number of groups that the chosen experts may come from.
        members: number of best experts by whose scores a group is ranked.

    Raises:
        ConfigError: no such choice exists.
    """
    size = experts // groups
    if experts % groups or size < members or not kept <= groups or not 1 <= chosen <= kept * size:
        raise ConfigError(
            f"config.json: cannot choose {chosen} of {experts} experts in {groups} groups, of which {kept} are kept "
            f"and each is ranked by its {members} best"
        )
