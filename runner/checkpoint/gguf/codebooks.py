"""Codebooks of ggml's IQ types: rows of four or eight numbers that a block names by one index. Unpacked on first use.

Sources: ggml-common.h (`iq1s_grid`, `iq2xxs_grid` ... `ksigns_iq2xs`, `kvalues_iq4nl`), by way of the `gguf` package.
Each table is looked up a row at a time, as one integer as wide as the row.
"""

from __future__ import annotations

import base64
import functools

import numpy as np

from runner.checkpoint.gguf.codebook_tables import TABLES
from runner.checkpoint.gguf.formats import Array, Bytes

NON_LINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
"""The sixteen numbers of IQ4_NL and IQ4_XS."""

_THREE = np.array([8, 25, 43], np.uint8)  # the sizes of the numbers in the IQ2 types
_EIGHT = np.array([2, 6, 10, 14, 18, 22, 26, 31], np.uint8)  # half of those in IQ3_XXS


@functools.cache
def packed_rows(name: str) -> Array:
    """The rows of a codebook as uint16, indices still packed: IQ1_S eight of 2 bits, IQ3_S four of 4, lowest first.

    IQ1_S: index i stands for the number i - 1. IQ3_S: for the size 2i + 1.
    """
    return np.frombuffer(base64.b85decode(TABLES[name]), np.dtype("<u2"))


@functools.cache
def sizes(name: str) -> Array:
    """The rows of a codebook, one byte per number: uint64 `[rows]` of the IQ2 types, uint32 `[256]` of IQ3_XXS.

    IQ3_XXS has half of the sizes that ggml lists, all of which are even.
    """
    raw = np.frombuffer(base64.b85decode(TABLES[name]), np.uint8)
    if name == "IQ3_XXS":
        return _EIGHT[np.stack([raw & 15, raw >> 4], axis=1)].reshape(-1).view(np.dtype("<u4"))
    indices = raw[:, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
    rows: Array = _THREE[indices].reshape(-1).view(np.dtype("<u8"))
    return rows


@functools.cache
def ternary() -> Array:
    """The rows of the codebook of IQ1_S and IQ1_M, one byte per index: uint64 `[2048]`."""
    raw = packed_rows("IQ1_S").view(np.uint8)
    rows: Array = (raw[:, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3).reshape(-1).view(np.dtype("<u8"))
    return rows


@functools.cache
def minus(count: int, bits: int) -> Array:
    """Masks of the negative numbers by sign bits: for index i, `count` lanes of `bits` bits, all ones where bit is set.

    Lane k belongs to bit k; one unsigned integer of `count * bits` bits for each of the 2^count indices.
    """
    lanes = [((1 << bits) - 1) << bits * lane for lane in range(count)]
    masks = [sum(mask for lane, mask in enumerate(lanes) if index >> lane & 1) for index in range(1 << count)]
    return np.array(masks, np.dtype(f"<u{count * bits // 8}"))


@functools.cache
def even_minus() -> Array:
    """Masks as `minus(8, 8)`, by the seven sign bits that IQ2_XXS, IQ2_XS and IQ3_XXS store: `[128]`.

    The eighth sign makes the number of minus signs even.
    """
    indices = [index | (index.bit_count() & 1) << 7 for index in range(128)]
    return minus(8, 8)[indices]


def signed(rows: Array, masks: Array) -> Bytes:
    """Numbers of the sizes `rows` with the signs `masks`, int8 `[..., bytes]`; the two have equal bytes in all."""
    masks = masks.reshape(-1).view(np.int8)
    # Two's complement, a byte at a time: -x is the complement of x, plus 1.
    numbers: Bytes = (rows.reshape(-1).view(np.int8) ^ masks) - masks
    return numbers
