"""Tensor parallel: each layer's matrices shared out over ranks, which add up what their parts give.

A rank has some of the heads and some of the places between the two matrices of a feed-forward layer. What goes into a
layer and what comes out of it is whole on every rank, so that norms and residuals need not know:

    x ── rows of q, k, v of own heads ── attention over own heads ── columns of o ──(+)── x
    x ── rows of gate, up, own places ── activation ──────────────── columns of down ─(+)── x

Each (+) is a sum over all ranks. A head that is not the embedding table is shared out by the vocabulary, and all ranks'
logits are gathered: the table itself is whole everywhere, as a token needs one of its rows only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import mlx.core as mx

from runner.config.base import Config
from runner.errors import UsageError
from runner.nn.linear import VOCAB, JoinedLinear, Linear
from runner.nn.moe import ExpertLinear, MoE
from runner.nn.stages import HEAD, NoHead
from runner.ops.exchange import Exchange
from runner.weights.division import Divider, Division, Indivisible, wrapped
from runner.weights.plan import ArrayPlan, ModulePlan, Value
from runner.weights.tags import setting

GROUPS = (
    ("num_attention_heads", "num_key_value_heads"),
    ("intermediate_size",),
    ("moe_intermediate_size",),
    ("shared_expert_intermediate_size",),
    ("shared_intermediate_size",),
    ("moe_shared_expert_intermediate_size",),
    (VOCAB,),
)
"""Numbers of a config that can be shared out, those together that go together."""


@dataclass
class Summed(Linear):
    """A linear layer of which each rank has some of the inputs: the sum of what all give, and the bias once."""

    inner: Linear
    bias: mx.array | None
    exchange: Exchange = setting()

    def __call__(self, x: mx.array) -> mx.array:
        y = self.exchange.total(self.inner(x))
        return y if self.bias is None else y + self.bias.astype(y.dtype)


@dataclass
class Gathered(Linear):
    """A head of which each rank has some of the vocabulary: the logits of all, in the order of the ranks."""

    inner: Linear
    exchange: Exchange = setting()

    def __call__(self, x: mx.array) -> mx.array:
        return self.exchange.gathered(self.inner(x))


@dataclass(frozen=True)
class Divided:
    """How a model is shared out.

    Attributes:
        division: this rank's part.
        whole: what stays whole on every rank, and why: a line for each.
    """

    division: Division
    whole: tuple[str, ...]


def divided(divider: Divider, config: Config, rank: int, size: int) -> Divided:
    """Share out all that can be: what is tied together otherwise, or uneven, stays whole, by name.

    Raises:
        UsageError: nothing can be shared out.
    """
    fields = {item.name for item in dataclasses.fields(config)}
    found: Division | None = None
    names: list[str] = []
    whole: list[str] = []
    for group in GROUPS:
        if not fields.issuperset(group):
            continue
        try:
            found = divider.divide([*names, *group], rank, size)
            names += group
        except Indivisible as error:
            whole.append(f"{group[0]}: {error}")
    if found is None:
        raise UsageError("nothing of this model can be shared out by tensors: " + "; ".join(whole))
    return Divided(found, tuple(whole))


def shared(plan: ModulePlan, division: Division, exchange: Exchange) -> ModulePlan:
    """The `plan` of a rank's part, with what its ranks exchange."""

    def wrap(module: ModulePlan) -> ModulePlan:
        if not issubclass(module.cls, Linear):
            return module
        if issubclass(module.cls, JoinedLinear):
            raise UsageError(f"{module.path}: parts in several precisions cannot be added up over ranks")
        bias = module.fields.get("bias", Value(None))
        inner = dataclasses.replace(module, fields={**module.fields, "bias": Value(None)})
        return ModulePlan(module.path, Summed, {"inner": inner, "bias": bias, "exchange": Value(exchange)})

    def mix(module: ModulePlan) -> ModulePlan:
        # What experts give is weighed and added before ranks add theirs: one sum for all experts of a token. Their
        # biases are added by rank 0 alone.
        experts = module.fields["down_proj"]
        assert isinstance(experts, ModulePlan)
        if exchange.rank > 0:
            experts = dataclasses.replace(experts, fields={**experts.fields, "bias": Value(None)})
        return dataclasses.replace(module, fields={**module.fields, "down_proj": experts, "exchange": Value(exchange)})

    plan = wrapped(plan, division.summed, wrap)
    plan = wrapped(plan, frozenset(path.removesuffix(".down_proj") for path in _experts(plan, division.summed)), mix)
    head = plan.fields[HEAD]
    assert isinstance(head, ModulePlan)
    if gathers(division):
        head = ModulePlan(head.path, Gathered, {"inner": head, "exchange": Value(exchange)})
    elif exchange.rank > 0:
        head = ModulePlan(head.path, NoHead, {})
    return dataclasses.replace(plan, fields={**plan.fields, HEAD: head})


def gathers(division: Division) -> bool:
    """Whether the head is shared out by the vocabulary."""
    return VOCAB in division.config.division[0]


def sums(plan: ModulePlan) -> list[int]:
    """Widths of the sums of a token over all ranks."""
    found = []
    if issubclass(plan.cls, MoE) and "exchange" in plan.fields:
        found.append(_outputs(plan.fields["down_proj"]))
    for item in plan.fields.values():
        for child in item if isinstance(item, list) else [item]:
            if isinstance(child, ModulePlan):
                found += [_outputs(child.fields["inner"])] if child.cls is Summed else sums(child)
    return found


def _experts(plan: ModulePlan, paths: frozenset[str]) -> list[str]:
    """The paths, of these, that lead to layers of experts."""
    found = []
    for item in plan.fields.values():
        for child in item if isinstance(item, list) else [item]:
            if isinstance(child, ModulePlan):
                if child.path in paths and issubclass(child.cls, ExpertLinear):
                    found.append(child.path)
                found += _experts(child, paths)
    return found


def _outputs(plan: object) -> int:
    """Outputs of a linear layer, or of each expert of one."""
    assert isinstance(plan, ModulePlan)
    weight = plan.fields["weight"]
    assert isinstance(weight, ArrayPlan)
    return weight.shape[-2]
