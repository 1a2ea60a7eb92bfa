"""Matches one adapter against a model: each of its tensors finds its place or is reported; no tensor is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property

from runner.adapters.config import AdapterConfig
from runner.adapters.files import CONFIG, AdapterFiles, stop_at_many
from runner.adapters.parts import Factors, Matched, SavedRows, StackFactors
from runner.adapters.sites import FLOATS, HEAD, PREFIXES, TABLE, Site, Stack, short
from runner.adapters.target import base_name, copies
from runner.checkpoint.overlay import Change, Info
from runner.errors import ConfigError, WeightsError
from runner.nn.linear import Embedding, Linear
from runner.nn.moe import ExpertLinear
from runner.weights.problems import Problems
from runner.weights.tags import HARMLESS, Source

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<linear>[AB])(?:\.default)?\.weight|lora_embedding_(?P<embedding>[AB])(?:\.default)?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.default)?(?:\.weight)?)"
)
_TOKENS = ".token_adapter.trainable_tokens_delta"


class Matching:
    """One adapter matched against the sites of a model.

    Attributes:
        found: what the adapter brings.
    """

    def __init__(
        self,
        adapter: AdapterFiles,
        config: AdapterConfig,
        base: Source,
        sites: Mapping[str, Site],
        stacks: Mapping[str, Stack],
        tied: str | None,
        ties: bool,
    ) -> None:
        """Match the adapter.

        Args:
            tied: the name of the table that the head shares, if the checkpoint has one tensor for both.
            ties: whether the config says that the head shares the table.

        Raises:
            WeightsError: the adapter does not fit the model; the message lists all problems.
            ConfigError: the config's patterns take too long to match.
        """
        self.adapter, self.config = adapter, config
        self.base, self.sites, self.stacks = base, sites, stacks
        self.tied, self.ties = tied, ties
        self.head = next((name for name, site in sites.items() if site.group == HEAD), "lm_head")
        self.problems = Problems()
        self.by_short = {short(name): site for name, site in sites.items()}
        self.base_short = {short(name): name for name in base.headers}
        self.found = Matched()
        self.seen: set[str] = set()
        """Tensors of the base, stacks and modules with token rows for which the adapter has something, right or wrong.

        What is wrong is reported once, where it is found, and not again as missing."""
        self.pairs: dict[str, dict[str, str]] = {}
        """Factors of experts that fit no stack which they may be for."""
        try:
            self.match()
        except ConfigError as error:  # patterns that take too long are noticed when they are matched
            raise ConfigError(f"{adapter.source.directory / CONFIG}: {error}") from error

    def match(self) -> None:
        """Sort the adapter's tensors by their names, then check that each fits and none is missing."""
        # Factors of a module are checked together, once all of them are found.
        found: dict[str, dict[str, str]] = {}
        self.left: dict[str, None] = {}  # tensors that have no place, in their order
        # PEFT wraps the model and its layers: names start with `base_model.model.` and may contain `.base_layer.`.
        again = copies(self.adapter.source.headers)
        for full in self.adapter.source.headers:
            if full in again:
                continue
            name = full.removeprefix("base_model.model.")
            factor = _FACTOR.fullmatch(name)
            if factor is not None:
                kind = "m" if factor["magnitude"] else factor["linear"] or f"e{factor['embedding']}"
                tensors = found.setdefault(factor["module"], {})
                if kind in tensors:
                    self.twice(full)
                tensors[kind] = full
            elif name.endswith(_TOKENS):
                self.tokens(name.removesuffix(_TOKENS), full)
            else:
                self.whole(base_name(full), full)
        for module, tensors in found.items():
            self.module(module, tensors)
            stop_at_many(self.problems, self.adapter.source.directory)
        for module, tensors in self.pairs.items():
            self.misfit(module, tensors)
        self.expect(found)
        for full, header in self.adapter.source.headers.items():
            if header.dtype not in FLOATS and full not in self.left:
                self.problems.dtype(full, header.dtype, FLOATS)
        if self.problems.count:
            title = f"{self.adapter.source.directory}: the adapter does not fit the model"
            raise WeightsError(self.problems.message(self.left, title))

    def site(self, module: str) -> Site | None:
        """The site of a module, by its full name or by the name without prefixes."""
        return self.sites.get(module) or self.by_short.get(short(module))

    def in_all_linear(self, site: Site) -> bool:
        """Whether `all-linear` includes the site."""
        return site.kind is not Embedding and site.name != self.head

    def whole_tables(self) -> list[str]:
        """Names of the sites with one row per token: the embeddings and the head."""
        return [name for name, site in self.sites.items() if name == self.head or site.group == TABLE]

    def unused(self, full: str) -> None:
        """Report a tensor of the adapter that has no place in the model."""
        self.left[full] = None
        self.problems.unused(full, self.adapter.source.headers[full].shape)
        stop_at_many(self.problems, self.adapter.source.directory)

    def twice(self, full: str) -> None:
        """Report a second tensor for one place."""
        self.problems.other(f"{full} is given twice, under two names")
        stop_at_many(self.problems, self.adapter.source.directory)

    def module(self, module: str, tensors: dict[str, str]) -> None:
        """Check the factors of one module; those that fit are kept."""
        site, adapter = self.site(module), self.adapter
        if site is None:
            if not self.stack(module, tensors):
                for full in tensors.values():
                    self.unused(full)
            return
        if site.name in self.found.factors:
            self.twice(next(iter(tensors.values())))
        # The file's own spelling counts too: patterns were written for the names that PEFT saw.
        names = [module, *site.spellings]
        if not self.config.targets(names, linear=self.in_all_linear(site)):
            self.problems.other(f"{module} has an adapter, but adapter_config.json does not target it")
            return
        # An embedding looks up rows of A, so its A is `[r, vocab_size]` and its B `[width, r]`.
        a, b = ("eA", "eB") if site.kind is Embedding else ("A", "B")
        rank, (out, width) = self.config.rank(names), site.shape
        shapes: dict[str, tuple[int, ...]] = {
            a: (rank, out if site.kind is Embedding else width),
            b: (width if site.kind is Embedding else out, rank),
        }
        if self.config.use_dora:
            shapes["m"] = (out,)
            if site.kind is not Linear:
                self.problems.other(f"{module}: DoRA is supported for linear layers only")
                return
        # Every problem is reported; factors are kept only if all that are needed are there.
        for kind, full in tensors.items():
            shape = adapter.source.headers[full].shape
            if kind not in shapes:
                self.unused(full)
            elif shape != shapes[kind]:
                self.problems.shape(full, shape, shapes[kind])
        for kind, expected in shapes.items():
            if kind not in tensors:
                self.problems.missing(f"base_model.model.{module}.{_SUFFIX[kind]}", expected)
        if tensors.keys() >= shapes.keys():
            scale = self.config.scale(names)
            self.found.factors[site.name] = Factors(
                adapter.name, adapter.source, site.kind, scale, tensors[a], tensors[b], tensors.get("m")
            )
            if site.name == self.tied and self.config.ensure_weight_tying:
                self.problems.other("ensure_weight_tying is not supported for LoRA of embeddings that the head shares")

    def stack(self, module: str, tensors: dict[str, str]) -> bool:
        """Keep factors of all experts of a field; returns False where the config has no field for them.

        Where two parameters of a module have factors, PEFT adds `base_layer` to the names of one pair: the shapes tell
        which parameter each pair belongs to.
        """
        open_stacks = self.open_stacks(module)
        if not open_stacks or not tensors.keys() <= {"A", "B"} or self.config.use_dora:
            return False
        for stack, shapes in open_stacks:
            if {part: self.adapter.source.headers[full].shape for part, full in tensors.items()} == shapes:
                source, scale = self.adapter.source, self.config.scale(_names(stack))
                self.found.stacked[stack.name] = StackFactors(
                    self.adapter.name, source, scale, tensors["A"], tensors["B"], stack.shape[0]
                )
                self.seen.add(stack.name)
                return True
        self.pairs[module] = tensors
        return True

    def open_stacks(self, module: str) -> list[tuple[Stack, dict[str, tuple[int, ...]]]]:
        """The stacks of a module that the config targets and that have no factors yet, with the shapes of those."""
        above = short(module.replace(".base_layer", ""))
        result: list[tuple[Stack, dict[str, tuple[int, ...]]]] = []
        for stack in self.stacks.values():
            names = _names(stack)
            if short(stack.name).rpartition(".")[0] != above or not self.config.targets_parameter(names):
                continue
            if stack.name not in self.seen:
                experts, out, width = stack.shape
                columns = experts * self.config.rank(names)
                result.append((stack, {"A": (columns, width), "B": (out, columns)}))
        return result

    def misfit(self, module: str, tensors: dict[str, str]) -> None:
        """Report what is wrong with factors of experts, for the stack left to them that they fit best."""
        shapes = {part: self.adapter.source.headers[full].shape for part, full in tensors.items()}
        stacks = self.open_stacks(module)
        if not stacks:
            for full in tensors.values():
                self.unused(full)
            return
        fitting = [sum(shapes.get(part) == shape for part, shape in wanted.items()) for _, wanted in stacks]
        stack, expected = stacks[fitting.index(max(fitting))]
        self.seen.add(stack.name)
        for part, shape in expected.items():
            if part not in tensors:
                self.problems.missing(f"base_model.model.{module}.{_SUFFIX[part]}", shape)
            elif shapes[part] != shape:
                self.problems.shape(tensors[part], shapes[part], shape)

    def expect(self, found: Mapping[str, object]) -> None:
        """Report what the config promises and the adapter lacks.

        Each module that the config targets must have factors; the experts of one field all or none of them.
        """
        # Factors: those of a field with experts may be absent, but not of some experts only.
        there = {site.name for module in found if (site := self.site(module)) is not None}
        groups = {self.sites[name].group for name in there}
        for site in self.sites.values():
            if site.name in there or (site.kind is ExpertLinear and site.group not in groups):
                continue
            if self.config.targets(site.spellings, linear=self.in_all_linear(site)):
                kind = "eA" if site.kind is Embedding else "A"
                rank = self.config.rank(site.spellings)
                shape = (rank, site.shape[0 if site.kind is Embedding else 1])
                self.problems.missing(f"base_model.model.{site.name}.{_SUFFIX[kind]}", shape)
        for stack in self.stacks.values():
            experts, out, width = stack.shape
            if stack.name not in self.seen and self.config.targets_parameter([stack.name]):
                rank = self.config.rank([stack.name])
                what = f"A [{experts * rank}, {width}] and B [{out}, {experts * rank}]"
                self.problems.other(f"target_parameters names {stack.name}, but the adapter has no {what} for it")
        # Trained biases: of every module, or of those that have factors.
        for name, header in self.base.headers.items():
            module = name.removesuffix(".bias")
            site = self.site(module)
            own = self.config.bias == "all" or (self.config.bias == "lora_only" and site and site.name in there)
            if own and name.endswith(".bias") and name not in self.seen and not HARMLESS.search(name):
                self.problems.missing(f"base_model.model.{name}", header.shape)
        # Modules trained as a whole.
        saved = [f".{short(name)}" for name in self.seen]
        for module in self.config.modules_to_save:
            if not any(f".{module}." in name or f"_{module}." in name for name in saved):
                self.problems.other(f"modules_to_save names {module!r}, but the adapter has none of its tensors")
        for key, indices in self.config.trainable_token_indices.items():
            table = key or next((name for name, site in self.sites.items() if site.group == TABLE), TABLE)
            if f"{key}{_TOKENS}" not in self.seen:
                what = f"rows for {len(indices)} tokens" if len(indices) > 1 else "a row for one token"
                self.problems.other(f"trainable_token_indices promises {what} of {table}, but the adapter has none")

    def whole(self, name: str, full: str) -> None:
        """Match a tensor that replaces one of the base."""
        header = self.adapter.source.headers[full]
        module, _, last = name.rpartition(".")
        # The tensor it replaces: that of a site, or any other of the base (a norm's weight, a bias).
        site = self.site(module)
        own = self.base_short.get(short(name)) if name not in self.base.headers else name
        shape: tuple[int, ...] | None = None
        if site is not None and last == "weight" and not site.transposed:
            own, shape = f"{site.name}.weight", site.shape
        elif own is not None:
            shape = self.base.headers[own].shape
        # PEFT may save embeddings and head without being asked; the config must name any other tensor.
        saved = own is not None and self.config.saves(module)
        table = site is not None and (site.kind is Embedding or site.name == self.head)
        if own is None or shape is None or not (saved or table or (last == "bias" and self.config.bias != "none")):
            self.unused(full)
            return
        self.seen.add(own)
        if header.shape != shape:
            self.problems.shape(full, header.shape, shape)
            return
        # Of a tied model whose vocabulary was resized, PEFT saves the one table under both names.
        twin = self.tied if site is not None and site.name == self.head else None
        if twin is not None and not saved and not self.config.saves(twin) and self.has(f"{short(twin)}.weight"):
            return
        # A whole head, or embeddings trained as a module without ensure_weight_tying, end the sharing.
        if self.tied is not None and site is not None and site.name in (self.head, self.tied):
            self.found.untied |= site.name == self.head or (saved and not self.config.ensure_weight_tying)
        if own in self.found.changes:
            self.twice(full)
        source = self.adapter.source
        self.found.changes[own] = Change(Info(header.dtype, shape), lambda: source.read(full))

    def has(self, name: str) -> bool:
        """Whether the adapter has a tensor for the base's `name` (without the prefixes in which files differ)."""
        return name in self._has

    @cached_property
    def _has(self) -> frozenset[str]:
        return frozenset(short(base_name(full)) for full in self.adapter.source.headers)

    def tokens(self, module: str, full: str) -> None:
        """Match rows that replace single rows of a table; a head that shares the table shares them."""
        indices = self.config.trainable_token_indices
        site = self.site(module)
        key = next((key for key in indices if module == key or module.endswith(f".{key}")), "")
        # Of a tied model whose vocabulary was resized, PEFT saves the rows under both names.
        table = next((name for name, item in self.sites.items() if item.group == TABLE), "")
        head = site is not None and site.name == self.head
        if self.ties and head and self.has(f"{short(table)}{_TOKENS}"):
            return
        if site is None or not indices.get(key) or site.name not in self.whole_tables():
            self.unused(full)
            return
        self.seen.add(f"{key}{_TOKENS}")
        if head and self.ties:
            self.problems.other(f"{full}: the head shares the embeddings, so rows for the head alone are not supported")
            return
        # One row for each token, each token once.
        tokens, shape = indices[key], (len(indices[key]), site.shape[1])
        if self.adapter.source.headers[full].shape != shape:
            self.problems.shape(full, self.adapter.source.headers[full].shape, shape)
            return
        if len(set(tokens)) < len(tokens) or max(tokens) >= site.shape[0]:
            self.problems.other(f"trainable_token_indices: expected distinct token ids below {site.shape[0]}")
            return
        if site.name in self.found.rows:
            self.twice(full)
        rows = SavedRows(self.adapter.name, self.adapter.source, full, tokens)
        self.found.rows[site.name] = rows
        if self.ties and site.group == TABLE and self.head in self.sites:
            self.found.rows[self.head] = rows


_SUFFIX = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "eA": "lora_embedding_A",
    "eB": "lora_embedding_B",
    "m": "lora_magnitude_vector",
}


def _names(stack: Stack) -> list[str]:
    """The names by which a config may refer to the parameter of a stack."""
    return [stack.name, f"{PREFIXES[0]}{short(stack.name)}"]
