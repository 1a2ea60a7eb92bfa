"""The model that adapters are matched against, with a vocabulary of the length that they were trained on.

Fine-tuning often adds tokens, or cuts a padded vocabulary to the tokenizer's (`resize_token_embeddings`). PEFT then
saves embeddings and head as whole tensors, which do not have the base's rows: they decide how many there are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from runner.adapters.files import AdapterFiles
from runner.adapters.sites import HEAD, TABLE, Site, Stack, find_sites, find_stacks, head_name, short
from runner.checkpoint.overlay import Change, Info, Overlay
from runner.config.base import Config
from runner.errors import WeightsError
from runner.weights.plan import plan
from runner.weights.problems import Problems
from runner.weights.tags import Header, Source

_WRAPPERS = re.compile(r"\.(?:token_adapter\.base_layer|base_layer|modules_to_save|original_module)\.")


def base_name(full: str) -> str:
    """The name of a whole tensor of an adapter as the base has it: without PEFT's prefix and wrappers."""
    return _WRAPPERS.sub(".", full.removeprefix("base_model.model."))


def copies(headers: Mapping[str, Header]) -> frozenset[str]:
    """Whole tensors that stand in an adapter's file again under another name.

    Of a resized module in `modules_to_save`, PEFT saves its tensor, the same as `modules_to_save.`, and the base's as
    `original_module.`; it reads back the first.
    """
    wrapped = (".modules_to_save.", ".original_module.")
    return frozenset(
        full for full in headers if any(mark in full and full.replace(mark, ".") in headers for mark in wrapped)
    )


@dataclass(frozen=True)
class Target:
    """A model to put adapters on; the attributes are those of `Base`.

    Attributes:
        ties: whether the config says that the head shares the embeddings.
        classes: the family's config and model.
    """

    raw: Mapping[str, Any]
    source: Source
    sites: Mapping[str, Site]
    stacks: Mapping[str, Stack]
    head: str
    tied: str | None
    ties: bool
    classes: tuple[type[Config], type]

    @classmethod
    def of(cls, raw: Mapping[str, Any], classes: tuple[type[Config], type], source: Source) -> Target:
        """Plan the model; raises `WeightsError` where its tensors do not fit."""
        config_class, model_class = classes
        config = config_class.from_dict(raw)
        layout = plan(model_class, config, source.headers)
        head = head_name(model_class)
        sites = find_sites(layout, head)
        # A head stored under another module's name shares that module's table.
        tied = next((site.leaf for site in sites.values() if site.group == HEAD and site.leaf != site.name), None)
        return cls(raw, source, sites, find_stacks(layout), head, tied, config.tie_word_embeddings, classes)

    @property
    def tables(self) -> dict[str, Site]:
        """The embeddings and the head, by the names that their modules may have."""
        return {name: site for name, site in self.sites.items() if site.group in (TABLE, HEAD) or name == self.head}

    def of_length(self, adapter: AdapterFiles) -> Target:
        """The model with as many tokens as `adapter` was trained on; this one where the number is the same.

        Raises:
            WeightsError: the tables in the adapter have different lengths, or one with as many rows is not there.
        """
        brought = self.brought(adapter)
        lengths = {header.shape[0] for _, header in brought.values()}
        tables = self.tables
        length = next((site.shape[0] for site in tables.values()), 0)
        # Where one table has the base's length, another that has not is wrong, and reported when it is matched.
        if not lengths or length in lengths:
            return self
        where = f"{adapter.source.directory}: the adapter does not fit the model"
        if len(lengths) > 1:
            found = ", ".join(f"{full} has {header.shape[0]} rows" for full, header in brought.values())
            raise WeightsError(f"{where}: it was trained on one vocabulary, but {found}")
        # Everything with a row for each token has to come with the adapter: the base has no rows for its tokens.
        (rows,) = lengths
        needed = [f"{name}.weight" for name in dict.fromkeys(site.leaf for site in tables.values())]
        needed += [f"{self.head}.bias"] if f"{self.head}.bias" in self.source.headers else []
        lacking = [name for name in needed if name not in brought]
        if lacking:
            full, header = next(iter(brought.values()))
            problems = Problems()
            problems.shape(full, header.shape, (length, *header.shape[1:]))
            raise WeightsError(
                f"{problems.message((), where)}; for a vocabulary of {rows} tokens the adapter lacks "
                f"{' and '.join(lacking)} (PEFT saves it with save_embedding_layers=True)"
            )
        changes = {}
        for name in needed:
            full, header = brought[name]
            read = partial(type(adapter.source).read, adapter.source, full)
            changes[name] = Change(Info(header.dtype, header.shape), read)
        return Target.of({**self.raw, "vocab_size": rows}, self.classes, Overlay(self.source, changes))

    def brought(self, adapter: AdapterFiles) -> dict[str, tuple[str, Header]]:
        """The adapter's whole tensors with a row for each token, by the base's name: name in the file and header."""
        tables = {short(name): site for name, site in self.tables.items()}
        again = copies(adapter.source.headers)
        result: dict[str, tuple[str, Header]] = {}
        for full, header in adapter.source.headers.items():
            module, _, last = base_name(full).rpartition(".")
            site = tables.get(short(module))
            if site is None or full in again:
                continue
            # Any other shape is wrong, and reported when the adapter is matched.
            width = {"weight": site.shape[1:], "bias": ()}.get(last)
            if width is not None and header.shape and header.shape[0] and header.shape[1:] == width:
                result[f"{site.name}.{last}"] = full, header
        return result
