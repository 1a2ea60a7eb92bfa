"""What a block format is, and the three ways its tensors come into memory: plain, packed for MLX, dequantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runner.errors import CheckpointError
from runner.nn.linear import Quantization

Array = npt.NDArray[Any]
Bytes = Array  # of uint8; to NumPy's stubs a shift by an int is no longer one
_LARGEST = {"mxfp4": 252, "nvfp4": 0x7E}  # scale bytes: 6 * 2^125 is finite in float32; 448, the largest E4M3
_SLICE = 1 << 17  # numbers computed at once: with their temporary arrays they fit into a core's cache

NUMPY: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U8": np.dtype("<u1"),
}
"""NumPy's dtype for each dtype of a part; bfloat16, which NumPy lacks, is held as its bits."""


@dataclass(frozen=True)
class Format:
    """A block format: `size` bytes hold `count` numbers. `dtype` is the dtype of the plain numbers or of the scales."""

    name: str
    count: int
    size: int
    dtype: str

    @property
    def quantized(self) -> Quantization | None:
        """MLX's quantization of the tensor in memory; None where the tensor becomes plain numbers."""
        return None

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of the arrays that a tensor of `shape` becomes, by suffix ("" for a single plain array)."""
        return {"": (self.dtype, shape)}

    def part(self, suffix: str, rows: Bytes) -> Array:
        """Compute one of `parts` for some rows of the file: `[n, bytes] -> [n, width]`, in the part's dtype."""
        raise NotImplementedError

    def sliced(self, function: Callable[[Bytes], Array], rows: Bytes) -> Array:
        """`function` of all blocks of `rows`, a slice of blocks at a time, as `[n, width]`.

        A chunk of the file in a format of 2 bits makes 16 million numbers: temporary arrays of that many would take
        more memory than the result, and more time than arrays that fit into a cache.
        """
        blocks, step = rows.reshape(-1, self.size), max(1, _SLICE // self.count)
        done = [function(blocks[start : start + step]) for start in range(0, len(blocks), step)]
        return (done[0] if len(done) == 1 else np.concatenate(done)).reshape(len(rows), -1)


@dataclass(frozen=True)
class Plain(Format):
    """Plain numbers, one per block."""

    def part(self, suffix: str, rows: Bytes) -> Array:
        return np.ascontiguousarray(rows).view(NUMPY[self.dtype])


@dataclass(frozen=True)
class Packed(Format):
    """A format that equals one of MLX's, number for number.

    Attributes:
        form: MLX's quantization.
        codes: MLX's packed integers, as bytes, of blocks `[n, size]`.
        scales: scales of the groups of blocks `[n, size]` and, in the affine mode, their biases.
    """

    form: Quantization
    codes: Callable[[Bytes], Bytes]
    scales: Callable[[Bytes], tuple[Array, ...]]

    @property
    def quantized(self) -> Quantization:
        return self.form

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        weight = ("U32", (*shape[:-1], shape[-1] * self.form.bits // 32))
        groups = (self.dtype, (*shape[:-1], shape[-1] // self.form.group_size))
        affine = {".biases": groups} if self.form.mode == "affine" else {}
        return {".weight": weight, ".scales": groups, **affine}

    def part(self, suffix: str, rows: Bytes) -> Array:
        if suffix == ".weight":
            return np.ascontiguousarray(self.sliced(self.codes, rows)).view(NUMPY["U32"])

        def numbers(blocks: Bytes) -> Array:
            with np.errstate(over="ignore", invalid="ignore"):  # what becomes of such scales is refused
                found = self.scales(blocks)[suffix == ".biases"]
            if self.dtype == "U8" and (found > _LARGEST[self.form.mode]).any():
                raise _too_large(self)
            return finite(self, found).astype(NUMPY[self.dtype], copy=False)

        return self.sliced(numbers, rows)


@dataclass(frozen=True)
class Unpacked(Format):
    """A format that becomes float16 numbers; `values` dequantizes blocks `[n, size]` to float32 `[n, count]`."""

    values: Callable[[Bytes], Array]

    def part(self, suffix: str, rows: Bytes) -> Array:
        def numbers(blocks: Bytes) -> Array:
            with np.errstate(over="ignore", invalid="ignore"):
                return finite(self, self.values(blocks).astype(NUMPY["F16"]))

        return self.sliced(numbers, rows)


def finite(form: Format, numbers: Array) -> Array:
    """`numbers`, after checking that each is finite."""
    if not np.isfinite(numbers).all():
        raise _too_large(form)
    return numbers


def _too_large(form: Format) -> CheckpointError:
    numbers = "float32" if form.dtype == "U8" else "float16"
    return CheckpointError(f"a {form.name} block has a scale that is not finite, or too large for {numbers}")


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Size in bytes of an array in memory."""
    return math.prod(shape) * NUMPY[dtype].itemsize
