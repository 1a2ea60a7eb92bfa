"""Matches one adapter in mlx-lm's format against a model: each of its tensors finds its place or is reported.

Source: mlx-lm 0.32.2, `mlx_lm/tuner/lora.py` and `dora.py`. A linear layer has `lora_a` `[in, r]` and `lora_b`
`[r, out]`, an embedding `[vocab_size, r]` and `[r, width]`, experts `[E, r, in]` and `[E, out, r]`. DoRA adds `m`
`[out]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from runner.adapters.files import AdapterFiles, stop_at_many
from runner.adapters.mlx_config import MlxConfig
from runner.adapters.parts import Factors, Matched, SwitchFactors
from runner.adapters.sites import FLOATS, Site, Stack, in_file_order, short
from runner.checkpoint.overlay import Change, Info
from runner.errors import WeightsError
from runner.nn.linear import Embedding, Linear
from runner.nn.moe import ExpertLinear
from runner.weights.problems import Problems
from runner.weights.tags import Header, Source

_FACTOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)")
_LAYER = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")
_STACKED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
"""The field that holds a matrix of mlx-lm's experts."""


@dataclass(frozen=True)
class Turned:
    """A `Source` with mlx-lm's two factors of a matrix transposed, as PEFT stores them: `[r, in]` and `[out, r]`."""

    base: Source

    @property
    def headers(self) -> Mapping[str, Header]:
        """Headers of all tensors, the factors' shapes turned around."""
        return {
            name: Info(header.dtype, header.shape[::-1]) if _turns(name) else header
            for name, header in self.base.headers.items()
        }

    def read(self, name: str) -> mx.array:
        """Return the tensor `name`."""
        array = self.base.read(name)
        return array.T if _turns(name) else array


def _turns(name: str) -> bool:
    return name.endswith((".lora_a", ".lora_b"))


class MlxMatching:
    """One adapter in mlx-lm's format matched against the sites of a model.

    Attributes:
        found: what the adapter brings.
    """

    def __init__(
        self, adapter: AdapterFiles, config: MlxConfig, base: Source, sites: Mapping[str, Site],
        stacks: Mapping[str, Stack], head: str, tied: str | None,
    ) -> None:  # fmt: skip
        """Match the adapter.

        Args:
            head: the module name of the model's head.
            tied: the name of the table that the head shares, if the checkpoint has one tensor for both.

        Raises:
            WeightsError: the adapter does not fit the model; the message lists all problems.
        """
        self.adapter, self.config, self.base, self.sites = adapter, config, base, sites
        self.head, self.tied = head, tied
        self.problems = Problems()
        self.by_short = {short(name): site for name, site in sites.items()}
        self.base_short = {short(name): name for name in base.headers}
        self.by_switch = {short(name): stack for name, stack in stacks.items()}
        indices = [found for name in [*sites, *stacks] if (found := _layer_of(name)[0]) is not None]
        self.layers = max(indices, default=-1) + 1
        self.found = Matched()
        self.pairs: dict[str, list[tuple[str, str, int]]] = {}
        self.there: set[tuple[int, str]] = set()
        """Layers and names within them for which the adapter has tensors, right or wrong."""
        self.spelled: dict[str, str] = {}
        """Names within a layer as the adapter spells them, by their common spelling."""
        self.left: dict[str, None] = {}  # tensors that have no place, in their order
        self.match()

    def match(self) -> None:
        """Sort the adapter's tensors by their names, then check that each fits and none is missing."""
        # The factors of a module are checked together, once all of them are found.
        modules: dict[str, dict[str, str]] = {}
        for full in self.adapter.source.headers:
            factor = _FACTOR.fullmatch(full)
            if self.config.kind == "full":
                self.whole(full)
            elif factor is None:
                self.unused(full)
            else:
                modules.setdefault(factor["module"], {})[factor["part"]] = full
        for module, tensors in modules.items():
            self.module(module, tensors)
        for name, pairs in self.pairs.items():
            self.found.stacked[name] = self.switch(name, pairs)
        self.expect()
        for full, header in self.adapter.source.headers.items():
            if header.dtype not in FLOATS and full not in self.left:
                self.problems.dtype(full, header.dtype, FLOATS)
        if self.problems.count:
            title = f"{self.adapter.source.directory}: the adapter does not fit the model"
            raise WeightsError(self.problems.message(self.left, title))

    def unused(self, full: str) -> None:
        """Report a tensor of the adapter that has no place in the model."""
        self.left[full] = None
        self.problems.unused(full, self.adapter.source.headers[full].shape)
        stop_at_many(self.problems, self.adapter.source.directory)

    def site(self, module: str) -> Site | None:
        """The site of a module, by its full name or by the name without prefixes."""
        return self.sites.get(module) or self.by_short.get(short(module))

    def module(self, module: str, tensors: Mapping[str, str]) -> None:
        """Check the factors of one module; those that fit are kept."""
        site = self.site(module)
        stack, start, rows = self.stack(module) if site is None else (None, 0, 0)
        if site is None and stack is None:
            for full in tensors.values():
                self.unused(full)
            return
        self.note(module)
        layer, within = _layer_of(module)
        if not self.config.gives(module, layer, within, self.layers):
            self.problems.other(
                f"{module} has an adapter, but num_layers and lora_parameters.keys in adapter_config.json exclude it"
            )
            return
        expected = self.shapes(site, stack, rows)
        if self.config.kind == "dora":
            if site is None or site.kind is not Linear:
                self.problems.other(f"{module}: DoRA is supported for linear layers only")
                return
            expected["m"] = (site.shape[0],)
        for part, full in tensors.items():
            shape = self.adapter.source.headers[full].shape
            if part not in expected:
                self.unused(full)
            elif shape != expected[part]:
                self.problems.shape(full, shape, expected[part])
        for part, needed in expected.items():
            if part not in tensors:
                self.problems.missing(f"{module}.{part}", needed)
        if not tensors.keys() >= expected.keys():
            return
        if stack is not None:
            self.pairs.setdefault(stack.name, []).append((tensors["lora_a"], tensors["lora_b"], start))
        elif site is not None:
            self.keep(site, tensors)

    def shapes(self, site: Site | None, stack: Stack | None, rows: int) -> dict[str, tuple[int, ...]]:
        """The shapes of `lora_a` and `lora_b` for a site, or for `rows` rows of each expert of a stack."""
        rank = self.config.rank
        if stack is not None:
            return {"lora_a": (stack.shape[0], rank, stack.shape[2]), "lora_b": (stack.shape[0], rows, rank)}
        assert site is not None
        out, width = site.shape
        if site.kind is Embedding:
            return {"lora_a": (out, rank), "lora_b": (rank, width)}
        return {"lora_a": (width, rank), "lora_b": (rank, out)}

    def keep(self, site: Site, tensors: Mapping[str, str]) -> None:
        """Keep the factors of one matrix; those of a table change the head that shares it too, as in mlx-lm."""
        name, source, scale = self.adapter.name, self.adapter.source, self.config.scale
        a, b = tensors["lora_a"], tensors["lora_b"]
        self.found.factors[site.name] = Factors(name, Turned(source), site.kind, scale, a, b, tensors.get("m"))
        if site.kind is Embedding and site.name == self.tied:
            # As a matrix of the head, the table's A `[vocab_size, r]` comes last: it takes the place of B `[out, r]`.
            self.found.factors[self.head] = Factors(name, source, Linear, scale, b, a)

    def stack(self, module: str) -> tuple[Stack | None, int, int]:
        """The field of a layer's experts that holds the matrix `module`, its first row there, and its rows."""
        above, _, last = _common(short(module)).rpartition(".")
        stack = self.by_switch.get(f"{above}.{_STACKED.get(last, last)}")
        if stack is None:
            return None, 0, 0
        rows = stack.shape[1] // (1 if last == "down_proj" else 2)
        return stack, rows if last == "up_proj" else 0, rows

    def switch(self, name: str, pairs: list[tuple[str, str, int]]) -> SwitchFactors:
        """The factors for all experts of the stack `name`."""
        stack = next(stack for stack in self.by_switch.values() if stack.name == name)
        return SwitchFactors(
            self.adapter.name,
            self.adapter.source,
            self.config.scale,
            tuple(pairs),
            stack.shape[1],
            partial(in_file_order, stack),
        )

    def whole(self, full: str) -> None:
        """Match a tensor that replaces one of the base, or the experts' tensors that the base keeps apart."""
        source = self.adapter.source
        module, _, last = full.rpartition(".")
        self.note(full)
        site = self.site(module) if last == "weight" else None
        own = full if full in self.base.headers else self.base_short.get(short(full))
        if site is not None and site.leaf == site.name:
            # mlx-lm holds every matrix as `[out, width]`, and trains only those that are not quantized.
            read = partial(_turned if site.transposed else type(source).read, source, full)
            self.change(full, f"{site.name}.weight", site.shape, read, site.transposed)
        elif own is not None and site is None:
            self.change(full, own, self.base.headers[own].shape, partial(type(source).read, source, full))
        elif last != "weight" or not self.experts(full, module):
            self.unused(full)

    def experts(self, full: str, module: str) -> bool:
        """Match one tensor of all experts to the base's tensors of each; returns False where there are none."""
        stack, start, rows = self.stack(module)
        if stack is None:
            return False
        leaves = [part.leaf for parts in stack.pieces for part in parts if part.offset == start]
        if len(leaves) != stack.shape[0]:
            return False
        header = self.adapter.source.headers[full]
        shape = (stack.shape[0], rows, stack.shape[2])
        if header.shape != shape:
            self.problems.shape(full, header.shape, shape)
            return True
        for expert, leaf in enumerate(leaves):
            read = partial(_expert, self.adapter.source, full, expert)
            self.found.changes[f"{leaf}.weight"] = Change(Info(header.dtype, shape[1:]), read)
        return True

    def change(
        self, full: str, own: str, shape: tuple[int, ...], read: Callable[[], mx.array], turned: bool = False
    ) -> None:
        """Put the tensor `full`, which has to have `shape`, in place of the base's `own`."""
        header = self.adapter.source.headers[full]
        if header.shape != shape:
            self.problems.shape(full, header.shape, shape)
            return
        self.found.changes[own] = Change(Info(header.dtype, shape[::-1] if turned else shape), read)

    def note(self, name: str) -> None:
        """Remember that the adapter has something for this place in this layer, right or wrong."""
        layer, within = _layer_of(name)
        if layer is not None:
            self.there.add((layer, _common(within)))
            self.spelled[_common(within)] = within

    def expect(self) -> None:
        """Report what the config promises, or other layers have, and the adapter lacks.

        Where the config lists no modules, each layer must have tensors for what any of them has them for.
        """
        if not self.adapter.source.headers:
            self.problems.other("the adapter has no tensors")
        first = self.layers - (self.config.num_layers or self.layers)
        names = self.spelled | {_common(key): key for key in self.config.keys or ()}
        for full, shape in self.places():
            layer, within = _layer_of(full)
            common = _common(within)
            if layer is not None and layer >= first and common in names and (layer, common) not in self.there:
                name = full.removesuffix(within) + names[common]
                self.problems.missing(name if self.config.kind == "full" else f"{name}.lora_a", shape)

    def places(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Everything that can have tensors: modules with the shape of their `lora_a`, or whole tensors."""
        if self.config.kind == "full":
            yield from ((name, header.shape) for name, header in self.base.headers.items())
            return
        for site in self.sites.values():
            if site.kind is not ExpertLinear:
                yield site.name, self.shapes(site, None, 0)["lora_a"]
        for stack in self.by_switch.values():
            above, _, field = stack.name.rpartition(".")
            for last in (last for last, of in _STACKED.items() if of == field):
                yield f"{above}.{last}", self.shapes(None, stack, 0)["lora_a"]


def _common(name: str) -> str:
    """The name of a module of a mixture of experts as transformers 5 has it, whatever release or mlx-lm wrote it."""
    return f".{name}".replace(".block_sparse_moe.", ".mlp.").replace(".switch_mlp.", ".experts.")[1:]


def _turned(source: Source, name: str) -> mx.array:
    return source.read(name).T


def _expert(source: Source, name: str, expert: int) -> mx.array:
    return source.read(name)[expert]


def _layer_of(name: str) -> tuple[int | None, str]:
    """The index of the layer that `name` lies in, and its name within the layer; None and "" outside the layers."""
    found = _LAYER.fullmatch(name)
    return (int(found[1]), found[2]) if found is not None and len(found[1]) < 10 else (None, "")
