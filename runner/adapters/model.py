"""Adapters on a model: checked against it together, then applied when it is loaded, or merged into its tensors.

Whole tensors that an adapter brings (`modules_to_save`, biases) replace the base's before the model is planned.
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
from runner.adapters.mlx_config import MlxConfig
from runner.adapters.mlx_matching import MlxMatching
from runner.adapters.parts import Matched, Parts
from runner.adapters.target import Target
from runner.adapters.used import Used, Weights
from runner.checkpoint.overlay import Change
from runner.config.base import Config
from runner.errors import UsageError
from runner.ops.table import Ops
from runner.weights.plan import ModulePlan
from runner.weights.tags import Source


@dataclass(frozen=True)
class Adapters:
    """Adapters that have been matched against a model.

    Attributes:
        base: the model, with the whole tensors that adapters bring in place of its own.
        parts: the factors and the rows for single tokens.
        weights: each adapter's weight by name, as the next answer will use it; `set_weights` changes it.
        used: what the layers read at every call; `use` changes it.
        fixed: names of adapters that bring whole tensors: their weights cannot change after loading.
        vocabulary: the adapters that change embeddings or head: a tokenizer beside them may have tokens of theirs.
    """

    base: Base
    parts: Parts
    weights: dict[str, float]
    used: Used
    fixed: frozenset[str]
    vocabulary: tuple[AdapterFiles, ...]

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change the weights of the named adapters.

        Raises:
            UsageError: a name is unknown or a weight not allowed; nothing is changed then.
        """
        self.weights.update(self._changed(weights))

    def only(self, weights: Mapping[str, float]) -> dict[str, float]:
        """All weights where the named adapters have these, and the others are off.

        Raises:
            UsageError: as `set_weights`.
        """
        return self.weights | self._changed({**dict.fromkeys(self.weights.keys() - self.fixed, 0.0), **weights})

    def _changed(self, weights: Mapping[str, float]) -> dict[str, float]:
        """`weights`, once they were checked beside those of the other adapters."""
        changed = {name: checked_weight(name, weight) for name, weight in weights.items()}
        unknown = [name for name in changed if name not in self.weights]
        if unknown:
            raise UsageError(f"no adapter is called {unknown[0]!r}; there are {', '.join(self.weights) or 'none'}")
        for name in self.fixed & changed.keys():
            if changed[name] != self.weights[name]:
                raise UsageError(
                    f"adapter {name} replaced whole tensors when the model was loaded: its weight stays "
                    f"{self.weights[name]:g}; to change it, load the model again"
                )
        # Check before anything changes, so that a refused call leaves the weights as they were.
        self.check(self.weights | changed)
        return changed

    def check_switches(self) -> None:
        """Refuse adapters that cannot be turned on and off while the model is loaded.

        Raises:
            UsageError: one replaces whole tensors, or was left out because its vocabulary is not the model's.
        """
        there = {item.adapter for items in self.parts.factors.values() for item in items}
        there |= {item.adapter for items in self.parts.stacked.values() for item in items}
        there |= {item.adapter for items in self.parts.rows.values() for item in items}
        for name in self.weights:
            if name in self.fixed or name not in there:
                why = "replaces whole tensors" if name in self.fixed else "has a vocabulary of its own"
                raise UsageError(
                    f"adapter {name} {why}, and cannot share its base: merge it ('runner convert --adapter')"
                )

    def use(self, *runs: tuple[int, Weights]) -> None:
        """Let the layers compute with these weights, which were checked when they were set: of so many tokens each."""
        self.used.set(runs)

    def check(self, weights: Mapping[str, float]) -> None:
        """Check that DoRA and rows for single tokens have a defined result.

        Raises:
            UsageError: such an adapter has a weight other than 0 or 1, or changes a matrix that another one changes.
        """
        for name in self.parts.sites():
            factors, rows = self.parts.active(name, weights)
            whole = {item.adapter: "a DoRA" for item in factors if item.magnitude is not None}
            whole |= {item.adapter: "one with rows for single tokens" for item in rows}
            for adapter, what in whole.items():
                if weights[adapter] != 1:
                    raise UsageError(f"adapter {adapter} is {what}: its weight can only be 0 or 1")
                if len(factors) + len(rows) > 1:
                    both = " and ".join([*(item.adapter for item in factors), *(item.adapter for item in rows)])
                    raise UsageError(f"adapters {both} both change {name}: {what} cannot be combined with others")

    def applied(self, layout: ModulePlan, ops: Ops, dtype: mx.Dtype | None) -> ModulePlan:
        """The plan `layout` of `base` with adapted layers where adapters change it; `dtype` as in `build`."""
        return Applying(self.base, self.parts, self.weights, self.used, ops, dtype).module(layout)

    def merged(self) -> Base:
        """The model with the adapters merged into its tensors."""
        return merged(self.base, self.parts, self.weights)


def fit(
    raw: Mapping[str, Any], classes: tuple[type[Config], type], base: Source, adapters: Sequence[AdapterFiles]
) -> Adapters:
    """Match adapters against a model; only headers are read.

    Args:
        raw: `config.json`'s object.
        classes: the family's config and model.

    Raises:
        WeightsError: a tensor of an adapter is unused, missing, or of the wrong shape or dtype; the message lists all
            problems of one adapter.
        UsageError: an adapter has a weight that is not allowed for it, or two adapters bring the same tensor.
    """
    target = Target.of(raw, classes, base)
    # One vocabulary for all that are on; an adapter that is off is matched against its own, and left out.
    for adapter in adapters:
        if adapter.weight and (resized := target.of_length(adapter)) is not target:
            target = resized
            break
    parts = Parts()
    changes: dict[str, Change] = {}
    owner: dict[str, str] = {}
    untied = False
    fixed = set()
    vocabulary = []
    for adapter in adapters:
        own = target if adapter.weight else target.of_length(adapter)
        found = matched(adapter, own)
        if found.changes:
            # Whole tensors replace the base's, so a fraction of them means nothing, and two cannot share a place.
            fixed.add(adapter.name)
            if adapter.weight not in (0, 1):
                first = next(iter(found.changes))
                raise UsageError(f"adapter {adapter.name} replaces {first} as a whole: its weight can only be 0 or 1")
        if own is not target:
            continue
        for name, item in found.factors.items():
            parts.factors.setdefault(name, []).append(item)
        for name, experts in found.stacked.items():
            parts.stacked.setdefault(name, []).append(experts)
        for name, saved in found.rows.items():
            parts.rows.setdefault(name, []).append(saved)
        if not adapter.weight:
            continue
        touched = {name.removesuffix(".weight") for name in found.changes} | found.factors.keys() | found.rows.keys()
        if touched & target.tables.keys():
            vocabulary.append(adapter)
        untied |= found.untied
        for name, change in found.changes.items():
            if name in changes:
                raise UsageError(f"adapters {owner[name]} and {adapter.name} both replace {name}: use one at a time")
            changes[name], owner[name] = change, adapter.name
    # Weights are checked together: what is not allowed depends on which adapters share a matrix.
    weights = {adapter.name: adapter.weight for adapter in adapters}
    model = Base(target.raw, target.source, target.sites, target.stacks, target.head, target.tied)
    model = model.changed(changes, untied)
    result = Adapters(model, parts, weights, Used(weights), frozenset(fixed), tuple(vocabulary))
    result.check(weights)
    return result


def matched(adapter: AdapterFiles, target: Target) -> Matched:
    """What `adapter` brings for `target`, whichever format it is in; raises `WeightsError` where it does not fit."""
    source, sites, stacks, tied = target.source, target.sites, target.stacks, target.tied
    if isinstance(adapter.config, MlxConfig):
        return MlxMatching(adapter, adapter.config, source, sites, stacks, target.head, tied).found
    return Matching(adapter, adapter.config, source, sites, stacks, tied, target.ties).found
