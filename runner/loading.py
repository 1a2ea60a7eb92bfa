"""From a plan to a model in memory and back: `build`, `arrays`, `save`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from runner.plan import ArrayPlan, ModulePlan, Value
from runner.transforms import IDENTITY
from runner.weights import Join, Leaf, Source, Tree, leaf_shapes, leaves

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def build(plan: ModulePlan, source: Source, *, dtype: mx.Dtype | None = None, progress: Progress | None = None) -> Any:
    """Construct the planned dataclass tree, reading one field at a time.

    Memory never holds more than the model and the parts of one fused field.

    Args:
        dtype: floating-point tensors become this; None keeps what is stored.
    """
    return _Builder(plan, source, dtype, progress).module(plan)


class _Builder:
    def __init__(self, plan: ModulePlan, source: Source, dtype: mx.Dtype | None, progress: Progress | None) -> None:
        self.source = source
        self.dtype = dtype
        self.progress = progress
        self.uses = Counter(array.tree for array in plan.arrays())
        self.uses.update(array.same_as for array in plan.arrays() if array.same_as is not None)
        self.shared: dict[tuple[Tree, str], mx.array] = {}
        self.total = sum(source.headers[leaf.name].nbytes for tree in self.uses for leaf in leaves(tree))
        self.done = 0

    def module(self, plan: ModulePlan) -> Any:
        values: dict[str, Any] = {}
        for name, item in plan.fields.items():
            if isinstance(item, ArrayPlan):
                values[name] = self.array(item)
            elif isinstance(item, ModulePlan):
                values[name] = self.module(item)
            elif isinstance(item, list):
                values[name] = [self.module(element) for element in item]
            else:
                values[name] = item.value
        return plan.cls(**values)

    def array(self, plan: ArrayPlan) -> mx.array:
        result = self.tree(plan, plan.tree)
        if plan.same_as is not None:
            twin = self.tree(plan, plan.same_as)
            if twin.shape == result.shape and bool(mx.array_equal(twin, result)):
                return twin
        return result

    def tree(self, plan: ArrayPlan, tree: Tree) -> mx.array:
        key = (tree, plan.transform.name)
        if key in self.shared:
            return self.shared[key]
        array = plan.transform.apply(self.assemble(tree))
        if self.dtype is not None and mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(self.dtype)
        mx.eval(array)
        self.done += sum(self.source.headers[leaf.name].nbytes for leaf in leaves(tree))
        if self.progress is not None:
            self.progress(self.done, self.total)
        if self.uses[tree] > 1:
            self.shared[key] = array
        return array

    def assemble(self, tree: Tree) -> mx.array:
        if isinstance(tree, Join):
            parts = [self.assemble(item) for item in tree.parts]
            return mx.stack(parts) if tree.stacked else mx.concatenate(parts, axis=tree.axis)
        array = self.source.read(tree.name)
        return array if tree.rows is None else mx.contiguous(array[tree.rows[0] : tree.rows[1]])


def arrays(module: object, path: str = "") -> Iterator[tuple[str, mx.array]]:
    """Every array of a model with the path of its field, computed ones included; a shared array comes once a field."""
    if isinstance(module, mx.array):
        yield path, module
    elif isinstance(module, list | tuple):
        for index, item in enumerate(module):
            yield from arrays(item, f"{path}.{index}")
    elif dataclasses.is_dataclass(module):
        for item in dataclasses.fields(module):
            yield from arrays(vars(module).get(item.name), f"{path}.{item.name}".lstrip("."))


def nbytes(module: object) -> int:
    """Bytes a model's arrays take, shared ones counted once."""
    return sum({id(array): array.nbytes for _, array in arrays(module)}.values())


STORED = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


def tensors(module: object, plan: ModulePlan) -> Iterator[tuple[str, mx.array]]:
    """The checkpoint that `module` was built from, name by name: what `plan` joined is split again."""
    pieces: dict[str, dict[int, mx.array]] = {}
    written: set[str] = set()
    for array, value in _pairs(module, plan):
        value = array.transform.invert(value)
        if array.transform is not IDENTITY and array.stored in STORED:
            value = value.astype(STORED[array.stored])  # a transform may have widened it
        for leaf, stored in _split(array, array.tree, value):
            if leaf.name in written:
                continue
            if leaf.rows is None:
                written.add(leaf.name)
                yield leaf.name, stored
                continue
            found = pieces.setdefault(leaf.name, {})
            found[leaf.rows[0]] = stored
            if sum(piece.shape[0] for piece in found.values()) == leaf.rows[2]:
                written.add(leaf.name)
                yield leaf.name, mx.concatenate([found[start] for start in sorted(found)])


def _pairs(module: object, plan: ModulePlan) -> Iterator[tuple[ArrayPlan, mx.array]]:
    for name, item in plan.fields.items():
        value = getattr(module, name)
        if isinstance(item, ArrayPlan):
            yield item, value
        elif isinstance(item, ModulePlan):
            yield from _pairs(value, item)
        elif not isinstance(item, Value):
            for element, element_plan in zip(value, item, strict=True):
                yield from _pairs(element, element_plan)


def _split(plan: ArrayPlan, tree: Tree, value: mx.array) -> Iterator[tuple[Leaf, mx.array]]:
    if isinstance(tree, Leaf):
        yield tree, value
        return
    start = 0
    for index, part in enumerate(tree.parts):
        if tree.stacked:
            yield from _split(plan, part, value[index])
            continue
        rows = _rows(plan, part)
        yield from _split(plan, part, value[(slice(None),) * tree.axis + (slice(start, start + rows),)])
        start += rows


def _rows(plan: ArrayPlan, tree: Tree) -> int:
    """Rows of a piece of a concatenated field."""
    if isinstance(tree, Join):
        return _rows(plan, tree.parts[0]) if tree.stacked else sum(_rows(plan, part) for part in tree.parts)
    return next(
        shape[0 if leaf.stack is None else 1] for leaf, shape in leaf_shapes(plan.tree, plan.sizes) if leaf == tree
    )
