"""Where adapters can be: the stored matrices of a model's plan, and which rows of which field each became.

An adapter of `q_proj` changes the first rows of the fused product, one of a matrix that is permuted when read is
permuted too: the plan knows both.
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
"""The fields of a model that hold its head and its embeddings."""

FLOATS = frozenset({"F32", "F16", "BF16"})
PREFIXES = ("model.", "transformer.", "gpt_neox.", "language_model.")
"""What files of a base model lack, or writers of files have exchanged."""


@dataclass(frozen=True)
class Site:
    """A stored matrix `[out, width]` (of a table: `[vocab_size, width]`), under the name of its module.

    Attributes:
        leaf: the name its tensors have: another one where the head shares the table of embeddings.
        transposed: stored `[width, out]`.
        form: how it is packed, if it is.
        group: the field it is part of; experts of one field have it in common.
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
        """Names that patterns of modules may mean it by."""
        return list(dict.fromkeys([self.name, *(prefix + short(self.name) for prefix in PREFIXES[:2])]))


@dataclass(frozen=True)
class Rows:
    """`[start, stop)` of a site's rows, which lie from `offset` on in a field."""

    leaf: str
    offset: int
    start: int
    stop: int
    total: int


@dataclass(frozen=True)
class StackLeaf:
    """A tensor that holds `rows` rows of each expert, which lie from `offset` on in the field."""

    name: str
    offset: int
    rows: int


@dataclass(frozen=True)
class Stack:
    """A field with a matrix `[out, width]` for each expert, which transformers has as one parameter.

    Attributes:
        name: transformers' (`model.layers.0.mlp.experts.down_proj`); files and older releases may have another.
        path: the field.
        shape: `[experts, out, width]`.
        order: how transformers' order of rows becomes the field's.
        pieces, leaves: the stored tensors, where each expert has its own, or where they have them in common.
    """

    name: str
    path: str
    shape: tuple[int, int, int]
    order: Transform
    form: Quantization | None
    pieces: list[list[Rows]]
    leaves: list[StackLeaf]


def short(name: str) -> str:
    """A name without the prefixes that files differ in."""
    while any(name.startswith(prefix) for prefix in PREFIXES):
        name = name.partition(".")[2]
    return name


def kind_of(module: ModulePlan) -> type | None:
    """Which of the three the fields of `module` make; None for others, and for what joins several."""
    kinds = [kind for kind in (Linear, Embedding, ExpertLinear) if issubclass(module.cls, kind)]
    return kinds[0] if kinds and isinstance(module.fields.get("weight"), ArrayPlan) else None


def pieces_of(array: ArrayPlan) -> list[list[Rows]]:
    """The stored matrices of a field: of each expert, or of the only one there is; none where experts are stored as
    one tensor, which no adapter of this format names."""
    tree = array.tree
    if isinstance(tree, Join) and tree.stacked:
        experts = [_matrix(array, part) for part in tree.parts] if array.transform is IDENTITY else []
        return experts if all(experts) else []
    matrix = _matrix(array, tree)
    return [matrix] if matrix else []


def _matrix(array: ArrayPlan, tree: Tree) -> list[Rows]:
    result: list[Rows] = []
    offset = 0
    for leaf, shape in leaf_shapes(tree, array.sizes):
        if leaf.stack is not None or len(shape) != 2 or not leaf.name.endswith(".weight"):
            return []
        start, stop, total = leaf.rows or (0, shape[0], shape[0])
        result.append(Rows(leaf.name.removesuffix(".weight"), offset, start, stop, total))
        offset += stop - start
    return result


def modules(item: ModulePlan) -> Iterator[tuple[ModulePlan, type]]:
    """Every module that adapters can change, with its kind."""
    kind = kind_of(item)
    if kind is not None:
        yield item, kind
        return
    for field in item.fields.values():
        for child in field if isinstance(field, list) else [field]:
            if isinstance(child, ModulePlan):
                yield from modules(child)


def _form(module: ModulePlan) -> Quantization | None:
    values = [module.fields.get(name) for name in ("bits", "group_size", "mode")]
    return Quantization(*(item.value for item in values if isinstance(item, Value))) if values[0] else None


def width_of(module: ModulePlan) -> int:
    """Numbers in a row of its matrix, however they are packed."""
    array, form = module.fields["weight"], _form(module)
    assert isinstance(array, ArrayPlan)
    return array.shape[-1] if form is None else array.shape[-1] * 32 // form.bits


def find_sites(layout: ModulePlan, head: str) -> dict[str, Site]:
    """By name; `head` is the name of a head that shares the table of embeddings."""
    tables: set[str] = set()
    sites: dict[str, Site] = {}
    for module, kind in sorted(modules(layout), key=lambda item: item[1] is not Embedding):
        array = module.fields["weight"]
        assert isinstance(array, ArrayPlan)
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
    """The fields with experts by name."""
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
    array = module.fields["weight"]
    assert isinstance(array, ArrayPlan)
    layer = _EXPERTS.match(next(leaves(array.tree)).name)
    if layer is None:
        return None
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
    """Which row each of a field's `out` rows was before `transform`; None where they stay in order."""
    rows = mx.arange(out)[:, None]
    places = transform.invert(rows[None] if stacked else rows).flatten()  # where each of those before goes
    order = mx.argsort(places)
    return None if bool(mx.all(order == mx.arange(out))) else order


def in_field_order(stack: Stack, ups: mx.array) -> mx.array:
    """B `[E, out, r]` of a parameter of transformers with its rows in the field's order."""
    order = row_order(stack.order, ups.shape[1], stacked=True)
    return ups if order is None else ups[:, order]


def head_name(model_class: type) -> str:
    """What the family calls a head that is stored by itself."""
    names = [item.metadata[TAG].name for item in dataclasses.fields(model_class) if item.name == HEAD]
    return names[0].partition("||")[0].split("|")[0] if names else "lm_head"


def stored_dtype(source: Source, leaf: str) -> str:
    """The dtype of `numbers`."""
    header = source.headers.get(f"{leaf}.scales", source.headers[f"{leaf}.weight"])
    return header.dtype if header.dtype in FLOATS else "BF16"


def numbers(source: Source, leaf: str, form: Quantization | None) -> mx.array:
    """A matrix as it is stored, unpacked where it is packed: in the dtype of its scales, or bfloat16."""
    weight = source.read(f"{leaf}.weight")
    if form is not None and f"{leaf}.scales" in source.headers:
        scales = source.read(f"{leaf}.scales")
        biases = source.read(f"{leaf}.biases") if form.mode == "affine" else None
        weight = mx.dequantize(weight, scales, biases, group_size=form.group_size, bits=form.bits, mode=form.mode)
    return weight.astype(STORED[stored_dtype(source, leaf)])
