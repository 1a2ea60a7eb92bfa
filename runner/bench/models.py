"""Models for `bench`: a checkpoint, or a published shape (`configs/shapes`) filled with random weights."""

from __future__ import annotations

import dataclasses
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from runner import resources
from runner.checkpoint import names
from runner.checkpoint.kept import read_names
from runner.checkpoint.model_files import name_of, open_files
from runner.convert.quantize import QUANTIZATIONS
from runner.engine.loaded import Loaded, assemble
from runner.errors import UsageError
from runner.families import find
from runner.local_files import quoted
from runner.nn.linear import Embedding, Linear, Quantization
from runner.nn.moe import ExpertLinear
from runner.ops.device import EXACT
from runner.ops.owner import OWNER
from runner.weights import loading
from runner.weights.cuts import Cut, cut_shape
from runner.weights.plan import ArrayPlan, ModulePlan, count_parameters, packed_as, plan
from runner.weights.tags import Source
from runner.weights.tree import Leaf, leaf_shapes, leaves

if TYPE_CHECKING:
    from runner.engine.part import Part

SHAPE = "shape:"
"""What a published shape's name may begin with, to be told from a model's."""

STD = 0.02
"""Standard deviation of random weights: most families initialise with it, so activations stay in an ordinary range."""

STORED: Mapping[str, mx.Dtype] = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
NAMES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


SCALES: Mapping[str, int] = {"mxfp4": 120, "mxfp8": 120, "nvfp4": 8}
"""The scale byte for each mode of quantization: a small number (2^-7, 2^-7, 2^-6) in the mode's scale format."""

CODES: Mapping[str, int] = {"mxfp8": 0xBFBFBFBF}
"""Mask for random packed words: without the highest exponent bit of each 8-bit float, none of them is NaN."""

WORD = 0xFFFFFFFF
"""The largest of 32 bits."""

HASH = ((16, 0x7FEB352D), (15, 0x846CA68B))
"""The steps of the hash of a place: a shift and a factor each."""

QUANTIZED = (Linear, Embedding, ExpertLinear)
"""The layers with a weight that MLX quantizes."""


@dataclass(frozen=True)
class Header:
    """Shape and dtype (as safetensors spells it) of a tensor that `RandomWeights` makes."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * (1 if self.dtype == "U8" else 4 if self.dtype in ("U32", "F32") else 2)


@dataclass(frozen=True)
class RandomWeights:
    """A `Source` whose tensors are made on reading, each number from the seed, the tensor's name and its place there.

    So a part of a tensor is made without the rest, on any device, and a quantized matrix, of random packed integers and
    equal scales, never exists in full precision. Nothing is kept.

    Attributes:
        form: the quantization of the matrices; None: not quantized.
    """

    headers: Mapping[str, Header]
    form: Quantization | None
    seed: int

    def read(self, name: str) -> mx.array:
        """Make the tensor `name`; it has the same numbers each time."""
        return self.read_part(name, (None,) * len(self.headers[name].shape))

    def read_part(self, name: str, cut: Cut) -> mx.array:
        """Make the kept places of the tensor `name`: memory holds them twice for a moment."""
        header = self.headers[name]
        if self.form is not None and name.endswith((".scales", ".biases")):
            return self._constant(name, header, cut_shape(header.shape, cut), self.form)
        blocks: list[mx.array] = []
        for words in _words(zlib.crc32(name.encode(), self.seed), header.shape, cut):
            if blocks:
                mx.eval(blocks[-1])  # what it is made of goes before the next one is
            blocks.append(self._numbers(name, header, words))
        return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks)

    def _numbers(self, name: str, header: Header, words: mx.array) -> mx.array:
        """What a tensor has in places with these random words."""
        if header.dtype == "U32":
            return words & mx.array(CODES.get(self.form.mode, WORD) if self.form else WORD, mx.uint32)
        # A uniform distribution with standard deviation STD is sqrt(12) * STD wide.
        wide = STD * math.sqrt(12)
        # A norm's weights: near zero they would silence the layer.
        middle = 1.0 if len(header.shape) == 1 and name.endswith(".weight") else 0.0
        return (words.astype(mx.float32) * (wide / (WORD + 1)) + (middle - wide / 2)).astype(STORED[header.dtype])

    def _constant(self, name: str, header: Header, shape: tuple[int, ...], form: Quantization) -> mx.array:
        """Scales or biases that turn random integers into weights of mean 0 and (affine) standard deviation `STD`."""
        if header.dtype == "U8":
            return mx.full(shape, SCALES[form.mode], dtype=mx.uint8)
        most = (1 << form.bits) - 1  # the largest integer q: `scale * q + bias` runs from bias to -bias
        scale = STD * math.sqrt(12) / most
        return mx.full(shape, -scale * most / 2 if name.endswith(".biases") else scale, STORED[header.dtype])


def _words(key: int, shape: Sequence[int], cut: Cut) -> Iterator[mx.array]:
    """Random words of the kept places of a tensor `[shape]`, uint32, in blocks along its first axis.

    A word is a hash of its place. Source: lowbias32 of Chris Wellons' Hash Prospector
    (https://github.com/skeeto/hash-prospector).
    """
    places = []
    for axis, (size, kept) in enumerate(zip(shape, cut, strict=True)):
        found = [mx.arange(*each, dtype=mx.uint32) for each in (((0, size),) if kept is None else kept)]
        stride = math.prod(shape[axis + 1 :]) & WORD
        own = (mx.concatenate(found) if found else mx.zeros(0, mx.uint32)) * mx.array(stride, mx.uint32)
        places.append(own.reshape(-1, *(1,) * (len(shape) - axis - 1)))
    if not places:
        places.append(mx.zeros((), mx.uint32))
    rows, *rest = places
    start = sum(rest, mx.array(key, mx.uint32))
    count = max(_block() // max(start.size, 1), 1)
    for first in range(0, max(rows.shape[0], 1), count) if rows.ndim else (0,):
        x = (rows[first : first + count] if rows.ndim else rows) + start
        for shift, factor in HASH:
            x = (x ^ (x >> shift)) * mx.array(factor, mx.uint32)
        yield x ^ (x >> 16)


def _block() -> int:
    """Numbers that are made at once: on a CPU, few enough for its caches."""
    return 1 << 16 if mx.default_device() == mx.Device(mx.cpu) else 1 << 24


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        size: bytes of the weights.
        quantization: how the matrices are stored, most frequent first, as in "4-bit g64 + bfloat16".
        dtype: dtype of the activations.
    """

    name: str
    engine: Loaded
    size: int
    parameters: int
    quantization: str
    dtype: str


def open_subject(
    model: str,
    *,
    quantize: str | None = None,
    group_size: int | None = None,
    dtype: str | None = None,
    activations: str = EXACT,
    seed: int = 0,
    part: Part | None = None,
) -> Subject:
    """Open the checkpoint that `runner.load` finds by the name `model`, or the published shape of that name.

    Args:
        model: see `published`.
        quantize: how to quantize a shape's matrices: "2" to "8" bits (affine), "mxfp4", "mxfp8" or "nvfp4".
        group_size: weights per scale, for affine quantization.
        dtype: "float32", "float16" or "bfloat16", whatever the checkpoint or shape says.
        activations: as for `runner.load`.
        seed: seed of a shape's random weights.
        part: this process's part of the model; see `runner.load`.

    Raises:
        UsageError: an option does not apply to this model or has an unknown value, or the model's name is ambiguous.
    """
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise UsageError(f"--quantize must be one of {', '.join(QUANTIZATIONS)}, not {quantize!r}")
    if group_size is not None and (quantize is None or QUANTIZATIONS[quantize].mode != "affine"):
        raise UsageError("--group-size needs --quantize with a number of bits")
    shape = published(model)
    if shape is not None:
        form = None if quantize is None else QUANTIZATIONS[quantize]
        if form is not None and group_size is not None:
            form = dataclasses.replace(form, group_size=group_size)
        raw = resources.read("shapes", shape)
        source = random_weights(raw, form=form, dtype=dtype, seed=seed)
        return describe(shape, _loaded(raw, source, dtype, activations, part))
    if quantize is not None:
        raise UsageError(
            f"--quantize applies to published shapes only ({', '.join(resources.names('shapes'))}); "
            "quantize a checkpoint with 'runner convert' first"
        )
    files = open_files(names.resolve(model))
    return describe(name_of(files.path), _loaded(files.config, files.source, dtype, activations, part))


def _loaded(raw: Mapping[str, Any], source: Source, dtype: str | None, activations: str, part: Part | None) -> Loaded:
    """The model, loaded on the thread that computes with it: another could leave it arrays that it cannot compute."""

    def update(done: int, total: int) -> None:
        OWNER.check_wanted()  # Ctrl-C in the waiting thread ends the loading too

    def job() -> Loaded:
        return assemble(raw, source, dtype=dtype, progress=update, activations=activations, part=part)

    return OWNER.run(job, mx.default_device())


def published(model: str) -> str | None:
    """The published shape that a name means, None where it means a checkpoint.

    `shape:NAME` is a shape. A path, an alias and the whole name of a stored model come before a shape of the same name;
    one that a stored model's name only begins with is ambiguous.

    Raises:
        UsageError: the name is ambiguous, or near that of a shape and itself that of none and of no model.
        HubError: it is that of no model and of no shape.
    """
    shapes = resources.names("shapes")
    if model.startswith(SHAPE):
        resources.read("shapes", model.removeprefix(SHAPE))
        return model.removeprefix(SHAPE)
    if "/" in model or os.path.exists(model):
        names.refuse_missing(model)
        return None
    stored = names.stored_models()
    if model not in shapes:
        near = names.nearest(model, shapes)
        if near is not None and model not in read_names().aliases and not names.called(model, stored):
            raise UsageError(f"no model and no published shape is called {quoted(model)}: did you mean {near}?")
        names.meaning(model)
        return None
    found = names.called(model, stored)
    if model in read_names().aliases or any(one.name.casefold() == model.casefold() for one in found):
        return None
    if found:
        raise UsageError(
            f"{quoted(model)} could be {names.either([one.id for one in found])}, or the published shape: "
            f"write {SHAPE}{model}, or the model's whole name"
        )
    return model


def random_weights(
    raw: Mapping[str, Any], *, form: Quantization | None = None, dtype: str | None = None, seed: int = 0
) -> RandomWeights:
    """Plan random tensors for a checkpoint with the config `raw`; matrices of layers are quantized as `form` says.

    Raises:
        UsageError: a matrix cannot be quantized in groups of this size.
    """
    config_class, model_class = find(raw)
    # Without headers, the plan says what a plain checkpoint of this config would hold.
    layout = plan(model_class, config_class.from_dict(raw), None)
    stored = NAMES[dtype or str(raw.get("dtype") or raw.get("torch_dtype") or "float32")]
    packed = set() if form is None else {leaf.name for leaf in _matrices(layout)}
    headers: dict[str, Header] = {}
    for array in layout.arrays():
        for leaf, size in leaf_shapes(array.tree, array.sizes):
            shape = array.transform.stored_shape(size)
            if form is not None and leaf.name in packed:
                headers |= _packed(leaf.name.removesuffix(".weight"), shape, form, stored)
            else:
                headers[leaf.name] = Header(stored, shape)
    return RandomWeights(headers, form, seed)


def _matrices(module: ModulePlan) -> Iterator[Leaf]:
    """Yield the weights of the layers that MLX quantizes: products and tables, not convolutions."""
    for name, item in module.fields.items():
        if isinstance(item, ArrayPlan) and name == "weight" and issubclass(module.cls, QUANTIZED):
            yield from leaves(item.tree)
        elif isinstance(item, ModulePlan):
            yield from _matrices(item)
        elif isinstance(item, list):
            for element in item:
                yield from _matrices(element)


def _packed(name: str, shape: tuple[int, ...], form: Quantization, stored: str) -> dict[str, Header]:
    """Headers of a quantized matrix: packed weight, scales and (affine) biases."""
    if shape[-1] % form.group_size or shape[-1] * form.bits % 32:
        size = form.group_size
        raise UsageError(f"{name} {list(shape)} cannot be quantized in groups of {size}; try --group-size 32")
    groups = (*shape[:-1], shape[-1] // form.group_size)
    headers = {
        f"{name}.weight": Header("U32", (*shape[:-1], shape[-1] * form.bits // 32)),
        f"{name}.scales": Header(stored if form.mode == "affine" else "U8", groups),
    }
    return headers | ({f"{name}.biases": Header(stored, groups)} if form.mode == "affine" else {})


def describe(name: str, engine: Loaded) -> Subject:
    """Gather what a row of the results says about a model, all of it where it is shared out over processes."""
    whole = engine.layout if engine.part is None else engine.part.whole or engine.layout
    stored = Counter(_forms(whole))
    stored.update(
        str(array.dtype).removeprefix("mlx.core.")
        for path, array in loading.arrays(engine.model)
        if array.ndim > 1 and array.dtype != mx.uint32 and not path.endswith((".scales", ".biases"))
    )
    words = [word for word, _ in stored.most_common()]
    return Subject(
        name=name,
        engine=engine,
        size=engine.nbytes + (0 if engine.part is None else engine.part.elsewhere),
        parameters=count_parameters(whole),
        quantization=" + ".join(words),
        dtype=str(engine.dtype).removeprefix("mlx.core."),
    )


def _forms(module: ModulePlan) -> Iterator[str]:
    """Yield the quantization of each quantized layer, as in `4-bit g64`."""
    packed = packed_as(module)
    if packed is not None and issubclass(module.cls, (Linear, Embedding)):
        yield packed
    for item in module.fields.values():
        for child in item if isinstance(item, list) else [item]:
            if isinstance(child, ModulePlan):
                yield from _forms(child)
