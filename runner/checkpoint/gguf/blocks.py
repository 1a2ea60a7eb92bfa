"""GGUF's block formats, and what MLX multiplies natively that equals them.

A block of ggml (see ggml-common.h and `dequantize_row_*` in ggml-quants.c) holds integers q under a scale, and perhaps
an offset, of a few formats. Seven are MLX's affine form in groups of 32, `w = scale * q + bias`, number for number:

    Q4_0  d (q - 8)     = d q - 8 d          Q4_1  d q + m        Q4_K  (d s) q - (dmin m), s and m of 6 bits
    Q5_0  d (q - 16)    = d q - 16 d         Q5_1  d q + m        Q5_K  the same, q of 5 bits
    Q8_0  d (u - 128)   = d u - 128 d, where u = q + 128 is unsigned

A power of two times a float16 is a float16 again, so five keep float16 scales. The product d s of Q4_K and Q5_K has up
to 11 + 6 bits of mantissa: exact in float32 (24 bits), not in float16 (11), so these two have float32 scales. What MLX
computes from them in float32, `scale * q + bias`, has an exact product (17 + 5 bits) and one rounding, as ggml's own.

Q6_K, Q3_K and Q2_K have groups of 16, which MLX's affine form has not: they become float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runner.errors import CheckpointError

Array = npt.NDArray[Any]
Bytes = Array  # of uint8; to NumPy's stubs a shift by an int is no longer one
GROUP = 32

NUMPY: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
}
"""How a part lies in NumPy; bfloat16, which NumPy lacks, as its bits."""


@dataclass(frozen=True)
class Format:
    """A block format: `size` bytes hold `count` numbers. `dtype` is that of the plain numbers, or of the scales."""

    name: str
    count: int
    size: int
    dtype: str

    @property
    def bits(self) -> int | None:
        """Bits of MLX's packed form; None where the tensor is not packed."""
        return None

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What a tensor of `shape` becomes: dtype and shape by suffix, "" for the whole one."""
        return {"": (self.dtype, shape)}

    def part(self, suffix: str, rows: Bytes) -> Array:
        """One of `parts`, of some rows `[n, bytes]`: `[n, width]` in the part's dtype."""
        raise NotImplementedError


@dataclass(frozen=True)
class Plain(Format):
    """Numbers as they are."""

    def part(self, suffix: str, rows: Bytes) -> Array:
        return np.ascontiguousarray(rows).view(NUMPY[self.dtype])


@dataclass(frozen=True)
class Packed(Format):
    """`codes` gives the packed integers of blocks `[n, size]`, `affine` the scales and biases of their groups."""

    width: int
    codes: Callable[[Bytes], Bytes]
    affine: Callable[[Bytes], tuple[Array, Array]]

    @property
    def bits(self) -> int:
        return self.width

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        groups = (self.dtype, (*shape[:-1], shape[-1] // GROUP))
        return {
            ".weight": ("U32", (*shape[:-1], shape[-1] * self.width // 32)), ".scales": groups, ".biases": groups
        }  # fmt: skip

    def part(self, suffix: str, rows: Bytes) -> Array:
        blocks = rows.reshape(-1, self.size)
        if suffix == ".weight":
            return np.ascontiguousarray(self.codes(blocks)).reshape(len(rows), -1).view(NUMPY["U32"])
        found = self.affine(blocks)[suffix == ".biases"]
        return _finite(self, found).astype(NUMPY[self.dtype], copy=False).reshape(len(rows), -1)


@dataclass(frozen=True)
class Unpacked(Format):
    """`values` gives the numbers of blocks `[n, size]` in float32; they are kept as float16."""

    values: Callable[[Bytes], Array]

    def part(self, suffix: str, rows: Bytes) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            numbers = self.values(rows.reshape(-1, self.size)).astype(NUMPY["F16"])
        return _finite(self, numbers).reshape(len(rows), -1)


def _finite(form: Format, numbers: Array) -> Array:
    if not np.isfinite(numbers).all():
        raise CheckpointError(f"a {form.name} block has a scale that is not finite, or too large for float16")
    return numbers


# --- pieces of blocks -------------------------------------------------------------------------------------------------


def _half(blocks: Bytes, start: int) -> Array:
    """The float16 at byte `start` of each block: `[n, 1]`."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(NUMPY["F16"])


def _nibbles(packed: Bytes, run: int) -> Bytes:
    """The integers of 4 bits in order: each `run` bytes hold `run` of them in their low halves, then as many high."""
    runs = packed.reshape(len(packed), -1, 1, run)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(packed), -1)


def _packed_nibbles(packed: Bytes, run: int) -> Bytes:
    """`pack(_nibbles(packed, run), 4)`, two bytes at a time: neighbours' halves meet in one byte."""
    pairs = np.ascontiguousarray(packed).view(np.dtype("<u2")).reshape(len(packed), -1, 1, run // 2)
    low, high = (pairs & 0x0F) | (pairs >> 4 & 0xF0), (pairs >> 4 & 0x0F) | (pairs >> 8 & 0xF0)
    return np.concatenate([low, high], axis=2).astype(np.uint8).reshape(len(packed), -1)


def pack(codes: Bytes, bits: int) -> Bytes:
    """MLX's packing: integers of `bits` bits one after another, lowest bits first. `[n, c] -> [n, c * bits / 8]`."""
    eights = codes.reshape(-1, 8)
    word = np.zeros(len(eights), np.uint64)
    for index in range(8):
        word |= eights[:, index].astype(np.uint64) << np.uint64(bits * index)
    octets = word.astype(np.dtype("<u8"), copy=False).view(np.uint8).reshape(-1, 8)
    return octets[:, :bits].reshape(len(codes), -1)


def _fifth_bits(blocks: Bytes, start: int) -> Bytes:
    """Q5_0 and Q5_1: bit i of four bytes is the highest bit of number i. Worth 16: `[n, 32]`."""
    return np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little") << 4


def _q5(blocks: Bytes, start: int) -> Bytes:
    return pack(_nibbles(blocks[:, start + 4 :], 16) | _fifth_bits(blocks, start), 5)


def _centred(zero: int) -> Callable[[Bytes], tuple[Array, Array]]:
    """Scale d at the block's start, numbers `d (q - zero)`; `zero` is a power of two, so its product is exact."""

    def affine(blocks: Bytes) -> tuple[Array, Array]:
        scales = _half(blocks, 0)
        with np.errstate(over="ignore", invalid="ignore"):
            return scales, scales * np.float16(-zero)

    return affine


def _offset(blocks: Bytes) -> tuple[Array, Array]:
    return _half(blocks, 0), _half(blocks, 2)


def _six_bits(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The eight scales and eight minima of a Q4_K or Q5_K block, 6 bits each in 12 bytes."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return scales, minima


def _super(blocks: Bytes) -> tuple[Array, Array]:
    """Q4_K and Q5_K: scales `d s` and biases `-(dmin m)`, exact in float32."""
    scales, minima = _six_bits(blocks[:, 4:16])
    return _half(blocks, 0).astype(np.float32) * scales, -(_half(blocks, 2).astype(np.float32) * minima)


def _q5_k(blocks: Bytes) -> Bytes:
    # Run c of 32 numbers takes its fifth bits from bit c of the 32 bytes before the nibbles.
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return pack(_nibbles(blocks[:, 48:], 32) | (high << 4).reshape(len(blocks), -1), 5)


def _pairs_of_bits(packed: Bytes) -> Bytes:
    """Q2_K's and Q3_K's order: of each 32 bytes the lowest two bits, then the next two, and so on."""
    runs = packed.reshape(len(packed), -1, 1, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    return (runs >> shifts & 3).reshape(len(packed), -1)


def _by_sixteen(scales: Array, codes: Array) -> Array:
    """`scales [n, 16]` times `codes [n, 256]`, each scale for 16 of them."""
    numbers: Array = scales[:, :, None] * codes.reshape(len(codes), 16, 16)
    return numbers.reshape(len(codes), 256)


def _q2_k(blocks: Bytes) -> Array:
    scales = _half(blocks, 80).astype(np.float32) * (blocks[:, :16] & 15)
    minima = _half(blocks, 82).astype(np.float32) * (blocks[:, :16] >> 4)
    numbers = _by_sixteen(scales, _pairs_of_bits(blocks[:, 16:80]))
    numbers -= np.repeat(minima, 16, axis=1)
    return numbers


def _q3_k(blocks: Bytes) -> Array:
    packed = blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = (packed[:, None, 8:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3).reshape(len(blocks), 16)
    scales = _half(blocks, 108).astype(np.float32) * ((low | high << 4).astype(np.int8) - np.int8(32))
    mask = (blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(len(blocks), 256)
    return _by_sixteen(scales, (_pairs_of_bits(blocks[:, 32:96]) | mask << 2).astype(np.int8) - np.int8(4))


def _q6_k(blocks: Bytes) -> Array:
    # Each half of a block: 64 bytes of nibbles (all low ones come first), 32 bytes of two bits for four runs of 32.
    low = _nibbles(blocks[:, :128], 64).reshape(len(blocks), 256)
    codes = (low | _pairs_of_bits(blocks[:, 128:192]) << 4).astype(np.int8) - np.int8(32)
    return _by_sixteen(_half(blocks, 208).astype(np.float32) * blocks[:, 192:208].view(np.int8), codes)


FORMATS: Mapping[int, Format] = {
    0: Plain("F32", 1, 4, "F32"),
    1: Plain("F16", 1, 2, "F16"),
    2: Packed("Q4_0", 32, 18, "F16", 4, lambda blocks: _packed_nibbles(blocks[:, 2:], 16), _centred(8)),
    3: Packed("Q4_1", 32, 20, "F16", 4, lambda blocks: _packed_nibbles(blocks[:, 4:], 16), _offset),
    6: Packed("Q5_0", 32, 22, "F16", 5, lambda blocks: _q5(blocks, 2), _centred(16)),
    7: Packed("Q5_1", 32, 24, "F16", 5, lambda blocks: _q5(blocks, 4), _offset),
    8: Packed("Q8_0", 32, 34, "F16", 8, lambda blocks: blocks[:, 2:] ^ 0x80, _centred(128)),
    10: Unpacked("Q2_K", 256, 84, "F16", _q2_k),
    11: Unpacked("Q3_K", 256, 110, "F16", _q3_k),
    12: Packed("Q4_K", 256, 144, "F32", 4, lambda blocks: _packed_nibbles(blocks[:, 16:], 32), _super),
    13: Packed("Q5_K", 256, 176, "F32", 5, _q5_k, _super),
    14: Unpacked("Q6_K", 256, 210, "F16", _q6_k),
    30: Plain("BF16", 1, 2, "BF16"),
}
"""By ggml's number of the type."""


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a part in memory."""
    return math.prod(shape) * NUMPY[dtype].itemsize
