"""Adapters on a model: checked against it together, then applied when it is loaded, or merged into its tensors.

Whole tensors that an adapter brings (`modules_to_save`, biases) stand in for the base's before the model is planned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from runner.adapters.applying import Applying
from runner.adapters.files import AdapterFiles, checked_weight
from runner.adapters.matching import Factors, Matching, SavedRows
from runner.adapters.sites import HEAD, TABLE, Site, find_sites, head_name, numbers, stored_dtype
from runner.config import Config
from runner.errors import UsageError
from runner.fast import Ops
from runner.overlay import Change, Info, Overlay
from runner.plan import ModulePlan, plan
from runner.weights import Source


@dataclass(frozen=True)
class Base:
    """A model's config and tensors, and where adapters can be. `tied`: the table that the head shares."""

    raw: Mapping[str, Any]
    source: Source
    sites: Mapping[str, Site]
    head: str
    tied: str | None

    def changed(self, changes: Mapping[str, Change], untied: bool) -> Base:
        """With `changes`, and where `untied` with a head of its own: the shared table under the head's name."""
        raw = {**self.raw, "tie_word_embeddings": False} if untied else self.raw
        if not untied or self.tied is None:
            return dataclasses.replace(self, raw=raw, source=Overlay(self.source, changes))
        copies: dict[str, Change] = {}
        for suffix in ("weight", "scales", "biases"):
            header = self.source.headers.get(f"{self.tied}.{suffix}")
            if header is not None and f"{self.head}.weight" not in changes:
                copies[f"{self.head}.{suffix}"] = Change(header, _reader(self.source, f"{self.tied}.{suffix}"))
        sites = {name: dataclasses.replace(site, leaf=name) for name, site in self.sites.items()}
        return Base(raw, Overlay(self.source, {**copies, **changes}), sites, self.head, None)


@dataclass(frozen=True)
class Adapters:
    """Adapters that fit a model.

    Attributes:
        base: the model, with tensors that adapters bring whole in the places of its own.
        weights: by name; layers look into this object at every call, so that `set_weights` is all a change takes.
        fixed: adapters that bring whole tensors: their weights stay as they were when the model was loaded.
    """

    base: Base
    factors: Mapping[str, Sequence[Factors]]
    rows: Mapping[str, Sequence[SavedRows]]
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
        for name in dict.fromkeys([*self.factors, *self.rows]):
            factors, rows = self.active(name, weights)
            whole = {item.adapter: "a DoRA" for item in factors if item.magnitude is not None}
            whole |= {item.adapter: "one with rows for single tokens" for item in rows}
            for adapter, what in whole.items():
                if weights[adapter] != 1:
                    raise UsageError(f"adapter {adapter} is {what}: its weight can be 0 or 1 only")
                if len(factors) + len(rows) > 1:
                    both = " and ".join([*(item.adapter for item in factors), *(item.adapter for item in rows)])
                    raise UsageError(f"adapters {both} change {name} both: {what} does not add up with others")

    def active(self, name: str, weights: Mapping[str, float]) -> tuple[list[Factors], list[SavedRows]]:
        """What changes the site `name` with these weights."""
        factors = [item for item in self.factors.get(name, ()) if weights[item.adapter]]
        return factors, [item for item in self.rows.get(name, ()) if weights[item.adapter]]

    def applied(self, layout: ModulePlan, ops: Ops, dtype: mx.Dtype | None) -> ModulePlan:
        """`layout` (of this `source`) with layers in it that compute base and adapters; `dtype` as in `build`."""
        return Applying(self.base.sites, self.factors, self.rows, self.weights, ops, dtype).module(layout)

    def merged(self) -> Base:
        """The model with the adapters added to its tensors: each changed matrix as numbers in the dtype it has (packed:
        in that of its scales), all others as they are. Head and embeddings that differ then are two tensors."""
        changes: dict[str, Change] = {}
        ends = [name for name, site in self.base.sites.items() if site.group in (HEAD, TABLE)]
        apart = any(self.active(name, self.weights)[0] for name in ends)
        for name in dict.fromkeys([*self.factors, *self.rows]):
            site, (factors, rows) = self.base.sites[name], self.active(name, self.weights)
            if (factors or rows) and (apart or site.leaf == name):
                changes[f"{name}.weight"] = self._merge(site, factors, rows)
        return self.base.changed(changes, apart)

    def _merge(self, site: Site, factors: Sequence[Factors], rows: Sequence[SavedRows]) -> Change:
        source = self.base.source

        def read() -> mx.array:
            stored = numbers(source, site)
            matrix = (stored.T if site.transposed else stored).astype(mx.float32)
            for item in factors:
                scale = item.scale * self.weights[item.adapter]
                matrix = matrix + scale * (item.up().astype(mx.float32) @ item.down().astype(mx.float32))
                lengths = item.lengths()
                if lengths is not None:
                    matrix = matrix * (lengths.astype(mx.float32) / mx.linalg.norm(matrix, axis=1))[:, None]
            for saved in rows:
                matrix[mx.array(saved.tokens)] = saved.read().astype(mx.float32)
            return mx.contiguous(matrix.T if site.transposed else matrix).astype(stored.dtype)

        return Change(Info(stored_dtype(source, site), site.shape[::-1] if site.transposed else site.shape), read)


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
    sites = find_sites(layout, head)
    tied = next((site.leaf for site in sites.values() if site.group == HEAD and site.leaf != site.name), None)
    factors: dict[str, list[Factors]] = {}
    rows: dict[str, list[SavedRows]] = {}
    changes: dict[str, Change] = {}
    owner: dict[str, str] = {}
    untied = False
    fixed = set()
    for adapter in adapters:
        matching = Matching(adapter, base, sites, tied, config.tie_word_embeddings)
        for name, item in matching.factors.items():
            factors.setdefault(name, []).append(item)
        for name, saved in matching.rows.items():
            rows.setdefault(name, []).append(saved)
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
    model = Base(raw, base, sites, head, tied).changed(changes, untied)
    result = Adapters(model, factors, rows, weights, frozenset(fixed))
    result.check(weights)
    return result


def _reader(source: Source, name: str) -> Callable[[], mx.array]:
    return lambda: source.read(name)
