"""Matrices of small floats under scales: E4M3 in 8 bits, E2M1 in 4, and the scales of 8 bits that MLX has itself.

E4M3 (sign, 4 bits of exponent, 3 of mantissa; no infinity, 0x7f and 0xff are NaN) and E8M0 (a power of two) are
those of the OCP specifications "8-bit Floating Point" and "Microscaling Formats". MLX multiplies E4M3 with an E8M0
scale for 32 inputs (mxfp8), E2M1 with an E8M0 scale for 32 (mxfp4) or an E4M3 scale for 16 (nvfp4): a scale that is a
power of two goes over exactly, any other makes the matrix plain bfloat16, the product of float32 numbers rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from runner.checkpoint.quantized.layers import Array, Layer, Read, float32
from runner.errors import CheckpointError


def _e4m3() -> Array:
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[code & 127 == 127] = np.nan
    return np.where(code < 128, size, -size).astype(np.float32)


E4M3 = _e4m3()
"""The number of each byte."""
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
MAX_EXPONENT = 127 + 118
"""The largest E8M0 scale under which the largest E4M3, 448, is a finite float32."""


def read_scales(read: Read, name: str, dtype: str) -> Array:
    """Scales of any dtype in float32; bytes are exponents (E8M0) where `dtype` is U8 or F8_E8M0.

    Raises:
        CheckpointError: one is not finite.
    """
    stored = read(name)
    if dtype in ("U8", "F8_E8M0"):
        exponents = np.array(stored)
        if (exponents > MAX_EXPONENT).any():
            raise CheckpointError(f"{name}: a scale is not a number, or larger than 2^118")
        return np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
    scales = E4M3[np.array(stored)] if dtype == "F8_E4M3" else float32(stored)
    if not np.isfinite(scales).all():
        raise CheckpointError(f"{name}: a scale is not finite")
    return scales


def exponents_of(scales: Array) -> Array | None:
    """Scales as E8M0 bytes; None where one is no power of two within its range."""
    mantissa, exponent = np.frexp(scales)
    if not ((mantissa == 0.5) & (exponent >= -126) & (exponent - 1 + 127 <= MAX_EXPONENT)).all():
        return None
    return (exponent - 1 + 127).astype(np.uint8)


@dataclass(frozen=True)
class Float8(Layer):
    """E4M3 `[out, in]` in the tensor `codes`, and a scale for each block of `block = (rows, columns)`.

    `factors` gives the scales as float32, `[out / rows, in / columns]`, rounded up. Packed (mxfp8) where all of them
    are powers of two.
    """

    codes: str
    block: tuple[int, int]
    factors: Callable[[Read], Array]

    def numbers(self, read: Read) -> Iterator[Array]:
        codes, factors = np.array(read(self.codes)), self.factors(read)
        columns = np.arange(self.shape[1]) // self.block[1]
        for rows in self.row_chunks():
            inner = np.arange(self.shape[0])[rows] // self.block[0]
            yield np.take(E4M3, codes[rows]) * np.take(factors[inner], columns, axis=1)

    def words(self, read: Read) -> mx.array:
        codes = read(self.codes)
        if bool(mx.any((codes & 127) == 127)):
            raise CheckpointError(f"{self.codes}: a weight is not a number")
        return codes.view(mx.uint32)

    def scale_part(self, read: Read) -> mx.array:
        exponents = exponents_of(self.factors(read))
        assert exponents is not None and self.form is not None, "checked when the form was chosen"
        rows = np.arange(self.shape[0]) // self.block[0]
        columns = np.arange(0, self.shape[1], self.form.group_size) // self.block[1]
        return mx.array(exponents[rows][:, columns])


@dataclass(frozen=True)
class Float4(Layer):
    """E2M1 `[out, in / 2]` in the tensor `codes`, two in a byte, the first in its low half.

    `factors` gives float32 scales `[out, in / group_size]`; `stored_scales` MLX's bytes, where it is packed.
    """

    codes: str
    group_size: int
    factors: Callable[[Read], Array]
    stored_scales: Callable[[Read], Array]

    def numbers(self, read: Read) -> Iterator[Array]:
        codes, factors = np.array(read(self.codes)), self.factors(read)
        for rows in self.row_chunks():
            pairs = np.stack([codes[rows] & 15, codes[rows] >> 4], axis=-1)
            yield np.take(E2M1, pairs.reshape(len(pairs), -1)) * np.repeat(factors[rows], self.group_size, axis=1)

    def words(self, read: Read) -> mx.array:
        return read(self.codes).view(mx.uint32)

    def scale_part(self, read: Read) -> mx.array:
        self.factors(read)  # refuses scales that are no numbers
        return mx.array(self.stored_scales(read))
