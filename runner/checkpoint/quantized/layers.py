"""A quantized matrix of a published checkpoint, and what it becomes: MLX's quantized arrays, or plain numbers.

Integers q with a scale s and a zero point z, `w = s (q - z)`, equal MLX's affine form `scale * q + bias` with the bias
`-s z`. This is exact in the scales' own dtype where z is a power of two (the middle of the range: symmetric
quantization), and exact in float32 for any z where s has 16 bits: the product has at most 11 + 8 bits of mantissa, and
the sum is a multiple of s's last bit, less than 2^24 times that bit. The matrix becomes plain numbers where the form is
not exact, where the groups have an order of their own (`g_idx`), or where MLX lacks their size (it has 32, 64 and 128;
multiples of these are split).
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from runner.errors import CheckpointError

Array = npt.NDArray[Any]
Read = Callable[[str], mx.array]
"""A function that reads a stored tensor by name."""

ITEM_SIZE = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1}
CHUNK = 1 << 22
"""How many numbers are dequantized at once where a matrix becomes plain."""

BITS = (2, 3, 4, 8)
"""Bits per integer that both the formats here and MLX's affine form support."""


@dataclass(frozen=True)
class Form:
    """How MLX quantizes a matrix: the arguments of `mx.quantize`."""

    bits: int
    group_size: int
    mode: str


@dataclass(frozen=True)
class Layer(ABC):
    """A quantized matrix, and how it is read.

    Attributes:
        name: name of the layer, without `.weight`.
        shape: (out, in).
        stored: names of the tensors that it is stored in.
        form: the MLX form that it becomes; None where it becomes plain numbers.
        scales: dtype of MLX's scales and biases, where `form` is not None.
        dtype: dtype of the plain numbers, where `form` is None.
    """

    name: str
    shape: tuple[int, int]
    stored: tuple[str, ...]
    form: Form | None
    scales: str
    dtype: str

    def parts(self) -> dict[str, tuple[str, tuple[int, int]]]:
        """Dtype and shape of the arrays that the matrix becomes, by suffix."""
        rows, width = self.shape
        if self.form is None:
            return {".weight": (self.dtype, self.shape)}
        groups = (self.scales, (rows, width // self.form.group_size))
        parts = {".weight": ("U32", (rows, width * self.form.bits // 32)), ".scales": groups}
        return {**parts, ".biases": groups} if self.form.mode == "affine" else parts

    def part(self, suffix: str, read: Read) -> mx.array:
        """Compute one of `parts`.

        Raises:
            CheckpointError: a number is not finite, or is not allowed by the format.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # `rounded` refuses what is not finite
            if self.form is None:
                return mx.concatenate([rounded(rows, self.dtype, self.name) for rows in self.numbers(read)])
            return {".weight": self.words, ".scales": self.scale_part, ".biases": self.bias_part}[suffix](read)

    def plain(self) -> Self:
        """A copy of this layer that becomes plain numbers."""
        return dataclasses.replace(self, form=None)

    def row_chunks(self) -> Iterator[slice]:
        """Yield slices of rows that cover the matrix, each of about `CHUNK` numbers."""
        step = max(1, CHUNK // self.shape[1])
        yield from (slice(start, start + step) for start in range(0, self.shape[0], step))

    @abstractmethod
    def numbers(self, read: Read) -> Iterator[Array]:
        """Dequantize to float32, yielding some rows `[n, in]` at a time."""

    @abstractmethod
    def words(self, read: Read) -> mx.array:
        """MLX's packed integers, uint32 `[out, in * bits / 32]`."""

    @abstractmethod
    def scale_part(self, read: Read) -> mx.array:
        """MLX's scales `[out, groups]`."""

    def bias_part(self, read: Read) -> mx.array:
        """MLX's biases `[out, groups]`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Affine(Layer):
    """Integers `w = s (q - z)`, with a scale s and a zero point z for each group of inputs.

    Attributes:
        bits: bits per integer q.
        group_size: inputs per group, as stored.
        codes: reads q as MLX packs it, uint32 `[out, in * bits / 32]`.
        affine: reads s, float32 `[out, groups]`, and z, int16 `[out, groups]`.
        order: reads the group of each input `[in]`; None where it is `i // group_size`.
    """

    bits: int
    group_size: int
    codes: Callable[[Read], mx.array]
    affine: Callable[[Read], tuple[Array, Array]]
    order: Callable[[Read], Array] | None = None

    def words(self, read: Read) -> mx.array:
        return self.codes(read)

    def scale_part(self, read: Read) -> mx.array:
        return self._grouped(self.affine(read)[0])

    def bias_part(self, read: Read) -> mx.array:
        scales, zeros = self.affine(read)
        return self._grouped(-(scales * zeros.astype(np.float32)))

    def _grouped(self, values: Array) -> mx.array:
        """Repeat values `[out, stored groups]` for MLX's groups, in the dtype of the scales."""
        assert self.form is not None
        # MLX's groups may be smaller than the stored ones: each takes the values of the group that its first input has.
        starts = np.arange(0, self.shape[1], self.form.group_size) // self.group_size
        return rounded(values[:, starts], self.scales, self.name)

    def numbers(self, read: Read) -> Iterator[Array]:
        words = np.array(self.codes(read))
        scales, zeros = self.affine(read)
        width = self.shape[1]
        groups = np.arange(width) // self.group_size if self.order is None else self.order(read)
        for rows in self.row_chunks():
            # uint8 minus int16 is int16 in NumPy, which holds every difference.
            integers = unpack(words[rows], self.bits, width) - np.take(zeros[rows], groups, axis=1)
            yield np.take(scales[rows], groups, axis=1) * integers


def affine_form(bits: int, group_size: int, width: int) -> Form | None:
    """MLX's form for integers in groups of `group_size`, None where it has none.

    MLX's group size is the largest that divides both `group_size` and the number of inputs, `width`.
    """
    for size in (128, 64, 32):
        if math.gcd(group_size, width) % size == 0:
            return Form(bits, size, "affine")
    return None


def unpack(words: Array, bits: int, count: int) -> Array:
    """Unpack integers of `bits` bits, lowest bits first: uint32 `[n, words] -> [n, count]` uint8."""
    stream = np.ascontiguousarray(words).view(np.uint8)
    result: Array
    # 2, 4 and 8 bits divide a byte, so each byte's integers are shifted out at once; 3 bits are collected one by one.
    if 8 % bits == 0:
        places = 8 // bits
        result = np.empty((len(words), stream.shape[1] * places), np.uint8)
        for place in range(places):
            result[:, place::places] = stream >> np.uint8(bits * place) & np.uint8((1 << bits) - 1)
        return result[:, :count]
    flat = np.unpackbits(stream, axis=1, bitorder="little", count=count * bits).reshape(len(words), count, bits)
    result = (flat << np.arange(bits, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)
    return result


def rounded(values: Array, dtype: str, name: str) -> mx.array:
    """Round float32 numbers to `dtype`, to nearest with ties to even, and evaluate the array.

    Raises:
        CheckpointError: a number is not finite, or becomes infinite; the message begins with `name`.
    """
    number = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}[dtype]
    # Checking two numbers is enough: rounding keeps the order, and NumPy's minimum of numbers with a NaN is NaN.
    extremes = mx.array([float(values.min()), float(values.max())]).astype(number)
    if not bool(mx.all(mx.isfinite(extremes))):
        raise CheckpointError(f"{name}: a scale or weight is not finite, or too large for {dtype}")
    array = mx.array(values).astype(number)
    mx.eval(array)
    return array


def float32(array: mx.array) -> Array:
    """Convert an array of any float dtype to NumPy's float32."""
    return np.array(array.astype(mx.float32))
