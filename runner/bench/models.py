"""What `bench` measures: a checkpoint, or a published shape filled with random weights."""

from __future__ import annotations

import dataclasses
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from runner import resources
from runner.checkpoint.hub import resolve
from runner.checkpoint.model_files import open_files
from runner.convert.quantize import QUANTIZATIONS
from runner.engine.engine import Engine, assemble
from runner.errors import UsageError
from runner.families import find
from runner.nn.linear import Embedding, Linear, Quantization
from runner.weights import loading
from runner.weights.plan import ArrayPlan, ModulePlan, Value, count_parameters, plan
from runner.weights.tags import Chooses
from runner.weights.tree import Leaf, leaf_shapes, leaves

STD = 0.02
"""Deviation of random weights: what most families initialise with, so that activations stay in an ordinary range."""

STORED: Mapping[str, mx.Dtype] = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
NAMES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


SCALES: Mapping[str, int] = {"mxfp4": 120, "mxfp8": 120, "nvfp4": 8}
"""A byte that means a small number (2^-7, 2^-7, 2^-6) in the format each mode stores its scales in."""

CODES: Mapping[str, int] = {"mxfp8": 0xBFBFBFBF}
"""Bits kept of random codes: without the highest bit of an 8-bit float's exponent, none of them is NaN."""


@dataclass(frozen=True)
class Header:
    """A tensor that `RandomWeights` makes: dtype in safetensors' spelling."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * (1 if self.dtype == "U8" else 4 if self.dtype in ("U32", "F32") else 2)


@dataclass(frozen=True)
class RandomWeights:
    """A `Source` whose tensors are made when they are read, from the seed and their name; nothing of them is kept.

    Packed matrices get random codes and equal scales: no matrix is ever there in full precision.
    """

    headers: Mapping[str, Header]
    form: Quantization | None
    seed: int

    def read(self, name: str) -> mx.array:
        """The tensor `name`: the same numbers each time."""
        header = self.headers[name]
        numbers = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        if header.dtype == "U32":
            codes = numbers.integers(0, 1 << 32, header.shape, dtype=np.uint32)
            return mx.array(codes & np.uint32(CODES.get(self.form.mode, 0xFFFFFFFF) if self.form else 0xFFFFFFFF))
        if self.form is not None and name.endswith((".scales", ".biases")):
            return self._constant(name, header, self.form)
        values = (numbers.random(header.shape, dtype=np.float32) - np.float32(0.5)) * np.float32(STD * math.sqrt(12))
        if len(header.shape) == 1 and name.endswith(".weight"):
            values += 1  # a norm's weights: near zero they would silence the layer
        return mx.array(values).astype(STORED[header.dtype])

    def _constant(self, name: str, header: Header, form: Quantization) -> mx.array:
        if header.dtype == "U8":
            return mx.full(header.shape, SCALES[form.mode], dtype=mx.uint8)
        most = (1 << form.bits) - 1
        scale = STD * math.sqrt(12) / most
        return mx.full(header.shape, -scale * most / 2 if name.endswith(".biases") else scale, STORED[header.dtype])


@dataclass(frozen=True)
class Subject:
    """A model to measure. `size` in bytes, `quantization` in words, `dtype` that of its activations."""

    name: str
    engine: Engine
    size: int
    parameters: int
    quantization: str
    dtype: str


def open_subject(
    model: str, *, quantize: str | None = None, group_size: int | None = None, dtype: str | None = None, seed: int = 0
) -> Subject:
    """The checkpoint in a directory, the published shape of that name with random weights, or a hub's checkpoint.

    Args:
        quantize: a shape's matrices are packed: "2" to "8" bits (affine), "mxfp4", "mxfp8" or "nvfp4".
        group_size: of affine quantization.
        dtype: "float32", "float16" or "bfloat16", whatever the checkpoint or shape says.

    Raises:
        UsageError: an option does not apply to this model, or names nothing known.
    """
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise UsageError(f"--quantize must be one of {', '.join(QUANTIZATIONS)}, not {quantize!r}")
    if group_size is not None and (quantize is None or QUANTIZATIONS[quantize].mode != "affine"):
        raise UsageError("--group-size needs --quantize with a number of bits")
    if not os.path.exists(model) and model in resources.names("shapes"):
        form = None if quantize is None else QUANTIZATIONS[quantize]
        if form is not None and group_size is not None:
            form = dataclasses.replace(form, group_size=group_size)
        raw = resources.read("shapes", model)
        engine = assemble(raw, random_weights(raw, form=form, dtype=dtype, seed=seed), dtype=dtype)
        return describe(model, engine)
    if quantize is not None:
        raise UsageError(
            f"--quantize is for a published shape ({', '.join(resources.names('shapes'))}); convert a checkpoint first"
        )
    files = open_files(resolve(model))
    return describe(files.path.resolve().name, assemble(files.config, files.source, dtype=dtype))


def random_weights(
    raw: Mapping[str, Any], *, form: Quantization | None = None, dtype: str | None = None, seed: int = 0
) -> RandomWeights:
    """The tensors that a checkpoint with this `config.json` holds, random; matrices of layers packed as `form` says.

    Raises:
        UsageError: a matrix cannot be packed in groups of this size.
    """
    config_class, model_class = find(raw)
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
    """Weights of the layers that MLX packs: those that choose their class by what is stored."""
    for name, item in module.fields.items():
        if isinstance(item, ArrayPlan) and name == "weight" and issubclass(module.cls, Chooses):
            yield from leaves(item.tree)
        elif isinstance(item, ModulePlan):
            yield from _matrices(item)
        elif isinstance(item, list):
            for element in item:
                yield from _matrices(element)


def _packed(name: str, shape: tuple[int, ...], form: Quantization, stored: str) -> dict[str, Header]:
    if shape[-1] % form.group_size or shape[-1] * form.bits % 32:
        raise UsageError(f"{name} {list(shape)} cannot be packed in groups of {form.group_size}; try --group-size 32")
    groups = (*shape[:-1], shape[-1] // form.group_size)
    headers = {
        f"{name}.weight": Header("U32", (*shape[:-1], shape[-1] * form.bits // 32)),
        f"{name}.scales": Header(stored if form.mode == "affine" else "U8", groups),
    }
    return headers | ({f"{name}.biases": Header(stored, groups)} if form.mode == "affine" else {})


def describe(name: str, engine: Engine) -> Subject:
    """What a row of the table says of a model."""
    stored = Counter(_forms(engine.layout))
    stored.update(
        str(array.dtype).removeprefix("mlx.core.")
        for path, array in loading.arrays(engine.model)
        if array.ndim > 1 and array.dtype != mx.uint32 and not path.endswith((".scales", ".biases"))
    )
    words = [word for word, _ in stored.most_common()]
    dtype = engine.device.activations or next(
        (a.dtype for path, a in loading.arrays(engine.model) if path.endswith("norm.weight")), mx.float32
    )
    return Subject(
        name=name,
        engine=engine,
        size=engine.nbytes,
        parameters=count_parameters(engine.layout),
        quantization=" + ".join(words),
        dtype=str(dtype).removeprefix("mlx.core."),
    )


def _forms(module: ModulePlan) -> Iterator[str]:
    values = {name: item.value for name, item in module.fields.items() if isinstance(item, Value)}
    if "scales" in module.fields and issubclass(module.cls, (Linear, Embedding)):
        mode = "" if values["mode"] == "affine" else f" {values['mode']}"
        yield f"{values['bits']}-bit{mode} g{values['group_size']}"
    for item in module.fields.values():
        for child in item if isinstance(item, list) else [item]:
            if isinstance(child, ModulePlan):
                yield from _forms(child)
