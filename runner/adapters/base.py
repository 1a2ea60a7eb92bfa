"""The model that adapters are put on: its config, its tensors, and the matrices they can change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from runner.adapters.sites import Site, Stack
from runner.checkpoint.overlay import Change, Overlay
from runner.weights.tags import Source


@dataclass(frozen=True)
class Base:
    """A model's config and tensors, and the matrices that adapters can change.

    Attributes:
        raw: `config.json`'s object.
        sites: the stored matrices, by the name of their module.
        stacks: the fields with experts, by transformers' name of the parameter.
        head: the module name of the model's head.
        tied: the module name of the table that the head shares; None where it shares none.
    """

    raw: Mapping[str, Any]
    source: Source
    sites: Mapping[str, Site]
    stacks: Mapping[str, Stack]
    head: str
    tied: str | None

    def changed(self, changes: Mapping[str, Change], untied: bool, gone: frozenset[str] = frozenset()) -> Base:
        """The model with the tensors `changes` in place of its own, and without those in `gone`.

        Where `untied`, head and embeddings become two: a head that `changes` does not bring is a copy of the table.
        """
        raw = {**self.raw, "tie_word_embeddings": False} if untied else self.raw
        if not untied or self.tied is None:
            return dataclasses.replace(self, raw=raw, source=Overlay(self.source, changes, gone))
        # A quantized table is copied with its scales and biases.
        copies: dict[str, Change] = {}
        for suffix in ("weight", "scales", "biases"):
            header = self.source.headers.get(f"{self.tied}.{suffix}")
            if header is not None and f"{self.head}.weight" not in changes:
                copies[f"{self.head}.{suffix}"] = Change(header, _reader(self.source, f"{self.tied}.{suffix}"))
        # From here on the head has tensors under its own name.
        sites = {name: dataclasses.replace(site, leaf=name) for name, site in self.sites.items()}
        source = Overlay(self.source, {**copies, **changes}, gone)
        return dataclasses.replace(self, raw=raw, source=source, sites=sites, tied=None)


def _reader(source: Source, name: str) -> Callable[[], mx.array]:
    return lambda: source.read(name)
