"""From a plan to a model in memory and back: `build`, `arrays`, `save`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from runner.weights.plan import ArrayPlan, ModulePlan, Value
from runner.weights.tags import Source
from runner.weights.transforms import IDENTITY
from runner.weights.tree import Join, Leaf, Tree, leaf_shapes, leaves

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def build(plan: ModulePlan, source: Source, *, dtype: mx.Dtype | None = None, progress: Progress | None = None) -> Any:
    """Construct the planned dataclass tree, reading one field at a time, the largest before the others.

    Memory holds the model and one stored tensor, in its own dtype and in the field's: large ones come while little else
    is there. A transform may need a copy of its field.

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
        self.total = sum(self.nbytes(tree) for tree in self.uses)
        self.done = 0
        self.values: dict[str, mx.array] = {}
        for array in sorted(plan.arrays(), key=self.urgency):
            self.values[array.path] = self.array(array)

    def urgency(self, plan: ArrayPlan) -> int:
        """Fields of a twentieth of the model or more by size, before all others in their order."""
        size = self.nbytes(plan.tree)
        return -size if size > self.total // 20 else 0

    def nbytes(self, tree: Tree) -> int:
        """Bytes of the stored tensors."""
        return sum(self.source.headers[leaf.name].nbytes for leaf in leaves(tree))

    def module(self, plan: ModulePlan) -> Any:
        values: dict[str, Any] = {}
        for name, item in plan.fields.items():
            if isinstance(item, ArrayPlan):
                values[name] = self.values[item.path]
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
        # Other transforms than the identity compute, in the dtype that is stored.
        dtype = self.dtype if plan.transform is IDENTITY else None
        array = _cast(plan.transform.apply(self.assemble(tree, dtype)), self.dtype)
        mx.eval(array)
        if mx.get_cache_memory() > self.total // 20:
            mx.clear_cache()  # of parts that were joined, and of what was cast
        self.done += self.nbytes(tree)
        if self.progress is not None:
            self.progress(self.done, self.total)
        if self.uses[tree] > 1:
            self.shared[key] = array
        return array

    def assemble(self, tree: Tree, dtype: mx.Dtype | None) -> mx.array:
        """The stored tensors as one array, floating-point ones in `dtype`. Parts are read one after the other."""
        if isinstance(tree, Leaf):
            array = self.source.read(tree.name)
            rows = array if tree.rows is None else mx.contiguous(array[tree.rows[0] : tree.rows[1]])
            return _cast(rows, dtype)
        if len({self.source.headers[leaf.name].dtype for leaf in leaves(tree)}) > 1:
            parts = [self.assemble(part, dtype) for part in tree.parts]
            return mx.stack(parts) if tree.stacked else mx.concatenate(parts, axis=tree.axis)
        whole: mx.array | None = None
        start = 0
        for part in tree.parts:
            piece = self.assemble(part, dtype)
            piece = piece[None] if tree.stacked else piece
            if whole is None:
                shape = list(piece.shape)
                shape[tree.axis] = self.length(tree)
                whole = mx.zeros(shape, piece.dtype)
            end = start + piece.shape[tree.axis]
            whole[(slice(None),) * tree.axis + (slice(start, end),)] = piece
            mx.eval(whole)  # in place; the part is let go
            start = end
        assert whole is not None
        return whole

    def length(self, tree: Join) -> int:
        """Of what the parts of `tree` become, along the axis where they are put together."""
        if tree.stacked:
            return len(tree.parts)
        return sum(self._rows(part, tree.axis) for part in tree.parts)

    def _rows(self, tree: Tree, axis: int) -> int:
        if isinstance(tree, Join):
            return self._rows(tree.parts[0], axis - 1) if tree.stacked else self.length(tree)
        return self.source.headers[tree.name].shape[axis] if tree.rows is None else tree.rows[1] - tree.rows[0]


def _cast(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    return array if dtype is None or not mx.issubdtype(array.dtype, mx.floating) else array.astype(dtype)


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
