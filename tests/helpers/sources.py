"""Small made-up checkpoints in memory, for tests of weight tags."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

NAMES = {
    mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.int32: "I32", mx.uint8: "U8",
}  # fmt: skip


@dataclass(frozen=True)
class Info:
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Arrays:
    """An in-memory `Source` that lists the names of the tensors read from it."""

    def __init__(self, arrays: dict[str, mx.array]) -> None:
        self.arrays = arrays
        self.headers = {k: Info(NAMES[v.dtype], tuple(v.shape), v.nbytes) for k, v in arrays.items()}
        self.reads: list[str] = []

    def read(self, name: str) -> mx.array:
        self.reads.append(name)
        return self.arrays[name]
