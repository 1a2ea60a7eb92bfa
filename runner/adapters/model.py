"""Adapters on a model: checked against it together, then applied when it is loaded, or merged into its tensors.

Whole tensors that an adapter brings (`modules_to_save`, biases) stand in for the base's before the model is planned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from runner.adapters.applying import Applying
from runner.adapters.base import Base
from runner.adapters.files import AdapterFiles, checked_weight
from runner.adapters.matching import Matching
from runner.adapters.merging import merged
from runner.adapters.parts import Parts
from runner.adapters.sites import HEAD, find_sites, find_stacks, head_name
from runner.checkpoint.overlay import Change
from runner.config.base import Config
from runner.errors import UsageError
from runner.ops.table import Ops
from runner.weights.plan import ModulePlan, plan
from runner.weights.tags import Source


@dataclass(frozen=True)
class Adapters:
    """Adapters that fit a model.

    Attributes:
        base: the model, with tensors that adapters bring whole in the places of its own.
        weights: by name; layers look into this object at every call, so that `set_weights` is all a change takes.
        fixed: adapters that bring whole tensors: their weights stay as they were when the model was loaded.
    """

    base: Base
    parts: Parts
    weights: dict[str, float]
    fixed: frozenset[str]

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change the weights of the adapters named.

        Raises:
            UsageError: a name or a weight that is not possible; nothing is changed then.
        """
        changed = {name: checked_weight(name, weight) for name, weight in weights.items()}
        unknown = [name for name in changed if name not in self.weights]
        if unknown:
            raise UsageError(f"no adapter is called {unknown[0]!r}; there are {', '.join(self.weights) or 'none'}")
        for name in self.fixed & changed.keys():
            if changed[name] != self.weights[name]:
                raise UsageError(
                    f"adapter {name} brings whole tensors, which took their places when the model was loaded: "
                    f"its weight stays {self.weights[name]:g}; load the model again"
                )
        self.check(self.weights | changed)
        self.weights.update(changed)

    def check(self, weights: Mapping[str, float]) -> None:
        """Raises `UsageError` where a DoRA or rows of tokens would have no defined result: a part of one, or a sum."""
        for name in self.parts.sites():
            factors, rows = self.parts.active(name, weights)
            whole = {item.adapter: "a DoRA" for item in factors if item.magnitude is not None}
            whole |= {item.adapter: "one with rows for single tokens" for item in rows}
            for adapter, what in whole.items():
                if weights[adapter] != 1:
                    raise UsageError(f"adapter {adapter} is {what}: its weight can be 0 or 1 only")
                if len(factors) + len(rows) > 1:
                    both = " and ".join([*(item.adapter for item in factors), *(item.adapter for item in rows)])
                    raise UsageError(f"adapters {both} change {name} both: {what} does not add up with others")

    def applied(self, layout: ModulePlan, ops: Ops, dtype: mx.Dtype | None) -> ModulePlan:
        """`layout` (of this `source`) with layers in it that compute base and adapters; `dtype` as in `build`."""
        return Applying(self.base, self.parts, self.weights, ops, dtype).module(layout)

    def merged(self) -> Base:
        """The model with the adapters in its tensors."""
        return merged(self.base, self.parts, self.weights)


def fit(
    raw: Mapping[str, Any], classes: tuple[type[Config], type], base: Source, adapters: Sequence[AdapterFiles]
) -> Adapters:
    """Match adapters with a model; only headers are read.

    Args:
        raw: `config.json`'s object.
        classes: the family's config and model.

    Raises:
        WeightsError: a tensor of an adapter that nothing takes, one that is missing, a wrong shape or dtype: all
            problems of one adapter at once.
        UsageError: a weight that its adapter cannot have, or two that bring the same tensor.
    """
    config_class, model_class = classes
    config = config_class.from_dict(raw)
    layout = plan(model_class, config, base.headers)
    head = head_name(model_class)
    sites, stacks = find_sites(layout, head), find_stacks(layout)
    tied = next((site.leaf for site in sites.values() if site.group == HEAD and site.leaf != site.name), None)
    parts = Parts()
    changes: dict[str, Change] = {}
    owner: dict[str, str] = {}
    untied = False
    fixed = set()
    for adapter in adapters:
        matching = Matching(adapter, base, sites, stacks, tied, config.tie_word_embeddings)
        for name, item in matching.factors.items():
            parts.factors.setdefault(name, []).append(item)
        for name, experts in matching.stacked.items():
            parts.stacked.setdefault(name, []).append(experts)
        for name, saved in matching.rows.items():
            parts.rows.setdefault(name, []).append(saved)
        if not matching.changes:
            continue
        fixed.add(adapter.name)
        if adapter.weight not in (0, 1):
            first = next(iter(matching.changes))
            raise UsageError(f"adapter {adapter.name} brings {first} whole: its weight can be 0 or 1 only")
        if not adapter.weight:
            continue
        untied |= matching.untied
        for name, change in matching.changes.items():
            if name in changes:
                raise UsageError(f"adapters {owner[name]} and {adapter.name} bring {name} both: one at a time")
            changes[name], owner[name] = change, adapter.name
    weights = {adapter.name: adapter.weight for adapter in adapters}
    model = Base(raw, base, sites, stacks, head, tied).changed(changes, untied)
    result = Adapters(model, parts, weights, frozenset(fixed))
    result.check(weights)
    return result
