"""One quantised matrix of a published checkpoint, and what it becomes: MLX's packed parts, or plain numbers.

Integers q under a scale s and a zero point z, `w = s (q - z)`, are MLX's affine form `scale * q + bias` with the bias
`-s z`. That is exact with parts in the scales' own dtype where z is a power of two (the middle of the range: symmetric
quantisation), and with float32 parts for any z where s has 16 bits: the product has at most 11 + 8 bits of mantissa,
and the sum is a multiple of s's last bit below 2^24 of them. Where it is not exact, where groups follow an order of
their own (`g_idx`), or are none that MLX has (32, 64, 128, and multiples), the matrix becomes plain numbers.
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
"""A stored tensor by its name."""

ITEM_SIZE = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1}
CHUNK = 1 << 22
"""Numbers unpacked at once where a matrix becomes plain."""

BITS = (2, 3, 4, 8)
"""Bits of integers that the formats here and MLX's affine form have in common."""


@dataclass(frozen=True)
class Form:
    """How MLX packs it."""

    bits: int
    group_size: int
    mode: str


@dataclass(frozen=True)
class Layer(ABC):
    """A matrix `shape = (out, in)` of the layer `name`, stored in the tensors `stored`.

    `form` is None where it becomes plain numbers; these have `dtype`. `scales` is the dtype of the packed form's.
    """

    name: str
    shape: tuple[int, int]
    stored: tuple[str, ...]
    form: Form | None
    scales: str
    dtype: str

    def parts(self) -> dict[str, tuple[str, tuple[int, int]]]:
        """Dtype and shape of what it becomes, by suffix."""
        rows, width = self.shape
        if self.form is None:
            return {".weight": (self.dtype, self.shape)}
        groups = (self.scales, (rows, width // self.form.group_size))
        parts = {".weight": ("U32", (rows, width * self.form.bits // 32)), ".scales": groups}
        return {**parts, ".biases": groups} if self.form.mode == "affine" else parts

    def part(self, suffix: str, read: Read) -> mx.array:
        """One of `parts`.

        Raises:
            CheckpointError: a number in it is not finite, or not what the format allows.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # refused when it is rounded
            if self.form is None:
                return mx.concatenate([rounded(rows, self.dtype, self.name) for rows in self.numbers(read)])
            return {".weight": self.words, ".scales": self.scale_part, ".biases": self.bias_part}[suffix](read)

    def plain(self) -> Self:
        """The same matrix, to become plain numbers."""
        return dataclasses.replace(self, form=None)

    def row_chunks(self) -> Iterator[slice]:
        """Rows that make up about `CHUNK` numbers."""
        step = max(1, CHUNK // self.shape[1])
        yield from (slice(start, start + step) for start in range(0, self.shape[0], step))

    @abstractmethod
    def numbers(self, read: Read) -> Iterator[Array]:
        """The matrix in float32, some rows `[n, in]` at a time."""

    @abstractmethod
    def words(self, read: Read) -> mx.array:
        """MLX's packed words `[out, in * bits / 32]`."""

    @abstractmethod
    def scale_part(self, read: Read) -> mx.array:
        """MLX's scales `[out, groups]`."""

    def bias_part(self, read: Read) -> mx.array:
        """MLX's biases `[out, groups]`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Affine(Layer):
    """`w = s (q - z)`, with a scale and a zero point for each group of inputs.

    Attributes:
        bits: of q.
        group_size: inputs of a group, as stored.
        codes: q as MLX's words `[out, in * bits / 32]`.
        affine: s `[out, groups]` float32, and z int16.
        order: the group of each input `[in]`, where it is not `i // group_size`.
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
        """`[out, stored groups]` as MLX's groups have it, in the scales' dtype."""
        assert self.form is not None
        starts = np.arange(0, self.shape[1], self.form.group_size) // self.group_size
        return rounded(values[:, starts], self.scales, self.name)

    def numbers(self, read: Read) -> Iterator[Array]:
        words = np.array(self.codes(read))
        scales, zeros = self.affine(read)
        width = self.shape[1]
        groups = np.arange(width) // self.group_size if self.order is None else self.order(read)
        for rows in self.row_chunks():
            integers = unpack(words[rows], self.bits, width) - np.take(zeros[rows], groups, axis=1)
            yield np.take(scales[rows], groups, axis=1) * integers


def affine_form(bits: int, group_size: int, width: int) -> Form | None:
    """MLX's form of integers in groups of `group_size`: the largest of its groups that fits into them evenly."""
    for size in (128, 64, 32):
        if math.gcd(group_size, width) % size == 0:
            return Form(bits, size, "affine")
    return None


def unpack(words: Array, bits: int, count: int) -> Array:
    """Integers of `bits` bits, lowest bits first, from rows of uint32: `[n, words] -> [n, count]` uint8."""
    stream = np.ascontiguousarray(words).view(np.uint8)
    result: Array
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
    """float32 numbers as `dtype`, rounded to nearest, ties to even; evaluated.

    Raises:
        CheckpointError: one is not finite, or becomes infinite.
    """
    number = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}[dtype]
    # Rounding keeps the order, and a NaN is both the least and the greatest.
    extremes = mx.array([float(values.min()), float(values.max())]).astype(number)
    if not bool(mx.all(mx.isfinite(extremes))):
        raise CheckpointError(f"{name}: a scale or weight is not finite, or too large for {dtype}")
    array = mx.array(values).astype(number)
    mx.eval(array)
    return array


def float32(array: mx.array) -> Array:
    """Any stored float as NumPy's float32."""
    return np.array(array.astype(mx.float32))
