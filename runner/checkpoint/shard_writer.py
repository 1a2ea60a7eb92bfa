"""Writing safetensors files piece by piece: all shapes are known beforehand, the bytes come later and in any order."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from runner.checkpoint.safetensors_header import judge, read_header
from runner.errors import CheckpointError, UsageError
from runner.local_files import quoted

if TYPE_CHECKING:
    import mlx.core as mx

WIDTHS: Mapping[str, int] = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4, "U32": 4}
"""Bytes per element, by safetensors dtype."""


@dataclass(frozen=True)
class Planned:
    """Dtype (in safetensors' spelling) and shape of a tensor to be written."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * WIDTHS[self.dtype]


@dataclass(frozen=True)
class Piece:
    """Part of the tensor `name`: the bytes of `array` belong at byte `offset` of the tensor."""

    name: str
    offset: int
    array: mx.array


def write_shards(
    directory: Path, tensors: Mapping[str, Planned], pieces: Iterable[Piece], max_shard_bytes: int = 5 << 30
) -> None:
    """Write `tensors` as `model.safetensors`, or as shards with an index, from `pieces` that come in any order.

    Memory holds one piece at a time. The sizes of a tensor's pieces must add up to the size of the tensor; that they do
    not overlap is up to the caller.

    Args:
        directory: an existing directory.
        tensors: dtype and shape by name; shards are filled in this order.
        pieces: consumed once.
        max_shard_bytes: tensor bytes per shard; a larger tensor gets a shard to itself.

    Raises:
        CheckpointError: the disk cannot be written, or a tensor's pieces are more or fewer bytes than the tensor.
        UsageError: `max_shard_bytes` is below 1.
    """
    if max_shard_bytes < 1:
        raise UsageError(f"max_shard_bytes is {max_shard_bytes}; expected at least 1")
    shards = _shards(tensors, max_shard_bytes)
    home = {name: file for file, names in shards.items() for name in names}
    open_files: dict[str, BinaryIO] = {}
    written = dict.fromkeys(tensors, 0)
    try:
        # Headers first, and each file at its full size, so that pieces can then be written anywhere.
        starts = {file: _begin(directory / file, tensors, names) for file, names in shards.items()}
        for piece in pieces:
            file = home[piece.name]
            if file not in open_files:
                open_files[file] = (directory / file).open("r+b")
            start = starts[file][piece.name]
            if piece.offset + piece.array.nbytes > tensors[piece.name].nbytes:
                raise CheckpointError(
                    f"tensor {quoted(piece.name)} is larger than planned: a piece ends at byte "
                    f"{piece.offset + piece.array.nbytes} of {tensors[piece.name].nbytes}"
                )
            open_files[file].seek(start + piece.offset)
            open_files[file].write(bytes_of(piece.array))
            written[piece.name] += piece.array.nbytes
        for handle in open_files.values():
            handle.close()  # a full disk may go unnoticed until here
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written: {error.strerror or error}") from error
    finally:
        for handle in open_files.values():
            handle.close()
    for name, count in written.items():
        if count != tensors[name].nbytes:
            raise CheckpointError(
                f"tensor {quoted(name)} was not written whole: {count} of {tensors[name].nbytes} bytes"
            )
    for file in shards:
        # What was written must pass the checks that it will be read with, and those that others read it with.
        read_header(directory / file)
        judge(directory / file)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(item.nbytes for item in tensors.values())},
            "weight_map": dict(sorted(home.items())),
        }
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _shards(tensors: Mapping[str, Planned], max_bytes: int) -> dict[str, list[str]]:
    """Assign tensors to files in order: tensor names by file name. A tensor above `max_bytes` gets a file to itself."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, item in tensors.items():
        if groups[-1] and size + item.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += item.nbytes
    if not groups[0]:
        raise CheckpointError("no tensors to write")
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _begin(path: Path, tensors: Mapping[str, Planned], names: list[str]) -> dict[str, int]:
    """Create a file with its header and full size; returns the byte at which each tensor starts in the file."""
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    places: dict[str, int] = {}
    end = 0
    for name in sorted(names, key=lambda name: -WIDTHS[tensors[name].dtype]):  # widest dtypes first: all are aligned
        item = tensors[name]
        places[name] = end
        header[name] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": [end, end + item.nbytes]}
        end += item.nbytes
    text = json.dumps(header, ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)  # grows the file; the pieces fill it
    return {name: 8 + len(text) + start for name, start in places.items()}


def bytes_of(array: mx.array) -> memoryview:
    """Raw bytes of `array` in row-major order; little-endian, since all machines that MLX runs on are."""
    import mlx.core as mx
    import numpy as np

    return np.asarray(mx.contiguous(array).flatten().view(mx.uint8)).data
