"""The header of a safetensors file, believed only after every number in it was checked against the file.

A file is: 8 bytes, the header's length N (unsigned, little-endian); N bytes of JSON, `{name: {"dtype", "shape",
"data_offsets": [begin, end]}, "__metadata__": {str: str}}`; then the data, which the offsets count from. The
`safetensors` library judges first; what it lets through and another reader may see differently is refused here
(a repeated key, a list in place of an object, extra keys, dimensions beyond 32 bits, which MLX would wrap).
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import CheckpointError
from runner.local_files import is_plain_name, parse_json, quoted, read_json

BITS = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits of one element, by the format's dtype name."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

MAX_INDEX = 64 << 20
MAX_HEADER = 100_000_000  # the safetensors library's own limit
MAX_RANK = 32
MAX_DIM = 2**31 - 1  # MLX keeps dimensions in 32 signed bits and would wrap a larger one


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor, checked against its file.

    Attributes:
        dtype: in safetensors' spelling: "F32", "BF16", "U8", "F8_E4M3" …
        nbytes: bytes in the file, exactly what dtype and shape need.
        offset: of the tensor's first byte, from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


@dataclass(frozen=True)
class Stamp:
    """Which file, in which state: a later read compares it, so that a file replaced after its check is noticed."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class ShardHeader:
    """A whole header: tensors in the order of their data."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    stamp: Stamp


def read_header(path: Path) -> ShardHeader:
    """Read and check the header of one safetensors file; no tensor byte is read.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    try:
        with path.open("rb") as file:
            stamp = Stamp.of(os.fstat(file.fileno()))
            start = file.read(8)
            if start == b"version ":
                raise CheckpointError(f"{path}: a Git LFS pointer, not the weights: run `git lfs pull` there")
            if len(start) < 8:
                raise CheckpointError(f"{path}: {len(start)} bytes long, too short for a safetensors file")
            length = int(struct.unpack("<Q", start)[0])
            if length > min(stamp.size - 8, MAX_HEADER):
                raise CheckpointError(
                    f"{path}: claims a header of {length} bytes, but the file has {stamp.size} in all "
                    f"(and a header may have {MAX_HEADER}); an incomplete download, or not safetensors"
                )
            _judge(path)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    raw = parse_json(text, f"{path}: header")
    metadata = _metadata(raw.pop("__metadata__", None), path)
    infos = sorted((_tensor(name, raw[name], path, 8 + length) for name in raw), key=lambda i: (i.offset, i.nbytes))
    _check_layout(infos, path, 8 + length, stamp.size)
    return ShardHeader({info.name: info for info in infos}, metadata, stamp)


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index: from tensor names to plain names of .safetensors files, none of them looked at.

    `metadata.total_size` is not compared: published indexes count shared tensors differently.

    Raises:
        CheckpointError: naming the index and what is wrong with it.
    """
    weight_map = read_json(path, MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must be an object from tensor names to file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not is_plain_name(file) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {quoted(name)} is said to be in {quoted(str(file))}, "
                "which is not the plain name of a .safetensors file"
            )
    return weight_map


def _judge(path: Path) -> None:
    """The format's own library decides first."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            file.keys()
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a valid safetensors file: {str(error)[:300]}") from error


def _metadata(raw: Any, path: Path) -> dict[str, str]:
    if raw is None:
        return {}
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        raise CheckpointError(f"{path}: header: __metadata__ must map strings to strings")
    return raw


def _tensor(name: str, raw: Any, path: Path, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {quoted(name)}"
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: its entry must be an object of exactly dtype, shape and data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{where}: unknown dtype {quoted(str(dtype))}; known: {', '.join(BITS)}")
    if not _sizes(shape) or len(shape) > MAX_RANK or max(shape, default=0) > MAX_DIM:
        raise CheckpointError(
            f"{where}: shape {quoted(str(shape))} is not a list of at most {MAX_RANK} sizes from 0 to {MAX_DIM}"
        )
    if not _sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets {quoted(str(offsets))} are not two positions")
    begin, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        raise CheckpointError(f"{where}: {dtype} {shape} takes {bits / 8:g} bytes, but its offsets hold {end - begin}")
    return TensorInfo(name, dtype, tuple(shape), end - begin, path, data_start + begin)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(infos: list[TensorInfo], path: Path, data_start: int, size: int) -> None:
    """The tensors cover the data exactly: no gap, no overlap, nothing short and nothing left over."""
    position = data_start
    for info in infos:
        if info.offset != position:
            problem = "overlaps the one before it" if info.offset < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {quoted(info.name)} {problem}")
        position += info.nbytes
    if position != size:
        raise CheckpointError(f"{path}: its tensors end at byte {position}, but the file has {size}")
