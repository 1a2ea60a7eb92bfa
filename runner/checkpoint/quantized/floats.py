"""Matrices of small floats with scales: E4M3 and E5M2 (8 bits), E2M1 (4 bits), and the scales that MLX has for them.

E4M3 (sign, 4 bits of exponent, 3 of mantissa; no infinity, 0x7f and 0xff are NaN), E5M2 and E8M0 (a power of two) are
defined by the OCP specifications "8-bit Floating Point" and "Microscaling Formats". MLX has E4M3 with an E8M0 scale
per 32 inputs (mxfp8), and E2M1 with an E8M0 scale per 32 (mxfp4) or an E4M3 scale per 16 inputs (nvfp4). Scales that
MLX's form can hold convert exactly: powers of two, or for nvfp4 E4M3 numbers. With any other scales, the matrix becomes
plain bfloat16: number times scale, computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from runner.checkpoint.quantized.layers import Array, Layer, Read, float32
from runner.errors import CheckpointError


def _e4m3() -> Array:
    """The value of each E4M3 byte, from the definition: bias 7, subnormals, NaN where all lower bits are set."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[code & 127 == 127] = np.nan
    return np.where(code < 128, size, -size).astype(np.float32)


E4M3 = _e4m3()
"""The E4M3 number of each byte, float32."""
E5M2 = (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)
"""The E5M2 number of each byte, float32: the upper half of a float16."""
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The E2M1 number of each 4-bit code."""
MAX_EXPONENT = 127 + 118
"""The largest E8M0 byte (exponent + 127) whose scale times the largest E4M3 number, 448, is a finite float32."""


def read_scales(read: Read, name: str, dtype: str) -> Array:
    """Read scales of any dtype as float32; bytes are E8M0 exponents where `dtype` is U8 or F8_E8M0.

    Raises:
        CheckpointError: a scale is not finite, or is larger than 2^118 (E8M0).
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
    """Convert scales to E8M0 bytes; None where a scale is not a power of two, or is out of range."""
    # `frexp` gives mantissas in [0.5, 1), so a power of two 2^e comes as 0.5 and e + 1.
    mantissa, exponent = np.frexp(scales)
    if not ((mantissa == 0.5) & (exponent >= -126) & (exponent - 1 + 127 <= MAX_EXPONENT)).all():
        return None
    return (exponent - 1 + 127).astype(np.uint8)


@dataclass(frozen=True)
class Float8(Layer):
    """E4M3 or E5M2 numbers with a scale for each block. E4M3 becomes mxfp8 where all scales are powers of two.

    Attributes:
        codes: name of the tensor of bytes `[out, in]`.
        block: (rows, columns) that share a scale.
        factors: reads the scales, float32 `[out / rows, in / columns]`, both sizes rounded up.
        table: the number of each byte.
    """

    codes: str
    block: tuple[int, int]
    factors: Callable[[Read], Array]
    table: Array

    def numbers(self, read: Read) -> Iterator[Array]:
        codes, factors = np.array(read(self.codes)), self.factors(read)
        columns = np.arange(self.shape[1]) // self.block[1]
        for rows in self.row_chunks():
            # Only the scales are repeated for each number, and only for the rows of this chunk.
            inner = np.arange(self.shape[0])[rows] // self.block[0]
            yield np.take(self.table, codes[rows]) * np.take(factors[inner], columns, axis=1)

    def words(self, read: Read) -> mx.array:
        codes = read(self.codes)
        if bool(mx.any((codes & 127) == 127)):
            raise CheckpointError(f"{self.codes}: a weight is NaN")
        return codes.view(mx.uint32)

    def scale_part(self, read: Read) -> mx.array:
        exponents = exponents_of(self.factors(read))
        assert exponents is not None and self.form is not None, "checked when the form was chosen"
        # Each row's group of 32 inputs takes the scale of the block that it lies in.
        rows = np.arange(self.shape[0]) // self.block[0]
        columns = np.arange(0, self.shape[1], self.form.group_size) // self.block[1]
        return mx.array(exponents[rows][:, columns])


@dataclass(frozen=True)
class Float4(Layer):
    """E2M1 numbers with a scale for each group of inputs. Becomes nvfp4 or mxfp4, or plain numbers.

    Attributes:
        codes: name of the tensor `[out, in / 2]`: two numbers per byte, the first in its low half.
        group_size: inputs per scale.
        factors: reads the scales, float32 `[out, in / group_size]`.
        stored_scales: reads the scales as MLX's bytes; used only where `form` is not None.
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
        self.factors(read)  # only to refuse scales that are not finite
        return mx.array(self.stored_scales(read))
