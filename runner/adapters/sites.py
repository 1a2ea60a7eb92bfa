"""Finds what adapters can change: the stored matrices in a model's plan, and which rows of a field each became.

An adapter of `q_proj` changes the first rows of the fused projection, and an adapter of a matrix that is permuted when
read is permuted too: the plan knows both.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from runner.nn.linear import Embedding, Linear, Quantization
from runner.nn.moe import ExpertLinear
from runner.weights.loading import STORED
from runner.weights.plan import ArrayPlan, ModulePlan, Value
from runner.weights.tags import TAG, Source
from runner.weights.transforms import IDENTITY, Transform
from runner.weights.tree import Join, Tree, leaf_shapes, leaves

HEAD, TABLE = "lm_head", "embed_tokens"
"""Names of the fields that hold a model's head and its embeddings."""

FLOATS = frozenset({"F32", "F16", "BF16"})
PREFIXES = ("model.", "transformer.", "gpt_neox.", "language_model.")
"""Prefixes of tensor names that some files lack, or have in place of one another."""


@dataclass(frozen=True)
class Site:
    """A stored matrix `[out, width]` (of a table: `[vocab_size, width]`), under the name of its module.

    Attributes:
        leaf: the name of its tensors; differs from `name` where the head shares the embedding table.
        transposed: whether it is stored `[width, out]`.
        form: how it is quantized; None for plain numbers.
        group: path of the field it is part of, the same for all experts of one field.
    """

    name: str
    leaf: str
    kind: type
    shape: tuple[int, int]
    transposed: bool
    form: Quantization | None
    group: str

    @property
    def spellings(self) -> list[str]:
        """The names by which a config's module patterns may refer to the site."""
        return list(dict.fromkeys([self.name, *(prefix + short(self.name) for prefix in PREFIXES[:2])]))


@dataclass(frozen=True)
class Rows:
    """Rows `[start, stop)` of a stored matrix of `total` rows, which lie at `offset` in a field."""

    leaf: str
    offset: int
    start: int
    stop: int
    total: int


@dataclass(frozen=True)
class StackLeaf:
    """A stored tensor with `rows` rows of each expert, which lie at `offset` in the field."""

    name: str
    offset: int
    rows: int


@dataclass(frozen=True)
class Stack:
    """A field with a matrix `[out, width]` for each expert, which transformers keeps as one parameter.

    Attributes:
        name: transformers' name (`model.layers.0.mlp.experts.down_proj`); files and older releases may differ.
        path: the field's path in the model.
        shape: `[experts, out, width]`.
        order: the transform from transformers' row order to the field's.
        pieces: the stored matrices of each expert, where each has its own.
        leaves: the stored tensors, where experts share them.
    """

    name: str
    path: str
    shape: tuple[int, int, int]
    order: Transform
    form: Quantization | None
    pieces: list[list[Rows]]
    leaves: list[StackLeaf]


def short(name: str) -> str:
    """Strip from a name the prefixes in which files differ."""
    while any(name.startswith(prefix) for prefix in PREFIXES):
        name = name.partition(".")[2]
    return name


def kind_of(module: ModulePlan) -> type | None:
    """The layer class of `module` if adapters can change it, else None (also for a layer that joins several)."""
    kinds = [kind for kind in (Linear, Embedding, ExpertLinear) if issubclass(module.cls, kind)]
    return kinds[0] if kinds and isinstance(module.fields.get("weight"), ArrayPlan) else None


def pieces_of(array: ArrayPlan) -> list[list[Rows]]:
    """The stored matrices of a field, as one list for each expert, or a single list in other layers.

    Empty where experts are stored as one tensor: an adapter of single modules has no name for it.
    """
    tree = array.tree
    if isinstance(tree, Join) and tree.stacked:
        experts = [_matrix(array, part) for part in tree.parts] if array.transform is IDENTITY else []
        return experts if all(experts) else []
    matrix = _matrix(array, tree)
    return [matrix] if matrix else []


def _matrix(array: ArrayPlan, tree: Tree) -> list[Rows]:
    """The stored matrices that `tree` joins by rows; empty where one of them is not a plain weight matrix."""
    result: list[Rows] = []
    offset = 0
    # The field's rows follow one another in the order of the tree's leaves.
    for leaf, shape in leaf_shapes(tree, array.sizes):
        if leaf.stack is not None or len(shape) != 2 or not leaf.name.endswith(".weight"):
            return []
        start, stop, total = leaf.rows or (0, shape[0], shape[0])
        result.append(Rows(leaf.name.removesuffix(".weight"), offset, start, stop, total))
        offset += stop - start
    return result


def modules(item: ModulePlan) -> Iterator[tuple[ModulePlan, type]]:
    """Yield every layer below `item` that adapters can change, with its class."""
    kind = kind_of(item)
    if kind is not None:
        yield item, kind
        return
    for field in item.fields.values():
        for child in field if isinstance(field, list) else [field]:
            if isinstance(child, ModulePlan):
                yield from modules(child)


def _form(module: ModulePlan) -> Quantization | None:
    """How the matrix of `module` is quantized; None for plain numbers."""
    values = [module.fields.get(name) for name in ("bits", "group_size", "mode")]
    return Quantization(*(item.value for item in values if isinstance(item, Value))) if values[0] else None


def width_of(module: ModulePlan) -> int:
    """The number of values in a row of the module's matrix, quantized or not."""
    array, form = module.fields["weight"], _form(module)
    assert isinstance(array, ArrayPlan)
    return array.shape[-1] if form is None else array.shape[-1] * 32 // form.bits


def find_sites(layout: ModulePlan, head: str) -> dict[str, Site]:
    """The sites of a model by name; a head that shares the embedding table is called `head`."""
    tables: set[str] = set()
    sites: dict[str, Site] = {}
    # Embeddings come first, so that a head with the same tensors is seen to share them.
    for module, kind in sorted(modules(layout), key=lambda item: item[1] is not Embedding):
        array = module.fields["weight"]
        assert isinstance(array, ArrayPlan)
        # A transform that turns a shape around is a transposition.
        transposed = array.transform.stored_shape((2, 3)) == (3, 2)
        for rows in (rows for matrix in pieces_of(array) for rows in matrix):
            name = head if kind is Linear and rows.leaf in tables else rows.leaf
            if kind is Embedding:
                tables.add(name)
            sites[name] = Site(
                name, rows.leaf, kind, (rows.total, width_of(module)), transposed, _form(module), module.path
            )
    return sites


_EXPERTS = re.compile(r"(.+)\.(?:experts|switch_mlp)\.")


def find_stacks(layout: ModulePlan) -> dict[str, Stack]:
    """The fields with experts, by transformers' name of the parameter."""
    stacks: dict[str, Stack] = {}
    for item in layout.fields.values():
        for child in item if isinstance(item, list) else [item]:
            if not isinstance(child, ModulePlan):
                continue
            if kind_of(child) is ExpertLinear:
                stack = _stack(layout, child)
                stacks |= {} if stack is None else {stack.name: stack}
            else:
                stacks |= find_stacks(child)
    return stacks


def _stack(parent: ModulePlan, module: ModulePlan) -> Stack | None:
    """The stack of a field with experts; None where its tensors' names have no `experts` or `switch_mlp`."""
    array = module.fields["weight"]
    assert isinstance(array, ArrayPlan)
    layer = _EXPERTS.match(next(leaves(array.tree)).name)
    if layer is None:
        return None
    # Adapters use transformers' name for the parameter and its row order, which the class's tag tells.
    field = module.path.rpartition(".")[2]
    order = next(item.metadata[TAG].transform for item in dataclasses.fields(parent.cls) if item.name == field)
    name = f"{layer[1].replace('.block_sparse_moe', '.mlp')}.experts.{field}"
    stored: list[StackLeaf] = []
    offset = 0
    for leaf, shape in leaf_shapes(array.tree, array.sizes):
        if leaf.stack is not None:
            stored.append(StackLeaf(leaf.name, offset, shape[1]))
            offset += shape[1]
    experts, out = array.shape[:2]
    shape = (experts, out, width_of(module))
    return Stack(name, module.path, shape, order, _form(module), pieces_of(array), stored)


def row_order(transform: Transform, out: int, *, stacked: bool = False) -> mx.array | None:
    """For each of a field's `out` rows, its index before `transform`; None where the order stays."""
    # Undoing the transform on row numbers shows where each row comes from, whatever the transform does.
    rows = mx.arange(out)[:, None]
    places = transform.invert(rows[None] if stacked else rows).flatten()  # by index before: the index after
    order = mx.argsort(places)
    return None if bool(mx.all(order == mx.arange(out))) else order


def in_field_order(stack: Stack, ups: mx.array) -> mx.array:
    """Permute the rows of B `[E, out, r]` from transformers' order to the field's."""
    order = row_order(stack.order, ups.shape[1], stacked=True)
    return ups if order is None else ups[:, order]


def in_file_order(stack: Stack, ups: mx.array) -> mx.array:
    """Permute the rows of B `[E, out, r]` from the field's order to transformers': the way back."""
    order = row_order(stack.order, ups.shape[1], stacked=True)
    return ups if order is None else ups[:, mx.argsort(order)]


def head_name(model_class: type) -> str:
    """The family's module name for a head with tensors of its own."""
    names = [item.metadata[TAG].name for item in dataclasses.fields(model_class) if item.name == HEAD]
    return names[0].partition("||")[0].split("|")[0] if names else "lm_head"


def stored_dtype(source: Source, leaf: str) -> str:
    """The dtype that `numbers` returns, by its name in safetensors."""
    header = source.headers.get(f"{leaf}.scales", source.headers[f"{leaf}.weight"])
    return header.dtype if header.dtype in FLOATS else "BF16"


def numbers(source: Source, leaf: str, form: Quantization | None) -> mx.array:
    """Read a stored matrix, dequantized: in its own dtype or that of its scales, or bfloat16 if that is no float."""
    weight = source.read(f"{leaf}.weight")
    if form is not None and f"{leaf}.scales" in source.headers:
        scales = source.read(f"{leaf}.scales")
        biases = source.read(f"{leaf}.biases") if form.mode == "affine" else None
        weight = mx.dequantize(weight, scales, biases, group_size=form.group_size, bits=form.bits, mode=form.mode)
    return weight.astype(STORED[stored_dtype(source, leaf)])
