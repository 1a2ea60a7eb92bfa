"""Small integers and float16 numbers out of the bytes of ggml's blocks, and into the words of MLX's quantized matrices.

Everywhere blocks are uint8 `[n, size]`.
"""

from __future__ import annotations

import numpy as np

from runner.checkpoint.gguf.formats import NUMPY, Array, Bytes


def half(blocks: Bytes, start: int) -> Array:
    """The float16 at byte `start` of each block: `[n, 1]`, where it lies if it can be read there."""
    if start % 2 == 0 and blocks.shape[1] % 2 == 0 and blocks.flags.c_contiguous:
        return blocks.view(NUMPY["F16"])[:, start // 2 : start // 2 + 1]
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(NUMPY["F16"])


def words(blocks: Bytes, start: int, stop: int, dtype: str) -> Array:
    """The little-endian integers in bytes `start` to `stop` of each block, as `[n, (stop - start) / item size]`."""
    return np.ascontiguousarray(blocks[:, start:stop]).view(np.dtype(dtype))


def nibbles(packed: Bytes, run: int) -> Bytes:
    """Unpack 4-bit integers in order: of each `run` bytes, first all low halves, then all high halves."""
    runs = packed.reshape(len(packed), -1, 1, run)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(packed), -1)


def packed_nibbles(packed: Bytes, run: int) -> Bytes:
    """The result of `pack(nibbles(packed, run), 4)`, computed faster, two bytes at a time."""
    # Integers i and i + 1 share a byte in MLX's order; in ggml's they are the same halves of two neighbouring bytes.
    pairs = np.ascontiguousarray(packed).view(np.dtype("<u2")).reshape(len(packed), -1, 1, run // 2)
    low, high = (pairs & 0x0F) | (pairs >> 4 & 0xF0), (pairs >> 4 & 0x0F) | (pairs >> 8 & 0xF0)
    return np.concatenate([low, high], axis=2).astype(np.uint8).reshape(len(packed), -1)


def pairs_of_bits(packed: Bytes) -> Bytes:
    """Unpack 2-bit integers in the K formats' order: of each 32 bytes the lowest two bits, then the next two, etc."""
    runs = packed.reshape(len(packed), -1, 1, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    return (runs >> shifts & 3).reshape(len(packed), -1)


def halves_of_bytes(packed: Bytes) -> Bytes:
    """Unpack 4-bit integers: the low half of each byte, then its high half, `[n, c] -> [n, 2c]`."""
    return np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)


def pack(codes: Bytes, bits: int) -> Bytes:
    """Pack integers as MLX does, `bits` bits each, lowest bits first: uint8 `[n, c] -> [n, c * bits / 8]`."""
    # Eight integers fill exactly `bits` bytes. In the 64-bit word that they are, neighbours move together: in pairs,
    # then pairs of pairs, then both halves. Each step keeps the lower part of each lane and moves the upper one down.
    word = np.ascontiguousarray(codes).view(np.dtype("<u8"))
    for lane in (8, 16, 32):
        filled = bits * lane // 8
        low = sum(((1 << filled) - 1) << start for start in range(0, 64, 2 * lane))
        word = (word & np.uint64(low)) | (word >> np.uint64(lane - filled) & np.uint64(low << filled))
    return word.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(len(codes), -1)
