"""GGUF's block formats, and the MLX formats that they are turned into without loss where that is possible.

A ggml block (see ggml-common.h and `dequantize_row_*` in ggml-quants.c) holds integers q with a scale and, in some
formats, an offset. Seven formats equal MLX's affine form in groups of 32, `w = scale * q + bias`, number for number:

    Q4_0  d (q - 8)     = d q - 8 d          Q4_1  d q + m        Q4_K  (d s) q - (dmin m), s and m of 6 bits
    Q5_0  d (q - 16)    = d q - 16 d         Q5_1  d q + m        Q5_K  as Q4_K, with q of 5 bits
    Q8_0  d (u - 128)   = d u - 128 d, where u = q + 128 is unsigned

A power of two times a float16 is a float16 again, so five formats keep float16 scales. The product d s of Q4_K and Q5_K
has up to 11 + 6 bits of mantissa: exact in float32 (24 bits) but not in float16 (11), so these two get float32 scales.
When MLX computes `scale * q + bias` from them in float32, the product is exact (17 + 5 bits) and the sum is rounded
once, as in ggml.

Q6_K, Q3_K and Q2_K have groups of 16, which MLX's affine form does not support: they are dequantized to float16.
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
"""NumPy's dtype for each dtype of a part; bfloat16, which NumPy lacks, is held as its bits."""


@dataclass(frozen=True)
class Format:
    """A block format: `size` bytes hold `count` numbers. `dtype` is the dtype of the plain numbers or of the scales."""

    name: str
    count: int
    size: int
    dtype: str

    @property
    def bits(self) -> int | None:
        """Bits per integer of MLX's quantized form; None where the tensor becomes plain numbers."""
        return None

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of the arrays that a tensor of `shape` becomes, by suffix ("" for a single plain array)."""
        return {"": (self.dtype, shape)}

    def part(self, suffix: str, rows: Bytes) -> Array:
        """Compute one of `parts` for some rows of the file: `[n, bytes] -> [n, width]`, in the part's dtype."""
        raise NotImplementedError


@dataclass(frozen=True)
class Plain(Format):
    """Plain numbers, one per block."""

    def part(self, suffix: str, rows: Bytes) -> Array:
        return np.ascontiguousarray(rows).view(NUMPY[self.dtype])


@dataclass(frozen=True)
class Packed(Format):
    """A format that equals MLX's affine form.

    Attributes:
        width: bits per integer.
        codes: MLX's packed integers, as bytes, of blocks `[n, size]`.
        affine: scales and biases of the groups of blocks `[n, size]`.
    """

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
    """A format that becomes float16 numbers; `values` dequantizes blocks `[n, size]` to float32 `[n, count]`."""

    values: Callable[[Bytes], Array]

    def part(self, suffix: str, rows: Bytes) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            numbers = self.values(rows.reshape(-1, self.size)).astype(NUMPY["F16"])
        return _finite(self, numbers).reshape(len(rows), -1)


def _finite(form: Format, numbers: Array) -> Array:
    """`numbers`, after checking that each is finite."""
    if not np.isfinite(numbers).all():
        raise CheckpointError(f"a {form.name} block has a scale that is not finite, or too large for float16")
    return numbers


# --- pieces of blocks -------------------------------------------------------------------------------------------------


def _half(blocks: Bytes, start: int) -> Array:
    """The float16 at byte `start` of each block: `[n, 1]`."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(NUMPY["F16"])


def _nibbles(packed: Bytes, run: int) -> Bytes:
    """Unpack 4-bit integers in order: of each `run` bytes, first all low halves, then all high halves."""
    runs = packed.reshape(len(packed), -1, 1, run)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(packed), -1)


def _packed_nibbles(packed: Bytes, run: int) -> Bytes:
    """The result of `pack(_nibbles(packed, run), 4)`, computed faster, two bytes at a time."""
    # Integers i and i + 1 share a byte in MLX's order; in ggml's they are the same halves of two neighbouring bytes.
    pairs = np.ascontiguousarray(packed).view(np.dtype("<u2")).reshape(len(packed), -1, 1, run // 2)
    low, high = (pairs & 0x0F) | (pairs >> 4 & 0xF0), (pairs >> 4 & 0x0F) | (pairs >> 8 & 0xF0)
    return np.concatenate([low, high], axis=2).astype(np.uint8).reshape(len(packed), -1)


def pack(codes: Bytes, bits: int) -> Bytes:
    """Pack integers as MLX does, `bits` bits each, lowest bits first: uint8 `[n, c] -> [n, c * bits / 8]`."""
    # Eight integers of `bits` bits fill exactly `bits` bytes: the lowest ones of a 64-bit word.
    eights = codes.reshape(-1, 8)
    word = np.zeros(len(eights), np.uint64)
    for index in range(8):
        word |= eights[:, index].astype(np.uint64) << np.uint64(bits * index)
    octets = word.astype(np.dtype("<u8"), copy=False).view(np.uint8).reshape(-1, 8)
    return octets[:, :bits].reshape(len(codes), -1)


def _fifth_bits(blocks: Bytes, start: int) -> Bytes:
    """The fifth bits (0 or 16) of Q5_0 or Q5_1 blocks, `[n, 32]`: bit i of the four bytes at `start` is integer i's."""
    return np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little") << 4


def _q5(blocks: Bytes, start: int) -> Bytes:
    """Packed integers of Q5_0 or Q5_1 blocks, whose fifth bits are at byte `start` and the nibbles after them."""
    return pack(_nibbles(blocks[:, start + 4 :], 16) | _fifth_bits(blocks, start), 5)


def _centred(zero: int) -> Callable[[Bytes], tuple[Array, Array]]:
    """Scales and biases of a format with numbers `d (q - zero)`, d at the start of the block.

    `zero` is a power of two, so `-zero * d` is exact in float16.
    """

    def affine(blocks: Bytes) -> tuple[Array, Array]:
        scales = _half(blocks, 0)
        with np.errstate(over="ignore", invalid="ignore"):
            return scales, scales * np.float16(-zero)

    return affine


def _offset(blocks: Bytes) -> tuple[Array, Array]:
    """Scales and biases of Q4_1 and Q5_1, with numbers `d q + m`: d and m start the block."""
    return _half(blocks, 0), _half(blocks, 2)


def _six_bits(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Unpack the eight scales and eight minima of Q4_K or Q5_K blocks, 6 bits each in 12 bytes."""
    # Scales and minima 0 to 3 are the low 6 bits of the first eight bytes. Numbers 4 to 7 have their low 4 bits in the
    # halves of the last four bytes, and their high 2 bits in those that the first eight bytes have left.
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return scales, minima


def _super(blocks: Bytes) -> tuple[Array, Array]:
    """Scales `d s` and biases `-(dmin m)` of Q4_K and Q5_K blocks, exact in float32."""
    scales, minima = _six_bits(blocks[:, 4:16])
    return _half(blocks, 0).astype(np.float32) * scales, -(_half(blocks, 2).astype(np.float32) * minima)


def _q5_k(blocks: Bytes) -> Bytes:
    """Packed integers of Q5_K blocks."""
    # Run c of 32 numbers takes its fifth bits from bit c of the 32 bytes before the nibbles.
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return pack(_nibbles(blocks[:, 48:], 32) | (high << 4).reshape(len(blocks), -1), 5)


def _pairs_of_bits(packed: Bytes) -> Bytes:
    """Unpack 2-bit integers in the K formats' order: of each 32 bytes the lowest two bits, then the next two, etc."""
    runs = packed.reshape(len(packed), -1, 1, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    return (runs >> shifts & 3).reshape(len(packed), -1)


def _by_sixteen(scales: Array, codes: Array) -> Array:
    """Multiply `codes [n, 256]` by `scales [n, 16]`, one scale for each 16 codes."""
    numbers: Array = scales[:, :, None] * codes.reshape(len(codes), 16, 16)
    return numbers.reshape(len(codes), 256)


def _q2_k(blocks: Bytes) -> Array:
    """Dequantize Q2_K blocks: 16 bytes of 4-bit scales and minima, 64 bytes of 2-bit integers, d, dmin."""
    scales = _half(blocks, 80).astype(np.float32) * (blocks[:, :16] & 15)
    minima = _half(blocks, 82).astype(np.float32) * (blocks[:, :16] >> 4)
    numbers = _by_sixteen(scales, _pairs_of_bits(blocks[:, 16:80]))
    numbers -= np.repeat(minima, 16, axis=1)
    return numbers


def _q3_k(blocks: Bytes) -> Array:
    """Dequantize Q3_K blocks: 32 bytes of third bits, 64 bytes of 2-bit integers, 12 bytes of 6-bit scales, d."""
    # 16 scales: the low 4 bits in the halves of eight bytes, the high 2 bits in the next four bytes.
    packed = blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = (packed[:, None, 8:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3).reshape(len(blocks), 16)
    scales = _half(blocks, 108).astype(np.float32) * ((low | high << 4).astype(np.int8) - np.int8(32))
    # Run c of 32 numbers takes its third bits from bit c of the first 32 bytes.
    mask = (blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(len(blocks), 256)
    return _by_sixteen(scales, (_pairs_of_bits(blocks[:, 32:96]) | mask << 2).astype(np.int8) - np.int8(4))


def _q6_k(blocks: Bytes) -> Array:
    """Dequantize Q6_K blocks: 128 bytes of nibbles, 64 bytes of high 2 bits, 16 scales (int8), d."""
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
"""The supported formats, by ggml's number of the tensor type."""


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Size in bytes of an array in memory."""
    return math.prod(shape) * NUMPY[dtype].itemsize
