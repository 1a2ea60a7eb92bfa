"""Quantizes matrices for `convert`: the forms of `--quantize`, recipes that mix two of them, and the arithmetic."""

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
"""Forms by their name in `--quantize`, each with MLX's default group size."""

AFFINE_GROUPS = (32, 64, 128)
"""Group sizes that `mx.quantize` has in affine mode; every other mode has one."""


@dataclass(frozen=True)
class Recipe:
    """A choice of matrices that get more bits, because their errors weigh most.

    Fields have the names in the model classes, whatever a file calls them.

    Attributes:
        bits: bits of the chosen matrices; their group size is that of all others.
        heads: fields that are always chosen; for a head tied to the embeddings, these are chosen.
        fields: fields that are chosen in some layers (see `in_layer`).
        parts: single matrices of fused fields, chosen in those layers too, by the last word of their name in the file.
    """

    bits: int
    heads: tuple[str, ...]
    fields: tuple[str, ...]
    parts: tuple[str, ...]

    @staticmethod
    def in_layer(index: int, layers: int) -> bool:
        """Whether a layer is in the first or last eighth of `layers`, or every third one between."""
        eighth = layers // 8
        return index < eighth or index >= 7 * layers // 8 or (index - eighth) % 3 == 2

    def favours(self, path: str, stem: str, layers: int) -> bool:
        """Whether the matrix `stem` of the file, in the field `path` of a model of `layers` layers, gets more bits."""
        words = [word for word in path.split(".") if word != "parts" and not word.isdigit()]
        # The last word of a path is the field; its first number is the layer.
        if words[-1] in self.heads:
            return True
        if words[-1] not in self.fields and stem.rpartition(".")[2] not in self.parts:
            return False
        numbers = [int(word) for word in path.split(".") if word.isdigit()]
        return bool(numbers) and self.in_layer(numbers[0], layers)


RECIPES: Mapping[str, Recipe] = {
    "mixed": Recipe(bits=6, heads=("lm_head",), fields=("down_proj", "kv_a_proj", "kv_b_proj"), parts=("v_proj",))
}
"""`mixed` is llama.cpp's Q4_K_M (`use_more_bits` in src/llama-quant.cpp) as mlx-lm has it in `mixed_4_6`
(mlx_lm/convert.py): more bits for values, down projections and the head. In MLA, the two compressed projections stand
for the values."""


@dataclass(frozen=True)
class Quantizer:
    """How a model's matrices are quantized: all in `form`, those that `recipe` chooses with its bits."""

    form: Quantization
    recipe: Recipe | None = None

    def of(self, path: str, stem: str, layers: int) -> Quantization:
        """The form of one matrix; the arguments are those of `Recipe.favours`."""
        if self.recipe is not None and self.recipe.favours(path, stem, layers):
            return dataclasses.replace(self.form, bits=self.recipe.bits)
        return self.form


def quantizer(quantize: str, group_size: int | None = None, recipe: str | None = None) -> Quantizer:
    """Make a quantizer from the values of `--quantize`, `--group-size` and `--recipe`.

    Raises:
        UsageError: a value is unknown, or the values do not go together.
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
"""The largest number in each mode (E2M1, E4M3): the largest value of a group becomes this, or nearly."""

BETWEEN = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Midpoints between the magnitudes of E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6."""


def quantize(matrix: mx.array, form: Quantization) -> dict[str, mx.array]:
    """Quantize floats `[..., out, in]` to `weight`, `scales` and (affine) `biases`, bit for bit as `mx.quantize` does.

    The float modes are computed here: on a CPU MLX takes ten times as long for 4 bits, and where a group's largest
    value is below 2^-123 or so, its scale wraps around to NaN.
    """
    if form.mode == "affine":
        arrays = mx.quantize(matrix, group_size=form.group_size, bits=form.bits, mode=form.mode)
        return dict(zip(("weight", "scales", "biases"), arrays, strict=True))
    # The largest value of a group becomes the mode's largest number; in nvfp4 a group of zeros has the step 0.
    groups = matrix.astype(mx.float32).reshape(*matrix.shape[:-1], -1, form.group_size)
    scales, steps = _scales(mx.max(mx.abs(groups), axis=-1, keepdims=True) / LARGEST[form.mode], form.mode)
    numbers = mx.where(steps > 0, groups / steps, 0).reshape(matrix.shape)
    codes = mx.to_fp8(numbers) if form.bits == 8 else _nibbles(numbers)
    return {"weight": codes.view(mx.uint32), "scales": scales[..., 0]}


def _scales(wanted: mx.array, mode: str) -> tuple[mx.array, mx.array]:
    """The scales as bytes and as numbers: an E4M3 float in nvfp4, else the next power of two that is not smaller."""
    if mode == "nvfp4":
        # MLX's CPU converts 8-bit floats four at a time and refuses a remainder.
        flat = mx.pad(wanted.flatten(), (0, -wanted.size % 4))
        scales = mx.to_fp8(flat)
        steps = mx.from_fp8(scales, dtype=mx.float32)
        return scales[: wanted.size].reshape(wanted.shape), steps[: wanted.size].reshape(wanted.shape)
    # An E8M0 byte is a float's exponent with its bias of 127; a group of zeros gets the scale 1.
    exponents = mx.clip(mx.ceil(mx.log2(mx.where(wanted > 0, wanted, 1))), -126, 127) + 127
    return exponents.astype(mx.uint8), (exponents.astype(mx.uint32) << 23).view(mx.float32)


def _nibbles(numbers: mx.array) -> mx.array:
    """Round `[..., n]` to the nearest E2M1 (ties to the smaller), two codes in a byte, the first in its low half."""
    # The code of a magnitude is the number of midpoints below it.
    sizes = mx.abs(numbers)
    codes = mx.zeros(numbers.shape, mx.uint8)
    for threshold in BETWEEN:
        codes = codes + (sizes > threshold).astype(mx.uint8)
    # Bit 3 is the sign; zero has none.
    codes = codes + ((numbers < 0) & (codes > 0)).astype(mx.uint8) * 8
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def dequantize(arrays: Mapping[str, mx.array], form: Quantization, dtype: mx.Dtype) -> mx.array:
    """Undo `quantize`, rounding once, to `dtype`: affine scales are widened first, other modes are exact in float32."""
    # MLX's CPU decodes nvfp4 scales four at a time and refuses a remainder: rows are padded to a multiple of four.
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
