"""Planning: match a model's tags with a checkpoint's headers, so that each field's tensors are known before reading."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
import re
import types
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any

import mlx.core as mx

from runner.config.base import Config
from runner.errors import WeightsError
from runner.weights.module import Module
from runner.weights.problems import Problems
from runner.weights.tags import HARMLESS, TAG, Choice, Chooses, Header, Setting, Tag
from runner.weights.transforms import IDENTITY, Transform
from runner.weights.tree import (
    Dim,
    Join,
    Leaf,
    Size,
    Tree,
    expand,
    joined_shape,
    leaf_shapes,
    leaves,
    resolve,
    size_of,
)

MAX_PROBLEMS = 10_000
"""Problems at which planning stops. A layer that lacks all its tensors is planned at many times their headers' size."""


@dataclass(frozen=True)
class ArrayPlan:
    """The plan of one array field: which tensors it is read from, and how they become its value.

    `same_as` is another tree whose array is shared if it is equal (a tied head and the embeddings). `stored` is the
    dtype of the first tensor, in safetensors' spelling; None without a checkpoint. `exact` arrays are never brought to
    less than float32.
    """

    path: str
    tree: Tree
    sizes: tuple[Size, ...]
    transform: Transform
    dtypes: frozenset[str]
    same_as: Tree | None = None
    stored: str | None = None
    exact: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The field's shape, after the transform."""
        return joined_shape(self.tree, self.sizes)


@dataclass(frozen=True)
class ModulePlan:
    """The plan of one dataclass: its class, and a plan for each of its fields."""

    path: str
    cls: type
    fields: Mapping[str, ArrayPlan | ModulePlan | list[ModulePlan] | Value]

    def __repr__(self) -> str:
        return f"ModulePlan({self.path!r}, {self.cls.__name__}, {sum(1 for _ in self.arrays())} arrays)"

    def arrays(self) -> Iterator[ArrayPlan]:
        """Every array field here and below, in the order of the fields."""
        for item in self.fields.values():
            if isinstance(item, ArrayPlan):
                yield item
            elif isinstance(item, ModulePlan):
                yield from item.arrays()
            elif isinstance(item, list):
                for module in item:
                    yield from module.arrays()


@dataclass(frozen=True)
class Value:
    """The plan of a field that holds a plain value and no tensor."""

    value: Any


def count_parameters(module: ModulePlan) -> int:
    """Number of a model's parameters, quantized or not; a tied tensor counts once."""
    return count_by_form(module).total()


def count_by_form(module: ModulePlan) -> Counter[str]:
    """How many of a model's parameters are kept in each form; a tied tensor counts once.

    A form is that of `packed_as`, or a stored dtype in safetensors' spelling, "" without a checkpoint.
    """
    result: Counter[str] = Counter()
    for form, count in _counts(module, set()):
        result[form] += count
    return result


def packed_as(module: ModulePlan) -> str | None:
    """How a layer's matrix is packed, as in `4-bit g64` and `4-bit mxfp4 g32`; None where it is not."""
    values = {name: item.value for name, item in module.fields.items() if isinstance(item, Value)}
    if "bits" not in values or not isinstance(module.fields.get("scales"), ArrayPlan):
        return None
    mode = "" if values["mode"] == "affine" else f" {values['mode']}"
    return f"{values['bits']}-bit{mode} g{values['group_size']}"


def _counts(module: ModulePlan, counted: set[Tree]) -> Iterator[tuple[str, int]]:
    packed = packed_as(module)
    for name, item in module.fields.items():
        if isinstance(item, ArrayPlan):
            if item.tree in counted or (packed and name in ("scales", "biases")):
                continue  # scales and biases are no parameters
            counted.add(item.tree)
            count = math.prod(item.shape)
            if packed and name == "weight":  # a word holds 32 / bits parameters
                bits = module.fields["bits"]
                assert isinstance(bits, Value)
                yield packed, count * 32 // bits.value
            else:
                yield item.stored or "", count
        elif not isinstance(item, Value):
            for child in item if isinstance(item, list) else [item]:
                yield from _counts(child, counted)


def plan(
    cls: type, config: Config, headers: Mapping[str, Header] | None, provided: Mapping[str, Any] = {}
) -> ModulePlan:
    """Match the tags of `cls` with a checkpoint's headers; no tensor is read.

    Args:
        headers: None plans the checkpoint that this config would have without quantization.
        provided: values of settings that come from the machine, not from the config.

    Raises:
        WeightsError: lists every missing, unused, wrong-shaped and wrong-dtyped tensor at once.
    """
    planner = Planner(headers, provided)
    config = config if headers is None else config.stored_as(headers)
    result = planner.module(cls, Place.root(config))
    planner.finish(config)
    return result


@dataclass(frozen=True)
class Place:
    """Where the walk through a model stands: at one field, with all that its tags are read with.

    `path` is the field's path, `tree` the tensors below it, `sizes` the dimensions its tag gave it. `config` is the
    config in force there (a layer may have its own), `scope` the names that the parent defined: `$0`, `bias`, `bits`
    and the like.
    """

    path: str
    tree: Tree
    sizes: tuple[Size, ...]
    config: Config
    scope: Mapping[str, Any]

    @classmethod
    def root(cls, config: Config) -> Place:
        """The place of a whole model."""
        return cls("", Leaf(""), (), config, {})

    def field(self, name: str) -> Place:
        """The place of field `name` of the dataclass here, before its own tag is read."""
        return dataclasses.replace(self, path=f"{self.path}.{name}".lstrip("."))

    def size(self, dim: str | int) -> int:
        """The dimension `dim` as a number; see `tree.size_of`."""
        return size_of(dim, self.config, self.scope)

    def flag(self, name: str | bool) -> bool:
        """`name` itself if it is a bool, else the config's flag of this name."""
        return name if isinstance(name, bool) else bool(getattr(self.config, name))


class Planner:
    """Walks a model's dataclasses field by field and notes what each one needs.

    One field as an example, from Llama's attention with 4 query heads and 2 key-value heads of 8, hidden size 32:

        qkv_proj: Linear = weight("{q,k,v}_proj", (Q, KV, KV), HIDDEN)

    1. `locate` expands the name below the parent's into Join(Leaf("...q_proj"), Leaf("...k_proj"), Leaf("...v_proj")).
    2. `resolve` turns the dimensions into ((32, 16, 16), 32): one size of the first axis for each joined part.
    3. The annotation is a class, so `module` asks it which form is stored (`Linear.choose`: `weight` is float, hence
       `PlainLinear`), gives its tags `$0` = (32, 16, 16) and `$1` = 32, and walks its fields.
    4. There `weight: mx.array = tensor("weight", "$0", "$1")` becomes an `ArrayPlan` over `...q_proj.weight` and the
       two others; `check` holds their headers against [32, 32], [16, 32] and [16, 32].
    5. `loading.build` reads the three one after the other into one array [64, 32]; `loading._Builder` says how.
    """

    def __init__(self, headers: Mapping[str, Header] | None, provided: Mapping[str, Any]) -> None:
        self.declared = headers is None
        self.headers: Mapping[str, Header] = headers or {}
        self.provided = provided
        self.names: dict[type, frozenset[str]] = {}
        self.used: set[str] = set()
        self.problems = Problems()
        # In order, the tensors below one name lie side by side: `below` finds them without a list of all prefixes,
        # which takes the square of a name's length.
        self.ordered = sorted(self.headers)

    def finish(self, config: Config) -> None:
        """Report the tensors that no field took, and raise if anything at all does not fit."""
        left = [name for name in self.headers if name not in self.used]
        unused = [name for name in left if not HARMLESS.search(name) and not config.ignores(name)]
        for name in unused:
            self.problems.unused(name, self.headers[name].shape)
        if self.problems.count and not self.declared:
            raise WeightsError(self.problems.message(unused))

    def module(self, cls: type, place: Place) -> ModulePlan:
        """Plan a dataclass: choose its class, then plan each of its fields."""
        # Its tags read its sizes as $0, $1.
        scope = {**place.scope, **{f"${i}": size for i, size in enumerate(place.sizes)}}
        # A class with several forms looks at what is stored; a form that makes no sense is one problem, not many.
        if issubclass(cls, Chooses):
            try:
                choice = self.choose(cls, place)
            except WeightsError as error:
                self.problems.other(str(error))
                self.take_all(place.tree)
                return ModulePlan(place.path, cls, {})
            cls, scope = choice.cls, {**scope, **choice.scope}
        inside = dataclasses.replace(place, sizes=(), scope=scope)
        # A field without a value keeps the default of its dataclass.
        fields: dict[str, Any] = {}
        hints = _hints(cls)
        for item in dataclasses.fields(cls):
            if item.init:
                value = self.field(item, hints[item.name], inside.field(item.name))
                if value is not None:
                    fields[item.name] = value
        return ModulePlan(place.path, cls, fields)

    def choose(self, cls: type[Chooses], place: Place) -> Choice:
        """The class for what is stored below `place`."""
        return cls.choose(place.tree, place.sizes, self.headers, place.config)

    def take_all(self, tree: Tree) -> None:
        """Mark every tensor below `tree` as used."""
        for leaf in leaves(tree):
            self.used.update(self.below(leaf.name))

    def below(self, name: str) -> Iterator[str]:
        """The names of the tensors below the module `name`, in order."""
        start = f"{name}."
        for index in range(bisect.bisect_left(self.ordered, start), len(self.ordered)):
            if not self.ordered[index].startswith(start):
                return
            yield self.ordered[index]

    def field(
        self, item: dataclasses.Field[Any], hint: Any, place: Place
    ) -> ArrayPlan | ModulePlan | list[ModulePlan] | Value | None:
        """Plan one field by its tag and annotation; None leaves it at its default."""
        tag: Tag | Setting | None = item.metadata.get(TAG)
        # Without a tag for tensors: a setting, a dataclass that only computes, or nothing of ours.
        if isinstance(tag, Setting):
            return self.setting(tag.name or item.name, item, place)
        if tag is None:
            if dataclasses.is_dataclass(hint) and isinstance(hint, type) and item.default is MISSING:
                return self.module(hint, place)
            return None
        if isinstance(hint, type) and issubclass(hint, Module) and hint.WHOLE and place.config.whole is not None:
            place = dataclasses.replace(place, config=place.config.whole)  # every rank has all of it
        # A field that this config or this form does not have.
        when = place.scope[tag.when] if isinstance(tag.when, str) and tag.when in place.scope else tag.when
        if not place.flag(when):
            return Value(None)
        # Which tensors, of which sizes.
        tree, twin = self.locate(tag, place)
        if tag.optional and not self.present(tree):
            return Value(None)
        sizes = resolve(tag.shape, place.config, place.scope)
        if tag.part is not None:
            tree, sizes = _rows(tree, tag.part, sizes, place)
        found = dataclasses.replace(place, tree=tree, sizes=sizes)
        # What the annotation makes of them.
        if hint is mx.array:
            return self.array(tag, found)
        exact = tag.exact or place.scope.get("exact", False)
        scope = {"bias": place.flag(tag.bias), "transform": tag.transform, "same_as": twin, "exact": exact}
        if typing.get_origin(hint) in (list, Sequence):
            # The parts of a joined layer are read as the layer's own tag says, not as that of the list in it.
            parts = dataclasses.replace(found, scope={**scope, **place.scope})
            return self.modules(tag, typing.get_args(hint)[0], parts)
        return self.module(hint, dataclasses.replace(found, scope=scope))

    def setting(self, name: str, item: dataclasses.Field[Any], place: Place) -> Value | None:
        """Plan a setting: the parent's value, the machine's or the config's; None leaves the field's default."""
        for source in (place.scope, self.provided):
            if name in source:
                return Value(source[name])
        if name in self.config_names(place.config):
            return Value(getattr(place.config, name))
        if item.default is MISSING:
            raise AssertionError(f"{type(place.config).__name__} has no {name}, which {item.name} needs")
        return None

    def config_names(self, config: Config) -> frozenset[str]:
        """Names that a config can be asked for: its fields and properties."""
        kind = type(config)
        if kind not in self.names:
            properties = {n for base in kind.__mro__ for n, v in vars(base).items() if isinstance(v, property)}
            self.names[kind] = frozenset(properties | {item.name for item in dataclasses.fields(config)})
        return self.names[kind]

    def check_count(self, path: str, name: str, count: int) -> None:
        """Refuse more layers or experts than there are tensors: to find millions missing one by one takes hours."""
        if not self.declared and count > len(self.headers):
            raise WeightsError(
                f"{path}: config.json says {name} = {count}, but the checkpoint has only {len(self.headers)} tensors"
            )

    def locate(self, tag: Tag, place: Place) -> tuple[Tree, Tree | None]:
        """The tensors that a tag names below `place`, and its twin (the fallback) if a tied checkpoint stores both."""
        for name in re.findall(r"\{(\w+)\}", tag.name):
            if not isinstance(getattr(place.config, name, None), str):
                self.check_count(place.path, name, size_of(name, place.config, {}))
        own, _, twins = tag.name.partition("||")
        allowed = bool(twins) and (tag.otherwise is None or place.flag(tag.otherwise))
        # Without a checkpoint, the first spelling counts.
        if self.declared:
            return expand(place.tree, (twins if allowed else own).split("|")[0], place.config), None
        first = self.found(own, place)
        twin = self.found(twins, place) if allowed else None
        if first is None and twin is not None:
            return twin, None
        # Where nothing is found, the first spelling is the one reported missing: of a tied head, the table's.
        wanted = twins if allowed and tag.otherwise is not None else own
        return first or expand(place.tree, wanted.split("|")[0], place.config), twin

    def found(self, names: str, place: Place) -> Tree | None:
        """The first of the alternatives `names` that the checkpoint has, or None."""
        options = (expand(place.tree, name, place.config) for name in names.split("|"))
        return next((option for option in options if self.present(option)), None)

    def present(self, tree: Tree) -> bool:
        """Whether the checkpoint has any tensor at or below the names of `tree`."""
        return any(leaf.name in self.headers or any(self.below(leaf.name)) for leaf in leaves(tree))

    def modules(self, tag: Tag, element: type, place: Place) -> list[ModulePlan]:
        """Plan a list: one dataclass for each layer, or for each part of a joined name."""
        # Without a length, the list has an element for each part of the join (as in `JoinedLinear`).
        if tag.length is None:
            if not isinstance(place.tree, Join):
                raise AssertionError(f"{place.path}: a list needs length= or joined parts")
            first, *rest = place.sizes
            rows = first if isinstance(first, tuple) else (first,) * len(place.tree.parts)
            parts = (
                dataclasses.replace(place.field(str(i)), tree=part, sizes=(rows[i], *rest))
                for i, part in enumerate(place.tree.parts)
            )
            return [self.module(element, part) for part in parts]
        # Otherwise an element for each layer, with the layer's own config; nothing of the parent's scope reaches it.
        count = place.size(tag.length)
        self.check_count(place.path, tag.length, count)
        layers = (
            Place(
                f"{place.path}.{i}",
                expand(place.tree, str(i), place.config),
                place.sizes,
                place.config.for_layer(i),
                {},
            )
            for i in range(count)
        )
        return [self.module(element, layer) for layer in layers]

    def array(self, tag: Tag, place: Place) -> ArrayPlan:
        """Plan an array: find its transform and twin, and check its tensors against their headers."""
        # The array's own transform first (bytes to words), then the one that its module was given (order of rows).
        transform = tag.transform.then(place.scope.get("transform", IDENTITY))
        twin: Tree | None = place.scope.get("same_as")
        same_as = None if twin is None else expand(twin, tag.name, place.config)
        header = self.headers.get(next(leaves(place.tree)).name)
        stored = None if header is None else header.dtype
        exact = tag.exact or place.scope.get("exact", False)
        result = ArrayPlan(place.path, place.tree, place.sizes, transform, tag.dtypes, same_as, stored, exact)
        self.check(result, place.tree)
        if result.same_as is not None:
            self.check(result, result.same_as)
        return result

    def missing(self, name: str, expected: tuple[int, ...]) -> None:
        """Note a missing tensor; where thousands are, stop: the counts of config.json, not the tensors, are wrong."""
        self.problems.missing(name, expected)
        if not self.declared and self.problems.count > MAX_PROBLEMS:
            title = "the checkpoint does not fit the model; no more was looked for"
            raise WeightsError(self.problems.message((), title))

    def check(self, array: ArrayPlan, tree: Tree) -> None:
        """Note every tensor of `tree` that is missing, or has a shape or dtype that `array` cannot take."""
        for leaf, shape in leaf_shapes(tree, array.sizes):
            expected = array.transform.stored_shape(shape)
            header = self.headers.get(leaf.name)
            self.used.add(leaf.name)
            if header is None:
                self.missing(leaf.name, expected)
            elif header.dtype not in array.dtypes:
                self.problems.dtype(leaf.name, header.dtype, array.dtypes)
            elif header.shape != expected:
                self.problems.shape(leaf.name, header.shape, expected)


def _rows(
    tree: Tree, part: tuple[int, tuple[Dim, ...]], sizes: tuple[Size, ...], place: Place
) -> tuple[Tree, tuple[Size, ...]]:
    """Narrow `tree` and `sizes` to piece `part[0]` of a tensor whose rows are split into the sizes `part[1]`."""
    index, dims = part
    rows = [place.size(dim) for dim in dims if not isinstance(dim, tuple)]
    if not isinstance(tree, Leaf) or tree.stack is not None:
        raise TypeError("a part is taken of one tensor, not of a joined or stacked one")
    start = sum(rows[:index])
    return Leaf(tree.name, (start, start + rows[index], sum(rows))), (rows[index], *sizes[1:])


@functools.cache
def _hints(cls: type) -> Mapping[str, Any]:
    """Annotations of `cls`, with `X | None` read as `X`; cached, because a model has many layers of one class."""
    result = {}
    for name, hint in typing.get_type_hints(cls).items():
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        result[name] = options[0] if isinstance(hint, types.UnionType) and len(options) == 1 else hint
    return result
