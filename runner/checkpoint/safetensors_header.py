"""The header of a safetensors file, trusted only after every number in it was checked against the file.

Layout: 8 bytes, the header's length N (unsigned, little-endian); N bytes of JSON, `{name: {"dtype", "shape",
"data_offsets": [begin, end]}, "__metadata__": {str: str}}`; then the data, from whose start the offsets count. The
`safetensors` library checks first. What it accepts but another reader may see differently is refused here: a repeated
key, a list in place of an object, extra keys, and dimensions beyond 32 bits, which MLX would wrap.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import CheckpointError
from runner.local_files import MAX_PLACEHOLDER, is_plain_name, parse_json, quoted, read_json, refuse_placeholder

BITS = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits per element, by safetensors dtype."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

MAX_INDEX = 64 << 20
MAX_HEADER = 100_000_000  # the safetensors library's own limit
MAX_RANK = 32
MAX_DIM = 2**31 - 1  # MLX keeps dimensions in 32 signed bits and would wrap a larger one


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's entry in a header, checked against its file.

    Attributes:
        dtype: dtype in safetensors' spelling: "F32", "BF16", "U8", "F8_E4M3" …
        nbytes: bytes in the file, exactly what dtype and shape need.
        offset: position of the tensor's first byte, from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


@dataclass(frozen=True)
class Stamp:
    """Identity and state of a file; a later read compares stamps, so that a file changed after its check is noticed."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """The stamp of a file, from what `os.stat` says about it."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class ShardHeader:
    """The checked header of one file: tensors by name in the order of their data, metadata, and the file's stamp."""

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
            start = file.read(MAX_PLACEHOLDER + 1)
            refuse_placeholder(path, start)
            _refuse_foreign(path, start)
            if len(start) < 8:
                raise CheckpointError(f"{path}: {len(start)} bytes long, too short for a safetensors file")
            file.seek(8)
            length = int(struct.unpack("<Q", start[:8])[0])
            # Bound the length before reading: a file of a few bytes may claim exabytes.
            if length > min(stamp.size - 8, MAX_HEADER):
                raise CheckpointError(
                    f"{path}: claims a header of {length} bytes, but the whole file has {stamp.size} "
                    f"(and a header at most {MAX_HEADER}); an incomplete download, or not safetensors"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    # The same bytes again, with our own strict parser: no repeated keys, and each entry exactly as the format says.
    raw = parse_json(text, f"{path}: header")
    metadata = _metadata(raw.pop("__metadata__", None), path)
    # Parsed entries take much more memory than their text, so each one goes as soon as it is checked.
    infos = [_tensor(name, raw.pop(name), path, 8 + length) for name in list(raw)]
    infos.sort(key=lambda i: (i.offset, i.nbytes))
    _check_layout(infos, path, 8 + length, stamp.size)
    return ShardHeader({info.name: info for info in infos}, metadata, stamp)


def read_index(path: Path) -> dict[str, str]:
    """Read the `weight_map` of an index: tensor name -> plain name of a .safetensors file, which may not exist.

    `metadata.total_size` is not compared with the files: published indexes count shared tensors differently.

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


FORMATS = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes it: pickle weights under another name, which can run code "
     "when read: get the model's safetensors version"),
    ((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), "a pickle under another name, which can run code when read: "
     "get the model's safetensors version"),
    (b"GGUF", "a GGUF file under another name: let its name end in .gguf, and name that file to load it"),
    (b"\x89HDF", "an HDF5 file under another name: get the model's safetensors version"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"<", "a web page, not weights: fetch the file itself (on the hub, the address has /resolve/, not /blob/)"),
)  # fmt: skip
"""First bytes of other files that are found under a safetensors name, and what to do about them."""


def _refuse_foreign(path: Path, start: bytes) -> None:
    """Refuse a file whose first bytes are those of another format, or text; `start` is its beginning."""
    if start[8:9] == b"{" and not any(start[4:8]):  # a header and its length, whose upper half is zero
        return
    for magic, what in FORMATS:
        if start.lstrip().lower().startswith(magic) if magic == b"<" else start.startswith(magic):
            raise CheckpointError(f"{path}: {what}")
    text = start.decode("utf-8", "ignore").strip()
    if len(text) > 2 and text.replace("\n", " ").replace("\t", " ").replace("\r", " ").isprintable():
        raise CheckpointError(f"{path}: holds text, {quoted(text, 80)}, not weights; fetch it again")


def judge(path: Path) -> None:
    """Let the `safetensors` library check a file, as is done with every file that is written here.

    The checks of `read_header` are no laxer (tests hold that), but for NumPy, which the library loads to look at a
    header, there is no time whenever a model is opened.

    Raises:
        CheckpointError: naming the file and what the library says of it.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="np") as file:
            file.keys()
    except OSError:
        raise
    except BaseException as error:
        # A panic of the library (it is written in Rust) is no `Exception`; Ctrl-C and the like pass.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{path}: not a valid safetensors file: {str(error)[:300]}") from error


def _metadata(raw: Any, path: Path) -> dict[str, str]:
    """The checked `__metadata__`, `{}` where the header has none."""
    if raw is None:
        return {}
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        raise CheckpointError(f"{path}: header: __metadata__ must map strings to strings")
    return raw


def _tensor(name: str, raw: Any, path: Path, data_start: int) -> TensorInfo:
    """Check one entry of the header; its offsets must hold exactly as many bytes as its dtype and shape take."""
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
    # Counted in bits, since elements of 4 and 6 bits exist; Python's integers do not overflow, whatever the shape.
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        raise CheckpointError(f"{where}: {dtype} {shape} takes {bits / 8:g} bytes, but its offsets hold {end - begin}")
    return TensorInfo(name, dtype, tuple(shape), end - begin, path, data_start + begin)


def _sizes(value: Any) -> bool:
    """Whether `value` is a list of integers, none negative."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)  # a bool is no size


def _check_layout(infos: list[TensorInfo], path: Path, data_start: int, size: int) -> None:
    """Check that the tensors, sorted by offset, cover the data exactly: no gap, no overlap, no byte missing or left."""
    position = data_start
    for info in infos:
        if info.offset != position:
            problem = "overlaps the tensor before it" if info.offset < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {quoted(info.name)} {problem}")
        position += info.nbytes
    if position != size:
        raise CheckpointError(f"{path}: its tensors end at byte {position}, but the file has {size} bytes")
