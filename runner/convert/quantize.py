"""How matrices can be packed when a model is converted: the forms of `--quantize`, and recipes that mix two."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from runner.errors import UsageError
from runner.nn.linear import Quantization

QUANTIZATIONS: Mapping[str, Quantization] = {
    **{str(bits): Quantization(bits, 64, "affine") for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": Quantization(4, 32, "mxfp4"),
    "mxfp8": Quantization(8, 32, "mxfp8"),
    "nvfp4": Quantization(4, 16, "nvfp4"),
}
"""What `--quantize` takes, with the group size that MLX has for it by default."""

AFFINE_GROUPS = (32, 64, 128)
"""Group sizes that `mx.quantize` has for affine forms; each other mode has one."""


@dataclass(frozen=True)
class Recipe:
    """More bits for the matrices whose errors weigh most. Fields are named as models name them, whatever a file does.

    Attributes:
        bits: of those matrices; the group size is that of all.
        heads: fields that always get them, one tied to an embedding with that embedding.
        fields: fields that get them in some layers: see `in_layer`.
        parts: the same for single matrices of a fused field, by the last word of their name in the file.
    """

    bits: int
    heads: tuple[str, ...]
    fields: tuple[str, ...]
    parts: tuple[str, ...]

    @staticmethod
    def in_layer(index: int, layers: int) -> bool:
        """The first and last eighth of the layers, and every third between."""
        eighth = layers // 8
        return index < eighth or index >= 7 * layers // 8 or (index - eighth) % 3 == 2

    def favours(self, path: str, stem: str, layers: int) -> bool:
        """Whether the matrix that the file calls `stem`, in the field `path` of a model of `layers`, gets more bits."""
        words = [word for word in path.split(".") if word != "parts" and not word.isdigit()]
        if words[-1] in self.heads:
            return True
        if words[-1] not in self.fields and stem.rpartition(".")[2] not in self.parts:
            return False
        numbers = [int(word) for word in path.split(".") if word.isdigit()]
        return bool(numbers) and self.in_layer(numbers[0], layers)


RECIPES: Mapping[str, Recipe] = {
    "mixed": Recipe(bits=6, heads=("lm_head",), fields=("down_proj", "kv_a_proj", "kv_b_proj"), parts=("v_proj",))
}
"""`mixed` is llama.cpp's Q4_K_M (`use_more_bits` in src/llama-quant.cpp) in the form that mlx-lm gave it as `mixed_4_6`
(mlx_lm/convert.py): values, the way down and the head; the two compressed projections stand for values in MLA."""


@dataclass(frozen=True)
class Quantizer:
    """What a model's matrices become."""

    form: Quantization
    recipe: Recipe | None = None

    def of(self, path: str, stem: str, layers: int) -> Quantization:
        """The form of one matrix; arguments of `Recipe.favours`."""
        if self.recipe is not None and self.recipe.favours(path, stem, layers):
            return dataclasses.replace(self.form, bits=self.recipe.bits)
        return self.form


def quantizer(quantize: str, group_size: int | None = None, recipe: str | None = None) -> Quantizer:
    """Read the options.

    Raises:
        UsageError: a form, group size or recipe that there is not, or that do not go together.
    """
    if quantize not in QUANTIZATIONS:
        raise UsageError(f"--quantize must be one of {', '.join(QUANTIZATIONS)}, not {quantize!r}")
    form = QUANTIZATIONS[quantize]
    allowed = AFFINE_GROUPS if form.mode == "affine" else (form.group_size,)
    if group_size is not None and group_size not in allowed:
        raise UsageError(
            f"--group-size must be {' or '.join(map(str, allowed))} with --quantize {quantize}, not {group_size}"
        )
    form = dataclasses.replace(form, group_size=group_size or form.group_size)
    if recipe is None:
        return Quantizer(form)
    if recipe not in RECIPES:
        raise UsageError(f"--recipe must be one of {', '.join(RECIPES)}, not {recipe!r}")
    if form.mode != "affine" or form.bits >= RECIPES[recipe].bits:
        raise UsageError(
            f"--recipe {recipe} gives {RECIPES[recipe].bits} bits to some matrices: it goes with --quantize 2 to 5, "
            f"not {quantize}"
        )
    return Quantizer(form, RECIPES[recipe])


LARGEST: Mapping[str, float] = {"mxfp4": 6, "mxfp8": 448, "nvfp4": 6}
"""The largest number of each format (E2M1, E4M3): what the largest of a group becomes, or nearly."""

BETWEEN = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Halfway between the magnitudes that E2M1 has: 0, 0.5, 1, 1.5, 2, 3, 4, 6."""


def quantize(matrix: mx.array, form: Quantization) -> dict[str, mx.array]:
    """`[..., out, in]` floats as `weight`, `scales` and (affine) `biases`, bit for bit as `mx.quantize` makes them.

    The float forms are made here: on a CPU MLX takes ten times as long for 4 bits, and where a group's largest number
    is below 2^-123 or so its scale wraps around to NaN.
    """
    if form.mode == "affine":
        arrays = mx.quantize(matrix, group_size=form.group_size, bits=form.bits, mode=form.mode)
        return dict(zip(("weight", "scales", "biases"), arrays, strict=True))
    groups = matrix.astype(mx.float32).reshape(*matrix.shape[:-1], -1, form.group_size)
    scales, steps = _scales(mx.max(mx.abs(groups), axis=-1, keepdims=True) / LARGEST[form.mode], form.mode)
    numbers = mx.where(steps > 0, groups / steps, 0).reshape(matrix.shape)
    codes = mx.to_fp8(numbers) if form.bits == 8 else _nibbles(numbers)
    return {"weight": codes.view(mx.uint32), "scales": scales[..., 0]}


def _scales(wanted: mx.array, mode: str) -> tuple[mx.array, mx.array]:
    """Bytes of the scales, and the numbers they stand for: an E4M3 float, or the power of two that is not smaller."""
    if mode == "nvfp4":
        flat = mx.pad(
            wanted.flatten(), (0, -wanted.size % 4)
        )  # MLX's CPU takes 8-bit floats four at a time, and no rest
        scales = mx.to_fp8(flat)
        steps = mx.from_fp8(scales, dtype=mx.float32)
        return scales[: wanted.size].reshape(wanted.shape), steps[: wanted.size].reshape(wanted.shape)
    exponents = mx.clip(mx.ceil(mx.log2(mx.where(wanted > 0, wanted, 1))), -126, 127) + 127
    return exponents.astype(mx.uint8), (exponents.astype(mx.uint32) << 23).view(mx.float32)


def _nibbles(numbers: mx.array) -> mx.array:
    """`[..., n]` as the nearest E2M1 (between two, the smaller), two in a byte, the first in its low half."""
    sizes = mx.abs(numbers)
    codes = mx.zeros(numbers.shape, mx.uint8)
    for threshold in BETWEEN:
        codes = codes + (sizes > threshold).astype(mx.uint8)
    codes = codes + ((numbers < 0) & (codes > 0)).astype(mx.uint8) * 8
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def dequantize(arrays: Mapping[str, mx.array], form: Quantization, dtype: mx.Dtype) -> mx.array:
    """The inverse, rounded once: affine scales are widened first, and what other modes hold fits in float32."""
    shape = arrays["weight"].shape[:-1]
    rest = -math.prod(shape) % 4 if form.mode == "nvfp4" else 0
    rows = {}
    for name, array in arrays.items():
        wide = array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
        rows[name] = mx.pad(wide.reshape(-1, array.shape[-1]), [(0, rest), (0, 0)])
    numbers = mx.dequantize(
        rows["weight"],
        rows["scales"],
        rows.get("biases"),
        group_size=form.group_size,
        bits=form.bits,
        mode=form.mode,
        dtype=mx.float32,
    )
    return numbers[: math.prod(shape)].reshape(*shape, -1).astype(dtype)
