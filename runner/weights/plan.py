"""Matching a model's tags with a checkpoint's headers: what each field will hold, before any tensor is read."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any

import mlx.core as mx

from runner.config.base import Config
from runner.errors import WeightsError
from runner.weights.problems import Problems
from runner.weights.tags import HARMLESS, TAG, Chooses, Header, Setting, Tag
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


@dataclass(frozen=True)
class ArrayPlan:
    """One array field: where its bytes are and what they become. `same_as`: a twin to share with when equal; `stored`:
    the dtype of its first tensor, in safetensors' spelling, where there is a checkpoint."""

    path: str
    tree: Tree
    sizes: tuple[Size, ...]
    transform: Transform
    dtypes: frozenset[str]
    same_as: Tree | None = None
    stored: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The field's shape before the transform."""
        return joined_shape(self.tree, self.sizes)


@dataclass(frozen=True)
class ModulePlan:
    """One dataclass and what each of its fields gets."""

    path: str
    cls: type
    fields: Mapping[str, ArrayPlan | ModulePlan | list[ModulePlan] | Value]

    def arrays(self) -> Iterator[ArrayPlan]:
        """Every array below, in the order of the fields."""
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
    """A field that holds no tensor."""

    value: Any


def count_parameters(module: ModulePlan) -> int:
    """Numbers a model holds, however they are packed; a tied tensor counts once."""
    return _parameters(module, set())


def _parameters(module: ModulePlan, counted: set[Tree]) -> int:
    # A packed matrix holds 32 / bits numbers in each word; its scales and biases are none.
    bits = module.fields.get("bits")
    packed = bits.value if isinstance(bits, Value) and "scales" in module.fields else None
    total = 0
    for name, item in module.fields.items():
        if isinstance(item, ArrayPlan):
            if item.tree not in counted and not (packed and name in ("scales", "biases")):
                counted.add(item.tree)
                total += math.prod(item.shape) * 32 // packed if packed and name == "weight" else math.prod(item.shape)
        elif not isinstance(item, Value):
            total += sum(_parameters(child, counted) for child in (item if isinstance(item, list) else [item]))
    return total


def plan(
    cls: type, config: Config, headers: Mapping[str, Header] | None, provided: Mapping[str, Any] = {}
) -> ModulePlan:
    """Match the tags of `cls` with a checkpoint's headers; no tensor is read.

    Args:
        headers: None plans what a checkpoint of this config holds when nothing in it is quantised.
        provided: values of settings that come from the machine, not from the config.

    Raises:
        WeightsError: every missing, unused, wrong-shaped and wrong-dtyped name at once.
    """
    planner = _Planner(headers, provided)
    result = planner.module("", cls, Leaf(""), (), config, {})
    planner.finish(config)
    return result


class _Planner:
    def __init__(self, headers: Mapping[str, Header] | None, provided: Mapping[str, Any]) -> None:
        self.declared = headers is None
        self.headers: Mapping[str, Header] = headers or {}
        self.provided = provided
        self.names: dict[type, frozenset[str]] = {}
        self.used: set[str] = set()
        self.tied: set[str] = set()
        self.problems = Problems()
        self.prefixes = {
            name[:i] for name in self.headers for i in range(len(name) + 1) if name[i : i + 1] in (".", "")
        }

    def finish(self, config: Config) -> None:
        left = [name for name in self.headers if name not in self.used]
        unused = [name for name in left if not HARMLESS.search(name) and not config.ignores(name)]
        for name in unused:
            self.problems.unused(name, self.headers[name].shape)
        if self.problems.found and not self.declared:
            raise WeightsError(self.problems.message(unused))

    def module(
        self, path: str, cls: type, tree: Tree, shape: tuple[Size, ...], config: Config, scope: Mapping[str, Any]
    ) -> ModulePlan:
        scope = {**scope, **{f"${i}": size for i, size in enumerate(shape)}}
        if issubclass(cls, Chooses):
            try:
                choice = cls.choose(tree, shape, self.headers, config)
            except WeightsError as error:
                self.problems.other(str(error))
                self.used.update(
                    name for leaf in leaves(tree) for name in self.headers if name.startswith(leaf.name + ".")
                )
                return ModulePlan(path, cls, {})
            cls, scope = choice.cls, {**scope, **choice.scope}
        fields: dict[str, Any] = {}
        hints = _hints(cls)
        for item in dataclasses.fields(cls):
            tag = item.metadata.get(TAG)
            if item.init:
                value = self.field(f"{path}.{item.name}".lstrip("."), item, tag, hints[item.name], tree, config, scope)
                if value is not None:
                    fields[item.name] = value
        return ModulePlan(path, cls, fields)

    def field(
        self,
        path: str,
        item: dataclasses.Field[Any],
        tag: Tag | Setting | None,
        hint: Any,
        tree: Tree,
        config: Config,
        scope: Mapping[str, Any],
    ) -> ArrayPlan | ModulePlan | list[ModulePlan] | Value | None:
        if isinstance(tag, Setting):
            return self.setting(tag.name or item.name, item, config, scope)
        if tag is None:
            if dataclasses.is_dataclass(hint) and isinstance(hint, type) and item.default is MISSING:
                return self.module(path, hint, tree, (), config, scope)
            return None
        when = scope.get(tag.when, None) if isinstance(tag.when, str) and tag.when in scope else tag.when
        if isinstance(when, str):
            when = bool(getattr(config, when))
        if not when:
            return Value(None)
        tree, same_as = self.locate(path, tag, tree, config)
        if tag.optional and not self.present(tree):
            return Value(None)
        sizes = resolve(tag.shape, config, scope)
        bias = tag.bias if isinstance(tag.bias, bool) else bool(getattr(config, tag.bias))
        inner = {"bias": bias, "transform": tag.transform, "same_as": same_as}
        if tag.part is not None:
            tree, sizes = _rows(tree, tag.part, sizes, config, scope)
        if hint is mx.array:
            return self.array(path, tag, tree, sizes, config, scope)
        if typing.get_origin(hint) in (list, Sequence):
            return self.modules(path, tag, typing.get_args(hint)[0], tree, sizes, config, scope)
        return self.module(path, hint, tree, sizes, config, inner)

    def setting(
        self, name: str, item: dataclasses.Field[Any], config: Config, scope: Mapping[str, Any]
    ) -> Value | None:
        for place in (scope, self.provided):
            if name in place:
                return Value(place[name])
        if name in self.config_names(config):
            return Value(getattr(config, name))
        if item.default is MISSING:
            raise AssertionError(f"{type(config).__name__} has no {name}, which {item.name} needs")
        return None

    def config_names(self, config: Config) -> frozenset[str]:
        """What a config can be asked for: its fields and properties."""
        kind = type(config)
        if kind not in self.names:
            properties = {n for base in kind.__mro__ for n, v in vars(base).items() if isinstance(v, property)}
            self.names[kind] = frozenset(properties | {item.name for item in dataclasses.fields(config)})
        return self.names[kind]

    def check_count(self, path: str, name: str, count: int) -> None:
        """Each of `count` layers or experts has a tensor at least; millions of them take hours to be found missing."""
        if not self.declared and count > len(self.headers):
            raise WeightsError(f"{path}: config.json says {name} = {count}, of {len(self.headers)} tensors in all")

    def locate(self, path: str, tag: Tag, tree: Tree, config: Config) -> tuple[Tree, Tree | None]:
        for name in re.findall(r"\{(\w+)\}", tag.name):
            self.check_count(path, name, size_of(name, config, {}))
        own, _, twins = tag.name.partition("||")
        allowed = bool(twins) and (tag.otherwise is None or bool(getattr(config, tag.otherwise)))
        if self.declared:
            return expand(tree, (twins if allowed else own).split("|")[0], config), None
        first = self.found(own, tree, config)
        twin = self.found(twins, tree, config) if allowed else None
        if first is None and twin is not None:
            return twin, None
        return first or expand(tree, own.split("|")[0], config), twin

    def found(self, names: str, tree: Tree, config: Config) -> Tree | None:
        """The first of the alternatives that the checkpoint has."""
        options = (expand(tree, name, config) for name in names.split("|"))
        return next((option for option in options if self.present(option)), None)

    def present(self, tree: Tree) -> bool:
        return any(leaf.name in self.prefixes for leaf in leaves(tree))

    def modules(
        self,
        path: str,
        tag: Tag,
        element: type,
        tree: Tree,
        sizes: tuple[Size, ...],
        config: Config,
        scope: Mapping[str, Any],
    ) -> list[ModulePlan]:
        if tag.length is None:
            if not isinstance(tree, Join):
                raise AssertionError(f"{path}: a list needs length= or joined parts")
            rows = sizes[0] if isinstance(sizes[0], tuple) else (sizes[0],) * len(tree.parts)
            return [
                self.module(f"{path}.{i}", element, part, (rows[i], *sizes[1:]), config, scope)
                for i, part in enumerate(tree.parts)
            ]
        count = size_of(tag.length, config, scope)
        self.check_count(path, tag.length, count)
        return [
            self.module(f"{path}.{i}", element, expand(tree, str(i), config), sizes, config.for_layer(i), {})
            for i in range(count)
        ]

    def array(
        self, path: str, tag: Tag, tree: Tree, sizes: tuple[Size, ...], config: Config, scope: Mapping[str, Any]
    ) -> ArrayPlan:
        transform = tag.transform.then(scope.get("transform", IDENTITY))
        twin: Tree | None = scope.get("same_as")
        same_as = None if twin is None else expand(twin, tag.name, config)
        header = self.headers.get(next(leaves(tree)).name)
        stored = None if header is None else header.dtype
        result = ArrayPlan(path, tree, sizes, transform, tag.dtypes, same_as, stored)
        self.check(result, tree)
        if result.same_as is not None:
            self.check(result, result.same_as)
        return result

    def check(self, array: ArrayPlan, tree: Tree) -> None:
        for leaf, shape in leaf_shapes(tree, array.sizes):
            expected = array.transform.stored_shape(shape)
            header = self.headers.get(leaf.name)
            self.used.add(leaf.name)
            if header is None:
                self.problems.missing(leaf.name, expected)
            elif header.dtype not in array.dtypes:
                self.problems.dtype(leaf.name, header.dtype, array.dtypes)
            elif header.shape != expected:
                self.problems.shape(leaf.name, header.shape, expected)


def _rows(
    tree: Tree, part: tuple[int, tuple[Dim, ...]], sizes: tuple[Size, ...], config: Config, scope: Mapping[str, Any]
) -> tuple[Tree, tuple[Size, ...]]:
    index, dims = part
    rows = [size_of(dim, config, scope) for dim in dims if not isinstance(dim, tuple)]
    if not isinstance(tree, Leaf) or tree.stack is not None:
        raise TypeError("a part is taken of one tensor, not of a joined or stacked one")
    start = sum(rows[:index])
    return Leaf(tree.name, (start, start + rows[index], sum(rows))), (rows[index], *sizes[1:])


@functools.cache
def _hints(cls: type) -> Mapping[str, Any]:
    """Annotations of `cls`, with `X | None` read as `X`."""
    result = {}
    for name, hint in typing.get_type_hints(cls).items():
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        result[name] = options[0] if isinstance(hint, types.UnionType) and len(options) == 1 else hint
    return result
