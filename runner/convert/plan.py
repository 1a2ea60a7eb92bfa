"""Plans a conversion: decides from headers what becomes of each tensor, and checks the result against the model's tags.

The tags, never guesses from names, say which tensors are matrices of layers, and which of those route to experts.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from runner.checkpoint.shard_writer import WIDTHS, Planned, bytes_of
from runner.config.base import readable_keys
from runner.config.rope_keys import OF_SLIDING, normalise
from runner.convert.mlx_names import (
    AFFINE_ONLY,
    RENAMED,
    SPLIT,
    SUFFIX,
    TYPES,
    Target,
    layer_target,
    renamed,
    spelled,
)
from runner.convert.quantize import Quantizer
from runner.engine.dtypes import DTYPES
from runner.errors import CheckpointError, UsageError, WeightsError
from runner.families import find
from runner.nn.linear import Embedding, Linear, Quantization
from runner.nn.moe import ExpertLinear, MoE
from runner.weights.plan import ArrayPlan, ModulePlan, Value, count_parameters, plan
from runner.weights.tags import FLOAT, Header, Source
from runner.weights.transforms import Transform
from runner.weights.tree import Leaf, leaf_shapes, leaves

NAMES: Mapping[mx.Dtype, str] = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}
STORED: Mapping[str, mx.Dtype] = {name: dtype for dtype, name in NAMES.items()}
QUANTIZATION = ("quantization", "quantization_config", "compression_config")
"""Config keys that describe how the source is quantized; none of them is copied."""

ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")
"""Keys of transformers before version 5, which mlx-lm reads for most families: written next to `rope_parameters`."""


@dataclass(frozen=True)
class Output:
    """Where one array of a job goes; `shape` is that of each target tensor, for a slot without the axis of experts."""

    target: Target
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """One step: stored arrays of the source, and what is written for them, by field ("weight", "scales", "biases").

    `form` and `into` say how the matrix is quantized before and after, `dtype` the type of its numbers in between
    (None: as stored). An array that is only copied is a "weight" with neither form.
    """

    arrays: Mapping[str, tuple[Leaf, Transform]]
    form: Quantization | None
    into: Quantization | None
    dtype: mx.Dtype | None
    outputs: Mapping[str, Output]


@dataclass(frozen=True)
class Conversion:
    """A complete plan: what is written, the config for it, and the layout of the model that reads it.

    Attributes:
        forms: the number of matrices by form ("4-bit g64", "plain").
        unpackable: matrices that stay plain because their inputs do not divide into groups.
        bits_before, bits_after: bits per weight, scales included.
    """

    config: dict[str, Any]
    headers: Mapping[str, Planned]
    layout: ModulePlan
    jobs: Sequence[Job]
    forms: Mapping[str, int]
    unpackable: tuple[str, ...]
    bits_before: float
    bits_after: float


def plan_conversion(
    raw: Mapping[str, Any], source: Source, *, quantizer: Quantizer | None = None, dtype: str | None = None
) -> Conversion:
    """Plan a conversion from a `config.json` object and the headers of `source`.

    Arguments and errors are those of `runner.convert.convert.convert`.

    No tensor is read, except where the source stores a tied head: it is compared with the embeddings.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    return _Planner(raw, source, quantizer, None if dtype is None else DTYPES[dtype]).conversion()


@dataclass(frozen=True)
class _Matrix:
    """A matrix of the source (or a stack of them): its stored arrays by field, and its shape as a layer multiplies it.

    `form` is how it is quantized, None for plain numbers; `packed` has the shapes of its arrays as a layer holds them;
    `gate`: whether it routes to experts.
    """

    path: str
    stem: str
    arrays: Mapping[str, tuple[Leaf, Transform]]
    packed: Mapping[str, tuple[int, ...]]
    shape: tuple[int, ...]
    form: Quantization | None
    gate: bool


@dataclass(frozen=True)
class _Plain:
    """A tensor that is no matrix, with dtype and shape as the model has it.

    `layer`: whether it belongs to a layer with a matrix, whose name it shares; `kept`: whether its dtype must stay.
    """

    leaf: Leaf
    transform: Transform
    dtype: str
    shape: tuple[int, ...]
    layer: bool
    kept: bool


class _Planner:
    """Decides what becomes of each tensor of one model."""

    def __init__(
        self, raw: Mapping[str, Any], source: Source, quantizer: Quantizer | None, dtype: mx.Dtype | None
    ) -> None:
        self.raw = raw
        self.source = source
        self.quantizer = quantizer
        self.dtype = dtype
        self.config_class, self.model_class = find(raw)
        self.config = self.config_class.from_dict(raw)
        self.layout = plan(self.model_class, self.config, source.headers)
        used = {leaf.name for array in self.layout.arrays() for leaf in leaves(array.tree)}
        foreign = next((name for name in sorted(used) if source.headers[name].dtype not in WIDTHS), None)
        if foreign is not None:
            raise CheckpointError(f"{foreign} has dtype {source.headers[foreign].dtype}, which MLX does not hold")
        self.untied = False
        # A tensor that two fields share is converted once.
        self.found: dict[str, _Matrix | _Plain] = {}
        for item in self.tensors(self.layout, gate=False):
            self.found.setdefault(item.stem if isinstance(item, _Matrix) else item.leaf.name, item)
        heads = {
            leaf.name
            for name, item in self.layout.fields.items()
            if name == "lm_head" and isinstance(item, ModulePlan)
            for array in item.arrays()
            for leaf in leaves(array.tree)
        }
        self.heads = {SUFFIX.sub("", name) for name in heads}

    def tensors(self, module: ModulePlan, *, gate: bool) -> Iterator[_Matrix | _Plain]:
        """Yield everything stored below `module`, each matrix together with its scales."""
        matrix = issubclass(module.cls, Linear | Embedding | ExpertLinear) and "weight" in module.fields
        if matrix and self.shadowed(module):
            return
        if matrix:
            yield from self.matrices(module, gate)
        # Tensors directly in a mixture of experts (a router's corrections) and its linear layers decide the routing.
        routes = issubclass(module.cls, MoE)
        for name, item in module.fields.items():
            if isinstance(item, ArrayPlan) and not (matrix and name in ("weight", "scales", "biases")):
                for leaf, shape in leaf_shapes(item.tree, item.sizes):
                    dtype = self.source.headers[leaf.name].dtype
                    yield _Plain(leaf, item.transform, dtype, shape, layer=matrix, kept=routes)
            elif isinstance(item, ModulePlan):
                yield from self.tensors(item, gate=routes and issubclass(item.cls, Linear))
            elif isinstance(item, list):
                for element in item:
                    yield from self.tensors(element, gate=gate)

    def matrices(self, module: ModulePlan, gate: bool) -> Iterator[_Matrix]:
        """Yield the matrices of one layer: several where parts are fused or experts stored one by one."""
        values = {name: item.value for name, item in module.fields.items() if isinstance(item, Value)}
        packed = "scales" in module.fields
        form = Quantization(values["bits"], values["group_size"], values["mode"]) if packed else None
        fields = {
            name: item
            for name in ("weight", "scales", "biases")
            if isinstance(item := module.fields.get(name), ArrayPlan)
        }
        stored = {name: list(leaf_shapes(item.tree, item.sizes)) for name, item in fields.items()}
        for index, (leaf, shape) in enumerate(stored["weight"]):
            width = shape[-1] if form is None else shape[-1] * 32 // form.bits
            yield _Matrix(
                path=module.path,
                stem=SUFFIX.sub("", leaf.name),
                arrays={name: (stored[name][index][0], item.transform) for name, item in fields.items()},
                packed={name: shapes[index][1] for name, shapes in stored.items()},
                shape=(*shape[:-1], width),
                form=form,
                gate=gate,
            )

    def shadowed(self, module: ModulePlan) -> bool:
        """Whether a tied head is stored although it equals the embeddings: then it is left out.

        A stored head that differs is what the model uses: it is kept, and the two are no longer tied.
        """
        arrays = [item for item in module.fields.values() if isinstance(item, ArrayPlan)]
        # A stored head that the config ties has the embeddings as its twin: all arrays must be equal.
        twins = [(item.tree, item.same_as) for item in arrays if item.same_as is not None]
        if not twins:
            return False
        equal = all(
            self.digest(a.name) == self.digest(b.name)
            for tree, twin in twins
            for a, b in zip(leaves(tree), leaves(twin), strict=True)
        )
        self.untied |= not equal
        return equal

    def digest(self, name: str) -> tuple[str, tuple[int, ...], bytes]:
        """A key that two tensors share if they are equal; comparing keys needs one tensor in memory at a time."""
        header = self.source.headers[name]
        return header.dtype, header.shape, hashlib.sha256(bytes_of(self.source.read(name))).digest()

    def conversion(self) -> Conversion:
        """Make the plan, checked against the model's tags."""
        forms = {stem: self.form_of(item) for stem, item in self.found.items() if isinstance(item, _Matrix)}
        # Wanted, but with inputs that do not divide into groups.
        unpackable = tuple(
            stem
            for stem, item in self.found.items()
            if isinstance(item, _Matrix) and self.wanted(item) and forms[stem] is None
        )
        if self.quantizer is not None and not any(
            form is not None and self.rewritten(item)
            for stem, form in forms.items()
            if isinstance(item := self.found[stem], _Matrix)
        ):
            raise UsageError(self.nothing_to_pack(unpackable))
        # mlx-lm renames plain checkpoints itself, so only quantized ones (and gpt-oss's blocks) need its names.
        packed = any(forms.values())
        foreign = any(name.endswith("_blocks") for name in self.source.headers)
        try:
            return self.laid_out(forms, unpackable, rename=packed or foreign)
        except WeightsError:
            if not packed or spelled(self.raw) in RENAMED.keys() | SPLIT.keys():
                raise
            return self.laid_out(forms, unpackable, rename=False)  # the family's tags read no other names

    def wanted(self, item: _Matrix) -> bool:
        """Whether the matrix should be quantized."""
        if self.quantizer is None or item.gate or not self.rewritten(item):
            return False
        plain = AFFINE_ONLY.get(str(self.raw["model_type"]), ())
        return self.quantizer.form.mode == "affine" or item.stem.rpartition(".")[2] not in plain

    def rewritten(self, item: _Matrix) -> bool:
        """Whether the matrix is converted: a quantized one is copied as it is, unless a dtype is asked for."""
        return item.form is None or self.dtype is not None

    def form_of(self, item: _Matrix) -> Quantization | None:
        """The form a matrix is written in; None for plain numbers."""
        if not self.rewritten(item):
            return item.form
        if self.quantizer is None or not self.wanted(item):
            return None
        # A tied head's matrix is found as the embeddings', but it counts as a head for recipes.
        path = "lm_head" if item.stem in self.heads else item.path
        form = self.quantizer.of(path, item.stem, self.config.num_hidden_layers)
        return None if item.shape[-1] % form.group_size else form

    def nothing_to_pack(self, unpackable: tuple[str, ...]) -> str:
        """The message for a quantizer that applies to no matrix."""
        assert self.quantizer is not None
        if unpackable:
            size = self.quantizer.form.group_size
            return f"no matrix of this model has inputs that divide into groups of {size}; try a smaller --group-size"
        return (
            "all matrices of this model are quantized already, and quantizing them again loses precision twice: start "
            "from the original model, or add --dtype float16 (or another) to dequantize them first"
        )

    def laid_out(
        self, forms: Mapping[str, Quantization | None], unpackable: tuple[str, ...], *, rename: bool
    ) -> Conversion:
        """Lay out names, shapes and jobs, under mlx-lm's names if `rename`, else under the source's."""
        jobs: list[Job] = []
        layers: dict[str, Quantization | None] = {}
        for stem, item in self.found.items():
            if isinstance(item, _Plain):
                jobs.append(self.copied(item, rename))
                continue
            made = self.matrix_jobs(item, forms[stem], rename)
            jobs += made
            # The config describes the layers by the names they are written under.
            for name in made[0].outputs["weight"].target.names:
                layers[SUFFIX.sub("", name)] = forms[stem]
        # Tensors are written in the order they have in the source.
        position = {name: index for index, name in enumerate(self.source.headers)}
        jobs.sort(key=lambda job: position[job.arrays["weight"][0].name])
        headers = _headers(jobs)
        config = self.written_config(layers)
        layout = plan(self.model_class, self.config_class.from_dict(config), headers)
        return Conversion(
            config=config,
            headers=headers,
            layout=layout,
            jobs=jobs,
            forms=Counter(map(_words, layers.values())),
            unpackable=unpackable,
            bits_before=_bits(self.layout, self.source.headers),
            bits_after=_bits(layout, headers),
        )

    def matrix_jobs(self, item: _Matrix, into: Quantization | None, rename: bool) -> list[Job]:
        """One job for a matrix that is converted, or one for each array of a quantized matrix that stays so."""
        if not self.rewritten(item):
            copies = []
            for field, (leaf, transform) in item.arrays.items():
                # gpt-oss's blocks are bytes: they become words.
                stored = "U32" if field == "weight" else self.source.headers[leaf.name].dtype
                plain = _Plain(leaf, transform, stored, item.packed[field], layer=True, kept=True)
                copies.append(self.copied(plain, rename))
            return copies
        # A plain matrix that stays plain under its own name also keeps its stored order.
        leaf, _ = item.arrays["weight"]
        if item.form is None and into is None and not rename:
            shape = self.source.headers[leaf.name].shape  # in the file's order
        else:
            shape = item.shape
        name = leaf.name if item.form is None and not rename else f"{item.stem}.weight"
        target = self.target(name, layer=True, rename=rename)
        shape = _share(shape, target, leaf)
        dtype = self.dtype or STORED[self.source.headers[leaf.name].dtype]
        outputs = {"weight": Output(target, NAMES[dtype], shape)}
        # A code takes `bits` bits of a word, a group one scale: a byte in the float modes.
        if into is not None:
            words, groups = shape[-1] * into.bits // 32, shape[-1] // into.group_size
            outputs["weight"] = Output(target, "U32", (*shape[:-1], words))
            scales = Output(_field(target, "scales"), "U8", (*shape[:-1], groups))
            if into.mode == "affine":
                scales = dataclasses.replace(scales, dtype=NAMES[dtype])
                outputs["biases"] = dataclasses.replace(scales, target=_field(target, "biases"))
            outputs["scales"] = scales
        return [Job(item.arrays, item.form, into, dtype, outputs)]

    def copied(self, item: _Plain, rename: bool) -> Job:
        """The job for a tensor that is copied, possibly to another dtype."""
        # Under mlx-lm's names a layer's tensor has the model's shape; any other stays as the file has it.
        header = self.source.headers[item.leaf.name]
        own = rename and item.layer
        dtype, shape = (item.dtype, item.shape) if own else (header.dtype, header.shape)  # else in the file's order
        cast = self.dtype if dtype in FLOAT and not item.kept else None
        target = self.target(item.leaf.name, layer=item.layer, rename=rename)
        output = Output(target, dtype if cast is None else NAMES[cast], _share(shape, target, item.leaf))
        return Job({"weight": (item.leaf, item.transform)}, None, None, cast, {"weight": output})

    def target(self, name: str, *, layer: bool, rename: bool) -> Target:
        """The tensors that `name` is written to."""
        model_type = spelled(self.raw)
        if not rename:
            return Target((name,))
        return layer_target(model_type, name) if layer else Target((renamed(model_type, name),))

    def written_config(self, layers: Mapping[str, Quantization | None]) -> dict[str, Any]:
        """The source's config with what changed.

        Quantized layers are described as mlx-lm does: the commonest form, and by name the layers that differ.
        """
        config = {name: value for name, value in self.raw.items() if name not in QUANTIZATION}
        if self.dtype is not None:
            # The key for the dtype is the one that the source has.
            spelled = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
            config |= dict.fromkeys(spelled, str(self.dtype).removeprefix("mlx.core."))
        if self.untied:
            config["tie_word_embeddings"] = False
        counts = Counter(form for form in layers.values() if form is not None)
        if counts:
            ((common, _),) = counts.most_common(1)
            others = {
                name: dataclasses.asdict(form) for name, form in layers.items() if form is not None and form != common
            }
            config["quantization"] = {**dataclasses.asdict(common), **others}
            config["quantization_config"] = config["quantization"]  # the hub looks for this one
            config["model_type"] = TYPES.get(str(config["model_type"]), config["model_type"])
            # Where each type of layer has a RoPE of any kind, mlx-lm reads `rope_parameters` as it is.
            if OF_SLIDING not in readable_keys(self.config_class):
                spelled_out = normalise(self.raw)
                config |= {name: spelled_out[name] for name in ROPE if name in spelled_out and name not in config}
        return config


def _headers(jobs: Sequence[Job]) -> dict[str, Planned]:
    """The headers of what the jobs write; the slots of a stack become one tensor."""
    found: dict[str, Output] = {}
    slots: dict[str, set[int]] = {}
    for job in jobs:
        for output in job.outputs.values():
            for name in output.target.names:
                # Only the slots of a stack may share a name, each of them once and all of one shape and dtype.
                slot = output.target.slot
                if slot is not None and slot not in slots.setdefault(name, set()):
                    slots[name].add(slot)
                elif name in found:
                    raise CheckpointError(f"two tensors of this model would be written as {name}")
                if found.setdefault(name, output).shape != output.shape or found[name].dtype != output.dtype:
                    raise CheckpointError(
                        f"the parts of {name} differ in dtype or shape: {found[name].dtype} {found[name].shape} and "
                        f"{output.dtype} {output.shape}"
                    )
    return {
        name: Planned(output.dtype, (len(slots[name]), *output.shape) if name in slots else output.shape)
        for name, output in found.items()
    }


def _share(shape: tuple[int, ...], target: Target, leaf: Leaf) -> tuple[int, ...]:
    """The shape of each tensor of a target, which get equal shares of the rows."""
    axis = 0 if leaf.stack is None else 1
    count = len(target.names)
    return (*shape[:axis], shape[axis] // count, *shape[axis + 1 :]) if count > 1 else shape


def _field(target: Target, field: str) -> Target:
    """The target for another array of the same layers: their names with `field` at the end."""
    return dataclasses.replace(target, names=tuple(f"{SUFFIX.sub('', name)}.{field}" for name in target.names))


def _bits(layout: ModulePlan, headers: Mapping[str, Header]) -> float:
    """Bits per weight, scales included."""
    used = {leaf.name for array in layout.arrays() for leaf in leaves(array.tree)}
    return 8 * sum(headers[name].nbytes for name in used) / max(count_parameters(layout), 1)


def _words(form: Quantization | None) -> str:
    """Describe a form for the report: "4-bit g64", "4-bit mxfp4 g32", "plain"."""
    if form is None:
        return "plain"
    return f"{form.bits}-bit{'' if form.mode == 'affine' else f' {form.mode}'} g{form.group_size}"
