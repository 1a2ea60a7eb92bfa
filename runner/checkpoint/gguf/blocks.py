"""GGUF's block formats, and the MLX formats that they are turned into without loss where that is possible.

A ggml block (see ggml-common.h and `dequantize_row_*` in ggml-quants.c) holds integers q with a scale and, in some
formats, an offset. These formats equal MLX's affine form in groups of 32 or 128, `w = scale * q + bias`, number for
number; so do most of those in `codebook_blocks`:

    Q4_0  d (q - 8)     = d q - 8 d          Q4_1  d q + m        Q4_K  (d s) q - (dmin m), s and m of 6 bits
    Q5_0  d (q - 16)    = d q - 16 d         Q5_1  d q + m        Q5_K  as Q4_K, with q of 5 bits
    Q8_0  d (u - 128)   = d u - 128 d, where u = q + 128 is unsigned
    TQ1_0, TQ2_0  d (q - 1) = d q - d, with d for 256 numbers
    Q1_0  +-d           = 2 d q - d, q a bit, with d for 128 numbers; Q2_0 as TQ2_0, with d for 64

A power of two times a float16 is a float16 again, so all but two formats keep float16 scales. The product d s of Q4_K
and Q5_K has up to 11 + 6 bits of mantissa: exact in float32 (24 bits) but not in float16 (11), so these two get float32
scales. When MLX computes `scale * q + bias` from them in float32, the product is exact (17 + 5 bits) and the sum is
rounded once, as in ggml.

MXFP4 and NVFP4 are MLX's mxfp4 and nvfp4 in another order. Q6_K, Q3_K and Q2_K have groups of 16, which MLX's affine
form does not support: they are dequantized to float16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from runner.checkpoint.gguf import codebook_blocks as iq
from runner.checkpoint.gguf.bits import half, nibbles, pack, packed_nibbles, pairs_of_bits
from runner.checkpoint.gguf.formats import Array, Bytes, Format, Packed, Plain, Unpacked
from runner.nn.linear import Quantization


def _fifth_bits(blocks: Bytes, start: int) -> Bytes:
    """The fifth bits (0 or 16) of Q5_0 or Q5_1 blocks, `[n, 32]`: bit i of the four bytes at `start` is integer i's."""
    return np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little") << 4


def _q5(blocks: Bytes, start: int) -> Bytes:
    """Packed integers of Q5_0 or Q5_1 blocks, whose fifth bits are at byte `start` and the nibbles after them."""
    return pack(nibbles(blocks[:, start + 4 :], 16) | _fifth_bits(blocks, start), 5)


def _centred(zero: int) -> Callable[[Bytes], tuple[Array, Array]]:
    """Scales and biases of a format with numbers `d (q - zero)`, d at the start of the block.

    `zero` is a power of two, so `-zero * d` is exact in float16.
    """

    def affine(blocks: Bytes) -> tuple[Array, Array]:
        scales = half(blocks, 0)
        return scales, scales * np.float16(-zero)

    return affine


def _offset(blocks: Bytes) -> tuple[Array, Array]:
    """Scales and biases of Q4_1 and Q5_1, with numbers `d q + m`: d and m start the block."""
    return half(blocks, 0), half(blocks, 2)


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
    return half(blocks, 0).astype(np.float32) * scales, -(half(blocks, 2).astype(np.float32) * minima)


def _q5_k(blocks: Bytes) -> Bytes:
    """Packed integers of Q5_K blocks."""
    # Run c of 32 numbers takes its fifth bits from bit c of the 32 bytes before the nibbles.
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return pack(nibbles(blocks[:, 48:], 32) | (high << 4).reshape(len(blocks), -1), 5)


def _by_sixteen(scales: Array, codes: Array) -> Array:
    """Multiply `codes [n, 256]` by `scales [n, 16]`, one scale for each 16 codes."""
    numbers: Array = scales[:, :, None] * codes.reshape(len(codes), 16, 16)
    return numbers.reshape(len(codes), 256)


def _q2_k(blocks: Bytes) -> Array:
    """Dequantize Q2_K blocks: 16 bytes of 4-bit scales and minima, 64 bytes of 2-bit integers, d, dmin."""
    scales = half(blocks, 80).astype(np.float32) * (blocks[:, :16] & 15)
    minima = half(blocks, 82).astype(np.float32) * (blocks[:, :16] >> 4)
    numbers = _by_sixteen(scales, pairs_of_bits(blocks[:, 16:80]))
    numbers -= np.repeat(minima, 16, axis=1)
    return numbers


def _q3_k(blocks: Bytes) -> Array:
    """Dequantize Q3_K blocks: 32 bytes of third bits, 64 bytes of 2-bit integers, 12 bytes of 6-bit scales, d."""
    # 16 scales: the low 4 bits in the halves of eight bytes, the high 2 bits in the next four bytes.
    packed = blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = (packed[:, None, 8:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3).reshape(len(blocks), 16)
    scales = half(blocks, 108).astype(np.float32) * ((low | high << 4).astype(np.int8) - np.int8(32))
    # Run c of 32 numbers takes its third bits from bit c of the first 32 bytes.
    mask = (blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(len(blocks), 256)
    return _by_sixteen(scales, (pairs_of_bits(blocks[:, 32:96]) | mask << 2).astype(np.int8) - np.int8(4))


def _q6_k(blocks: Bytes) -> Array:
    """Dequantize Q6_K blocks: 128 bytes of nibbles, 64 bytes of high 2 bits, 16 scales (int8), d."""
    # Each half of a block: 64 bytes of nibbles (all low ones come first), 32 bytes of two bits for four runs of 32.
    low = nibbles(blocks[:, :128], 64).reshape(len(blocks), 256)
    codes = (low | pairs_of_bits(blocks[:, 128:192]) << 4).astype(np.int8) - np.int8(32)
    return _by_sixteen(half(blocks, 208).astype(np.float32) * blocks[:, 192:208].view(np.int8), codes)


def _tq1_0(blocks: Bytes) -> Bytes:
    """Packed integers of TQ1_0 blocks: 52 bytes of five digits in base 3 (the last four: four), d.

    A byte is a fraction, digits / 3^5 of 256, rounded up: times 3, what goes beyond a byte is the next digit.
    """
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
    # The digits of a run of bytes come run by run: the first digit of all its bytes, then the second, and so on.
    runs = [(blocks[:, None, a:b] * powers[:count]) for a, b, count in ((0, 32, 5), (32, 48, 5), (48, 52, 4))]
    fractions = np.concatenate([run.reshape(len(blocks), -1) for run in runs], axis=1)
    return pack((fractions.astype(np.uint16) * 3 >> 8).astype(np.uint8), 2)


def _tq2_0(blocks: Bytes) -> Bytes:
    """Packed integers of TQ2_0 blocks: 64 bytes of 2-bit integers, d."""
    return pack(pairs_of_bits(blocks[:, :64]), 2)


def _ternary(start: int, groups: int) -> Callable[[Bytes], tuple[Array, Array]]:
    """Scales and biases of numbers `d (q - 1)` for the groups of a block; d is at byte `start` of the block."""

    def affine(blocks: Bytes) -> tuple[Array, Array]:
        scales = np.repeat(half(blocks, start), groups, axis=1)
        return scales, -scales

    return affine


def _q1_0(blocks: Bytes) -> Bytes:
    """Packed integers of Q1_0 blocks: d, 128 bits."""
    return pack(np.unpackbits(blocks[:, 2:], axis=1, bitorder="little"), 2)


def _q1_0_scales(blocks: Bytes) -> tuple[Array, Array]:
    """Scales 2 d and biases -d of Q1_0 blocks."""
    d = half(blocks, 0)
    return d * np.float16(2), -d


def _mxfp4_scales(blocks: Bytes) -> tuple[Array]:
    """The scale of MXFP4 blocks, an exponent of 2 plus 127 (E8M0): their first byte."""
    return (blocks[:, :1],)


def _nvfp4_scales(blocks: Bytes) -> tuple[Array]:
    """The four E4M3 scales of NVFP4 blocks; ggml takes NaN without a sign (0x7F) for 0."""
    return (np.where(blocks[:, :4] == 0x7F, np.uint8(0), blocks[:, :4]),)


def _affine(bits: int, size: int = 32) -> Quantization:
    return Quantization(bits, size, "affine")


_MXFP4, _NVFP4 = Quantization(4, 32, "mxfp4"), Quantization(4, 16, "nvfp4")


FORMATS: Mapping[int, Format] = {
    0: Plain("F32", 1, 4, "F32"),
    1: Plain("F16", 1, 2, "F16"),
    2: Packed("Q4_0", 32, 18, "F16", _affine(4), lambda blocks: packed_nibbles(blocks[:, 2:], 16), _centred(8)),
    3: Packed("Q4_1", 32, 20, "F16", _affine(4), lambda blocks: packed_nibbles(blocks[:, 4:], 16), _offset),
    6: Packed("Q5_0", 32, 22, "F16", _affine(5), lambda blocks: _q5(blocks, 2), _centred(16)),
    7: Packed("Q5_1", 32, 24, "F16", _affine(5), lambda blocks: _q5(blocks, 4), _offset),
    8: Packed("Q8_0", 32, 34, "F16", _affine(8), lambda blocks: blocks[:, 2:] ^ 0x80, _centred(128)),
    10: Unpacked("Q2_K", 256, 84, "F16", _q2_k),
    11: Unpacked("Q3_K", 256, 110, "F16", _q3_k),
    12: Packed("Q4_K", 256, 144, "F32", _affine(4), lambda blocks: packed_nibbles(blocks[:, 16:], 32), _super),
    13: Packed("Q5_K", 256, 176, "F32", _affine(5), _q5_k, _super),
    14: Unpacked("Q6_K", 256, 210, "F16", _q6_k),
    16: Packed("IQ2_XXS", 256, 66, "F32", _affine(8), iq.iq2_xxs, iq.iq2_xxs_scales),
    17: Unpacked("IQ2_XS", 256, 74, "F16", iq.iq2_xs),
    18: Packed("IQ3_XXS", 256, 98, "F32", _affine(6), iq.iq3_xxs, iq.iq3_xxs_scales),
    19: Packed("IQ1_S", 256, 50, "F32", _affine(2), iq.iq1_s, iq.iq1_s_scales),
    20: Packed("IQ4_NL", 32, 18, "F16", _affine(8), iq.iq4_nl, _centred(128)),
    21: Packed("IQ3_S", 256, 110, "F32", _affine(4), iq.iq3_s, iq.iq3_s_scales),
    22: Unpacked("IQ2_S", 256, 82, "F16", iq.iq2_s),
    23: Packed("IQ4_XS", 256, 136, "F32", _affine(8), iq.iq4_xs, iq.iq4_xs_scales),
    29: Packed("IQ1_M", 256, 56, "F32", _affine(8, 128), iq.iq1_m, iq.iq1_m_scales),
    30: Plain("BF16", 1, 2, "BF16"),
    34: Packed("TQ1_0", 256, 54, "F16", _affine(2, 128), _tq1_0, _ternary(52, 2)),
    35: Packed("TQ2_0", 256, 66, "F16", _affine(2, 128), _tq2_0, _ternary(64, 2)),
    39: Packed("MXFP4", 32, 17, "U8", _MXFP4, lambda blocks: packed_nibbles(blocks[:, 1:], 16), _mxfp4_scales),
    40: Packed("NVFP4", 64, 36, "U8", _NVFP4, lambda blocks: packed_nibbles(blocks[:, 4:], 8), _nvfp4_scales),
    41: Packed("Q1_0", 128, 18, "F16", _affine(2, 128), _q1_0, _q1_0_scales),
    42: Packed("Q2_0", 64, 18, "F16", _affine(2, 64), lambda blocks: blocks[:, 2:], _ternary(0, 1)),
}
"""The supported formats, by ggml's number of the tensor type."""
