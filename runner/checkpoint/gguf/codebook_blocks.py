"""ggml's IQ block formats: 1 to 4 bits per number, most by rows of a codebook, with signs apart.

See ggml-common.h for the layouts and `dequantize_row_iq*` in ggml-quants.c. With s a small integer scale and d the
block's float16, the numbers are

    IQ1_S    d (2s + 1) (g +- 1/8), g in -1, 0, 1          scale and sign of 1/8 per 32
    IQ1_M    the same                                      scale per 16, sign of 1/8 per 8
    IQ2_*    d (2s + 1) / 8 g, g in +-8, 25, 43            scale per 32 (IQ2_XXS) or 16
    IQ3_XXS  d (2s + 1) / 4 g, g in +-4, 12 ... 52, 62     scale per 32
    IQ3_S    d (2s + 1) g, g in +-1, 3 ... 15              scale per 32
    IQ4_NL   d g, g of 16 numbers from -127 to 113         no scale but d, per 32
    IQ4_XS   d (s - 32) g, g as in IQ4_NL                  scale per 32

Equally spaced integers with a scale per 32 are MLX's affine form, so IQ1_S takes 2 bits, IQ3_S 4 (g is odd) and IQ3_XXS
6 (g is even); others are spaced unequally, but are integers below 128, and take 8 bits as Q8_0 does. IQ1_M is d / 8
times an odd integer up to 135, (2s + 1) (8g +- 1), which is 8 bits in any group. IQ2_XS and IQ2_S alone have more
numbers than that in a group of 32: they are dequantized to float16.

Scales are float32, which holds each product above exactly; d alone stays float16 (IQ4_NL). So is `scale * q + bias`:
the integers have 8 bits, the scales at most 16.
"""

from __future__ import annotations

import numpy as np

from runner.checkpoint.gguf.bits import half, halves_of_bytes, nibbles, pack, words
from runner.checkpoint.gguf.codebooks import NON_LINEAR, even_minus, minus, packed_rows, signed, sizes, ternary
from runner.checkpoint.gguf.formats import Array, Bytes

_SEVENS = np.array([0, 7, 14, 21], np.uint32)
_THREES = np.array([0, 3, 6, 9], np.uint16)


def _unsigned(numbers: Array) -> Bytes:
    """Add 128 to int8 numbers, which makes them unsigned."""
    return numbers.view(np.uint8) ^ np.uint8(128)


def _around(scales: Array, zero: int) -> tuple[Array, Array]:
    """Scales and biases, float32, of numbers `scale * (q - zero)`."""
    return scales, scales * np.float32(-zero)


def _odd_scales(blocks: Bytes, scales: Array) -> Array:
    """d (2s + 1) for small integers s `[n, c]`; d starts the block. Exact: d has 11 bits, s at most 4."""
    return half(blocks, 0).astype(np.float32) * (2 * scales.astype(np.float32) + 1)


# --- one bit ----------------------------------------------------------------------------------------------------------


def iq1_s(blocks: Bytes) -> Bytes:
    """Packed integers g + 1 of IQ1_S blocks: d, 32 bytes of indices, 8 words of three bits more for four indices."""
    high = words(blocks, 34, 50, "<u2")[:, :, None] >> _THREES & 7
    rows: Array = packed_rows("IQ1_S")[blocks[:, 2:34] | high.reshape(len(blocks), 32) << 8]
    return rows.view(np.uint8)


def iq1_s_scales(blocks: Bytes) -> tuple[Array, Array]:
    """Scales d (2s + 1) of IQ1_S blocks, and biases of -1 + 1/8 or -1 - 1/8 scales: the high 4 bits of each word."""
    high = words(blocks, 34, 50, "<u2")
    scales = _odd_scales(blocks, high >> 12 & 7)
    return scales, scales * np.where(high & 0x8000, np.float32(-1.125), np.float32(-0.875))


def iq1_m(blocks: Bytes) -> Bytes:
    """Integers of IQ1_M blocks: 32 bytes of indices, 32 halves of bytes with three bits more and a sign, scales.

    With g = c - 1, the odd number (2s + 1) (8g +- 1) is 2q - 135 for q = 4 (2s + 1) c + (135 - (2s + 1) (8 -+ 1)) / 2.
    """
    high = halves_of_bytes(blocks[:, 32:48])
    rows = ternary()[blocks[:, :32] | (high & 7).astype(np.uint16) << 8].view(np.uint8).reshape(len(blocks), 16, 2, 8)
    odd = (2 * (words(blocks, 48, 56, "<u2")[:, :, None] >> _THREES & 7) + 1).astype(np.uint8).reshape(-1, 16, 1, 1)
    steps = np.where(high & 8, np.uint8(9), np.uint8(7)).reshape(len(blocks), 16, 2, 1)
    numbers: Bytes = rows * (4 * odd) + (135 - odd * steps) // 2
    return numbers.reshape(len(blocks), 256)


def iq1_m_scales(blocks: Bytes) -> tuple[Array, Array]:
    """Scales d / 4 and biases -135 d / 8 of IQ1_M blocks, for groups of 128: d is in the high halves of four words."""
    pieces = (words(blocks, 48, 56, "<u2") & 0xF000) >> np.array([12, 8, 4, 0], np.uint16)
    d = np.bitwise_or.reduce(pieces, axis=1, keepdims=True).view(np.float16).astype(np.float32)
    return np.repeat(d / 4, 2, axis=1), np.repeat(d * np.float32(-135 / 8), 2, axis=1)


# --- two bits ---------------------------------------------------------------------------------------------------------


def iq2_xxs(blocks: Bytes) -> Bytes:
    """Integers g + 128 of IQ2_XXS blocks: d, 8 runs of four indices and a word of four times seven signs, and s."""
    runs = blocks[:, 2:].reshape(len(blocks), 8, 8)
    signs = words(blocks, 2, 66, "<u4")[:, 1::2, None] >> _SEVENS & 127
    return _unsigned(signed(sizes("IQ2_XXS")[runs[:, :, :4]], even_minus()[signs])).reshape(len(blocks), 256)


def iq2_xxs_scales(blocks: Bytes) -> tuple[Array, Array]:
    """Scales d (2s + 1) / 8 of IQ2_XXS blocks, and their biases."""
    return _around(_odd_scales(blocks, words(blocks, 2, 66, "<u4")[:, 1::2] >> 28) / 8, 128)


def _by_sixteens(blocks: Bytes, scales: Bytes, numbers: Bytes) -> Array:
    """d (2s + 1) / 8 times `numbers`, 256 per block, for 16 scales of 4 bits per block."""
    factors = _odd_scales(blocks, halves_of_bytes(scales)) / 8
    product: Array = factors[:, :, None] * numbers.reshape(len(blocks), 16, 16)
    return product.reshape(len(blocks), 256)


def iq2_xs(blocks: Bytes) -> Array:
    """Dequantize IQ2_XS blocks: d, 32 words of nine bits of index and seven signs, 8 bytes of scales."""
    both = words(blocks, 2, 66, "<u2")
    return _by_sixteens(blocks, blocks[:, 66:], signed(sizes("IQ2_XS")[both & 511], even_minus()[both >> 9]))


def iq2_s(blocks: Bytes) -> Array:
    """Dequantize IQ2_S blocks: d, 32 bytes of indices, 32 of signs, 8 of two bits more for each index, 8 of scales."""
    high = blocks[:, 66:74, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
    indices = blocks[:, 2:34] | high.reshape(len(blocks), 32).astype(np.uint16) << 8
    return _by_sixteens(blocks, blocks[:, 74:], signed(sizes("IQ2_S")[indices], minus(8, 8)[blocks[:, 34:66]]))


# --- three bits -------------------------------------------------------------------------------------------------------


def iq3_xxs(blocks: Bytes) -> Bytes:
    """Packed integers g / 2 + 32 of IQ3_XXS blocks: d, 64 bytes of indices, 8 words as in IQ2_XXS."""
    signs = words(blocks, 66, 98, "<u4")[:, :, None] >> _SEVENS & 127
    numbers = signed(sizes("IQ3_XXS")[blocks[:, 2:66]], even_minus()[signs])
    return pack((numbers + np.int8(32)).view(np.uint8).reshape(len(blocks), 256), 6)


def iq3_xxs_scales(blocks: Bytes) -> tuple[Array, Array]:
    """Scales d (2s + 1) / 2 of IQ3_XXS blocks, and their biases."""
    return _around(_odd_scales(blocks, words(blocks, 66, 98, "<u4") >> 28) / 2, 32)


def iq3_s(blocks: Bytes) -> Bytes:
    """Packed integers (g + 15) / 2 of IQ3_S blocks: d, 64 bytes of indices, 64 bits more, 256 signs, 4 bytes of scales.

    For the size 2i + 1 that is 8 + i, and with a minus 7 - i: the complement in 4 bits.
    """
    high = np.unpackbits(blocks[:, 66:74], axis=1, bitorder="little").astype(np.uint16)
    signs = halves_of_bytes(blocks[:, 74:106])
    rows = packed_rows("IQ3_S")[blocks[:, 2:66] | high << 8] | np.uint16(0x8888)
    codes: Array = rows ^ minus(4, 4)[signs]
    return codes.view(np.uint8)


def iq3_s_scales(blocks: Bytes) -> tuple[Array, Array]:
    """Scales 2 d (2s + 1) of IQ3_S blocks, and biases of -15 d (2s + 1)."""
    odd = _odd_scales(blocks, halves_of_bytes(blocks[:, 106:]))
    return 2 * odd, odd * np.float32(-15)


# --- four bits --------------------------------------------------------------------------------------------------------


def iq4_nl(blocks: Bytes) -> Bytes:
    """Integers g + 128 of IQ4_NL blocks: d, 16 bytes of indices."""
    return _unsigned(NON_LINEAR)[nibbles(blocks[:, 2:], 16)]


def iq4_xs(blocks: Bytes) -> Bytes:
    """Integers g + 128 of IQ4_XS blocks: d, scales, 128 bytes of indices."""
    return _unsigned(NON_LINEAR)[nibbles(blocks[:, 8:], 16)]


def iq4_xs_scales(blocks: Bytes) -> tuple[Array, Array]:
    """Scales d (s - 32) of IQ4_XS blocks, and their biases: a word of high 2 bits, 4 bytes of low 4 bits."""
    high = words(blocks, 2, 4, "<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scales = (halves_of_bytes(blocks[:, 4:8]) | high << 4).astype(np.float32) - 32
    return _around(half(blocks, 0).astype(np.float32) * scales, 128)
