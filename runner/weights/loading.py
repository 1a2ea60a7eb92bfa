"""From a plan to a model in memory, and from a model back to its checkpoint: `build`, `arrays`, `tensors`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import mlx.core as mx

from runner.errors import CheckpointError
from runner.local_files import quoted
from runner.weights.plan import ArrayPlan, ModulePlan, Value
from runner.weights.tags import Header, Source
from runner.weights.transforms import IDENTITY
from runner.weights.tree import Join, Leaf, Tree, leaf_shapes, leaves

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and the bytes of all tensors, as stored."""


SMALL = 4 << 20
"""Bytes of parts that may be in memory beside their join: those of a small model, whose loading is mostly overhead."""


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Give an error of MLX's file reader a name: it comes when an array is evaluated, long after the header's check.

    Raises:
        CheckpointError: the file of tensor `name` could not be read to the end.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("[read]"):
            raise
        raise CheckpointError(
            f"tensor {quoted(name)}: its file could not be read to the end ({error}); it was cut short after it was "
            "opened, or its disk fails"
        ) from error


def build(
    plan: ModulePlan,
    source: Source,
    *,
    dtype: mx.Dtype | None = None,
    progress: Progress | None = None,
    place: Callable[[mx.array], None] | None = None,
) -> Any:
    """Construct the planned dataclass tree, reading one array field at a time, the largest first.

    Memory then holds the model and one stored tensor, in its own dtype and in the field's; large fields are read while
    little else is there. A transform, and `place`, may need a copy of its field.

    Args:
        dtype: floating-point tensors are cast to this (`exact` ones to float32); None keeps what is stored.
        progress: called after each field is read.
        place: called with each array that was read, evaluated; it may move its numbers, and nothing else of it.
    """
    return _Builder(plan, source, dtype, progress, place).module(plan)


class _Builder:
    """Reads every array of a plan, then constructs the dataclasses around them.

    The example of `plan.Planner` goes on: `qkv_proj.weight` is planned as a join of q [32, 32], k [16, 32] and v
    [16, 32], say in bfloat16, and `build` was called with `dtype` None. (So few bytes would be joined at once; the
    steps are those of a join larger than `SMALL`.)

    1. `__init__` counts who uses which tensors. Nobody else uses these three, so nothing is kept for a second reader.
    2. `array` has no twin to compare with, and `tree` finds nothing shared: `assemble` is called with the join.
    3. `assemble` reads q. The source is lazy: shape and dtype are known, the bytes are still in the file. They give the
       whole array, zeros of [64, 32] in bfloat16, where 64 is the `length` of the join (32 + 16 + 16).
    4. q is put into rows 0 to 31, and the whole is evaluated: only now are q's bytes read, and copied in place.
    5. q is let go. k follows into rows 32 to 47 and v into rows 48 to 63, each evaluated before the next one is read:
       at any time, memory holds the array [64, 32] and one part.
    6. `tree` applies the transform (none here), casts (not here), evaluates what that left to do, and reports progress.
    7. When all arrays are there, `module` passes this one to `PlainLinear(weight=..., bias=None)`, and that to
       `Attention(qkv_proj=...)`.
    """

    def __init__(
        self,
        plan: ModulePlan,
        source: Source,
        dtype: mx.Dtype | None,
        progress: Progress | None,
        place: Callable[[mx.array], None] | None,
    ) -> None:
        self.place = place
        self.source = source
        self.dtype = dtype
        self.progress = progress
        # How many fields read each tree, twins included: an array that another field needs as well is kept.
        self.uses = Counter(array.tree for array in plan.arrays())
        self.uses.update(array.same_as for array in plan.arrays() if array.same_as is not None)
        self.shared: dict[tuple[Tree, str, bool], mx.array] = {}
        # Progress counts stored bytes, a shared tree once.
        self.total = sum(self.nbytes(tree) for tree in self.uses)
        self.done = 0
        self.values: dict[str, mx.array] = {}
        # Reading and casting a field takes memory beside it: the largest go first, while there is room.
        for array in sorted(plan.arrays(), key=self.urgency):
            self.values[array.path] = self.array(array)

    def urgency(self, plan: ArrayPlan) -> int:
        """Sort key: fields larger than a twentieth of the model come first, by size; the others keep their order."""
        size = self.nbytes(plan.tree)
        return -size if size > self.total // 20 else 0

    def nbytes(self, tree: Tree) -> int:
        """Bytes of the tensors of `tree`, as stored."""
        return sum(self.source.headers[leaf.name].nbytes for leaf in leaves(tree))

    def module(self, plan: ModulePlan) -> Any:
        """Construct the dataclass of `plan` from arrays that are read already, modules, lists and values."""
        values: dict[str, Any] = {}
        for name, item in plan.fields.items():
            if isinstance(item, ArrayPlan):
                values[name] = self.values[item.path]
            elif isinstance(item, ModulePlan):
                values[name] = self.module(item)
            elif isinstance(item, list):  # layers, or the parts of a `JoinedLinear`
                values[name] = [self.module(element) for element in item]
            else:
                values[name] = item.value
        return plan.cls(**values)

    def array(self, plan: ArrayPlan) -> mx.array:
        """The value of an array field; equal to its twin, it is the twin itself, so that both share memory."""
        with reading(next(leaves(plan.tree)).name):
            return self.twinned(plan)

    def twinned(self, plan: ArrayPlan) -> mx.array:
        """The array of `plan`, or its twin if they are equal."""
        result = self.tree(plan, plan.tree)
        # A tied checkpoint that stores the head as well: share if they agree, else the head's own tensor counts.
        if plan.same_as is not None:
            twin = self.tree(plan, plan.same_as)
            if twin.shape == result.shape and bool(mx.array_equal(twin, result)):
                return twin
        return result

    def tree(self, plan: ArrayPlan, tree: Tree) -> mx.array:
        """The tensors of `tree` as one evaluated array, with the transform and dtype of `plan`."""
        # Fields with the same tensors and the same transform share one array.
        key = (tree, plan.transform.name, plan.exact)
        if key in self.shared:
            return self.shared[key]
        # Without a transform, each part is cast as it is read. A transform computes, so it gets the stored dtype.
        wanted = mx.float32 if plan.exact and self.dtype is not None else self.dtype
        array = _cast(plan.transform.apply(self.assemble(tree, wanted if plan.transform is IDENTITY else None)), wanted)
        mx.eval(array)
        if self.place is not None:
            self.place(array)
        # MLX keeps freed buffers (of joined parts, of arrays before a cast) for reuse: give back what adds up.
        if mx.get_cache_memory() > self.total // 20:
            mx.clear_cache()
        self.done += self.nbytes(tree)
        if self.progress is not None:
            self.progress(self.done, self.total)
        if self.uses[tree] > 1:
            self.shared[key] = array
        return array

    def assemble(self, tree: Tree, dtype: mx.Dtype | None) -> mx.array:
        """The tensors of `tree` joined, floating-point ones cast to `dtype`; parts are read one after the other."""
        if isinstance(tree, Leaf):
            array = self.source.read(tree.name)
            # Rows are copied out, or a view of them would keep the whole tensor in memory.
            rows = array if tree.rows is None else mx.contiguous(array[tree.rows[0] : tree.rows[1]])
            return _cast(rows, dtype)
        # Parts of different dtypes: MLX finds the dtype that holds them all, from all parts at once. Few bytes: at once
        # is faster.
        if self.nbytes(tree) <= SMALL or len({self.source.headers[leaf.name].dtype for leaf in leaves(tree)}) > 1:
            parts = [self.assemble(part, dtype) for part in tree.parts]
            return mx.stack(parts) if tree.stacked else mx.concatenate(parts, axis=tree.axis)
        # Otherwise each part is written into its place, so that only one of them is in memory beside the whole.
        whole: mx.array | None = None
        start = 0
        for part in tree.parts:
            piece = self.assemble(part, dtype)
            piece = piece[None] if tree.stacked else piece
            # The first part tells the dtype and the other dimensions.
            if whole is None:
                shape = list(piece.shape)
                shape[tree.axis] = self.length(tree)
                whole = mx.zeros(shape, piece.dtype)
            end = start + piece.shape[tree.axis]
            whole[(slice(None),) * tree.axis + (slice(start, end),)] = piece
            mx.eval(whole)  # now the part is read, and copied in place; the next pass of the loop frees it
            start = end
        assert whole is not None
        return whole

    def length(self, tree: Join) -> int:
        """Length of the joined array along the join axis."""
        if tree.stacked:
            return len(tree.parts)
        return sum(self._rows(part, tree.axis) for part in tree.parts)

    def _rows(self, tree: Tree, axis: int) -> int:
        """Length of `tree` along `axis`, from the headers."""
        if isinstance(tree, Join):
            return self._rows(tree.parts[0], axis - 1) if tree.stacked else self.length(tree)
        return self.source.headers[tree.name].shape[axis] if tree.rows is None else tree.rows[1] - tree.rows[0]


def _cast(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    return array if dtype is None or not mx.issubdtype(array.dtype, mx.floating) else array.astype(dtype)


def arrays(module: object, path: str = "") -> Iterator[tuple[str, mx.array]]:
    """Every array of a model, computed ones included, with its field's path; a shared array comes once per field."""
    if isinstance(module, mx.array):
        yield path, module
    elif isinstance(module, list | tuple):
        for index, item in enumerate(module):
            yield from arrays(item, f"{path}.{index}")
    elif dataclasses.is_dataclass(module):
        for item in dataclasses.fields(module):
            yield from arrays(vars(module).get(item.name), f"{path}.{item.name}".lstrip("."))


def planned_nbytes(plan: ModulePlan, headers: Mapping[str, Header], dtype: mx.Dtype | None) -> int:
    """Bytes that a model's arrays will take once they are read and brought to `dtype` (None: as stored).

    Those that may be one with another tensor, as a head with the table, count as one: `twin_nbytes` says how many more
    they take where they are not.
    """
    return _planned((array for array in plan.arrays() if array.same_as is None), headers, dtype)


def twin_nbytes(plan: ModulePlan, headers: Mapping[str, Header], dtype: mx.Dtype | None) -> int:
    """Bytes of the arrays that are let go where they equal another tensor, as only their numbers tell."""
    return _planned((array for array in plan.arrays() if array.same_as is not None), headers, dtype)


def _planned(arrays: Iterable[ArrayPlan], headers: Mapping[str, Header], dtype: mx.Dtype | None) -> int:
    total = 0
    # As `_Builder.tree` shares them.
    trees = {(a.tree, a.transform.name, a.exact): a for a in arrays}
    for (tree, _, _), array in trees.items():
        kept = (
            mx.float32 if (array.exact and dtype is not None) or (array.transform.widens and dtype is None) else dtype
        )
        for name in {leaf.name for leaf in leaves(tree)}:
            header = headers[name]
            floats = kept is not None and header.dtype in STORED
            total += math.prod(header.shape) * kept.size if floats and kept is not None else header.nbytes
    return total


def nbytes(module: object) -> int:
    """Bytes that a model's arrays take, shared ones counted once."""
    return sum({id(array): array.nbytes for _, array in arrays(module)}.values())


def read_nbytes(module: object, plan: ModulePlan) -> int:
    """Bytes of the arrays that were read for a model by `plan`, shared ones counted once and computed ones not."""
    return sum({id(value): value.nbytes for _, value in _pairs(module, plan)}.values())


STORED = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
"""Dtypes that `tensors` casts back to after a transform, by safetensors' name."""


def tensors(module: object, plan: ModulePlan) -> Iterator[tuple[str, mx.array]]:
    """The tensors of the checkpoint that `module` was built from, by name: what `plan` joined is split again.

    A tensor that several fields share, or whose rows several fields hold, comes once, when all of it is there.
    """
    pieces: dict[str, dict[int, mx.array]] = {}
    written: set[str] = set()
    for array, value in _pairs(module, plan):
        # The way back to what was stored: the transform undone, in the stored dtype.
        value = array.transform.invert(value)
        if array.transform is not IDENTITY and array.stored in STORED:
            value = value.astype(STORED[array.stored])  # a transform may have widened it
        for leaf, stored in _split(array, array.tree, value):
            if leaf.name in written:  # a tied tensor: another field gave it
                continue
            if leaf.rows is None:
                written.add(leaf.name)
                yield leaf.name, stored
                continue
            # Rows of a tensor that several fields hold wait until all of them are there.
            found = pieces.setdefault(leaf.name, {})
            found[leaf.rows[0]] = stored
            if sum(piece.shape[0] for piece in found.values()) == leaf.rows[2]:
                written.add(leaf.name)
                yield leaf.name, mx.concatenate([found[start] for start in sorted(found)])


def _pairs(module: object, plan: ModulePlan) -> Iterator[tuple[ArrayPlan, mx.array]]:
    """Every array field of `plan` with its value in `module`."""
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
    """Undo the joins of `tree`: each stored tensor (or its rows) with its piece of `value`."""
    if isinstance(tree, Leaf):
        yield tree, value
        return
    # Parts lie one after the other along the join axis, as `_Builder.assemble` put them.
    start = 0
    for index, part in enumerate(tree.parts):
        if tree.stacked:
            yield from _split(plan, part, value[index])
            continue
        rows = _rows(plan, part)
        yield from _split(plan, part, value[(slice(None),) * tree.axis + (slice(start, start + rows),)])
        start += rows


def _rows(plan: ArrayPlan, tree: Tree) -> int:
    """Length of `tree` along the join axis: how many rows of its field it fills."""
    if isinstance(tree, Join):
        return _rows(plan, tree.parts[0]) if tree.stacked else sum(_rows(plan, part) for part in tree.parts)
    return next(
        shape[0 if leaf.stack is None else 1] for leaf, shape in leaf_shapes(plan.tree, plan.sizes) if leaf == tree
    )
