"""The GGUF container: metadata and the position of every tensor, trusted only after each number was checked.

Source: ggml's docs/gguf.md, versions 2 and 3. Layout: "GGUF", version, number of tensors, number of metadata entries;
the entries (key, type, value); the tensors (name, dimensions, type, offset); padding; the data, from whose start the
offsets count. Files are read, never mapped, so that a file that shrinks meanwhile causes an error and not a signal.
"""

from __future__ import annotations

import math
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from runner.checkpoint.gguf.blocks import FORMATS
from runner.checkpoint.gguf.formats import Format
from runner.checkpoint.safetensors_header import MAX_DIM, Stamp
from runner.errors import CheckpointError
from runner.local_files import path_in, quoted

MAGIC = b"GGUF"
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_HEADER = 1 << 28  # the largest real ones (vocabularies of 260,000 tokens) take 16 MB
_MAX_ENTRIES = 100_000
_MAX_SHARDS = 1000
_BLOCK = 4 << 20  # bytes of a header that are read at once
_LENGTH = struct.Struct("<Q").unpack_from
_CHUNK = 4 << 20  # bytes of a tensor in memory at once, and numbers: in some formats a byte is four of them
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: `shape` is row-major (GGUF lists it reversed), `offset` counts from the start of `file`."""

    name: str
    shape: tuple[int, ...]
    format: Format
    file: Path
    offset: int

    @property
    def rows(self) -> int:
        """Number of rows. A vector of plain numbers counts one number per row, to be reordered as matrices are."""
        return self.shape[0] if self._is_vector else math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes per row in the file."""
        return (1 if self._is_vector else self.shape[-1]) // self.format.count * self.format.size

    @property
    def _is_vector(self) -> bool:
        return len(self.shape) == 1 and self.format.count == 1


@dataclass(frozen=True)
class Container:
    """The checked header of a file, or of all its shards together.

    Attributes:
        path: the file, or its first shard.
        metadata: values by key; numeric arrays are NumPy's.
        tensors: entries by tensor name.
        stamps: identity and state of each file when it was checked.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Entry]
    stamps: Mapping[Path, Stamp]

    def check_unchanged(self) -> None:
        """Check, after all is read, that no file changed: of a read itself, only its beginning is safe.

        Raises:
            CheckpointError: one changed since it was opened, or is gone.
        """
        for file, stamp in self.stamps.items():
            try:
                status = file.stat()
            except OSError as error:
                raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
            if Stamp.of(status) != stamp:
                raise CheckpointError(f"{file}: changed since it was opened; open it again")

    def rows(
        self, entry: Entry, multiple: int = 1, spans: Sequence[tuple[int, int]] | None = None
    ) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        """Yield the tensor's bytes in chunks `[n, row_bytes]`, each with the number of its first row.

        Args:
            multiple: each n is a multiple of this number, which must divide the tensor's number of rows.
            spans: the ranges of rows to read, of whole multiples; None: all.

        Raises:
            CheckpointError: the file changed since it was opened, or cannot be read.
        """
        widest = max(entry.row_bytes, entry.row_bytes // entry.format.size * entry.format.count)
        step = max(1, _CHUNK // (widest * multiple)) * multiple
        try:
            with entry.file.open("rb") as file:
                if Stamp.of(os.fstat(file.fileno())) != self.stamps[entry.file]:
                    raise CheckpointError(f"{entry.file}: changed since it was opened; open it again")
                for first, last in ((0, entry.rows),) if spans is None else spans:
                    file.seek(entry.offset + first * entry.row_bytes)
                    for start in range(first, last, step):
                        wanted = min(step, last - start) * entry.row_bytes
                        data = file.read(wanted)
                        if len(data) != wanted:
                            raise CheckpointError(f"{entry.file}: ends inside tensor {quoted(entry.name)}")
                        yield start, np.frombuffer(data, np.uint8).reshape(-1, entry.row_bytes)
        except OSError as error:
            raise CheckpointError(f"{entry.file}: cannot be read: {error.strerror or error}") from error


def open_container(path: Path) -> Container:
    """Read and check the header of a file and, where it is the first shard, those of the other shards.

    Args:
        path: the file; of a sharded model, the first shard (`...-00001-of-00003.gguf`).

    Raises:
        CheckpointError: naming the file and the problem.
    """
    # The first shard has the metadata of the model; each shard says how many there are, and which one it is.
    first = _open(path)
    count = _whole(first, "split.count", 1)
    if count == 1:
        return first
    if _whole(first, "split.no", 0):
        raise CheckpointError(
            f"{path}: not the first of {count} shards; name the first one, ...-00001-of-{count:05d}.gguf"
        )
    found = _SHARD.fullmatch(path.name)
    if found is None or found[2] != "00001" or int(found[3]) != count or count > _MAX_SHARDS:
        raise CheckpointError(f"{path}: one of {count} shards, so its name must end in -00001-of-{count:05d}.gguf")
    tensors, stamps = dict(first.tensors), dict(first.stamps)
    for number in range(1, count):
        name = f"{found[1]}-{number + 1:05d}-of-{count:05d}.gguf"
        shard = _open(path_in(path.parent, name))
        # A renamed file could be a shard of another model, or another shard of this one.
        if _whole(shard, "split.no", -1) != number or _whole(shard, "split.count", -1) != count:
            raise CheckpointError(f"{path.parent / name}: its metadata does not say that it is shard {number + 1}")
        twice = tensors.keys() & shard.tensors.keys()
        if twice:
            raise CheckpointError(f"{path.parent / name}: tensor {quoted(min(twice))} is in another shard too")
        tensors |= shard.tensors
        stamps |= shard.stamps
    # A shard may have lost tensors and still be a valid file; the first shard says how many there must be.
    total = _whole(first, "split.tensors.count", len(tensors))
    if total != len(tensors):
        raise CheckpointError(f"{path}: the shards hold {len(tensors)} tensors, expected {total}")
    return Container(path, first.metadata, tensors, stamps)


def brief(value: object) -> str:
    """One short line that shows a metadata value in a message."""
    return f"an array of {value.size}" if isinstance(value, np.ndarray) else repr(value)[:80]


def _whole(container: Container, key: str, default: int) -> int:
    """The integer under a metadata key, `default` where the key is missing."""
    value = container.metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"{container.path}: {key} is {brief(value)}, expected an integer")
    return value


def _open(path: Path) -> Container:
    """Read and check the header of one file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for a writer
            raise CheckpointError(f"{path}: not a regular file")
        with path.open("rb") as file:
            stamp = Stamp.of(os.fstat(file.fileno()))
            return _Header(path, file, stamp).read()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Header:
    """Reads a header front to back, and allocates nothing larger than what the rest of the file can hold."""

    def __init__(self, path: Path, file: BinaryIO, stamp: Stamp) -> None:
        self.path = path
        self.file = file
        self.stamp = stamp
        self.limit = min(stamp.size, _MAX_HEADER)
        # A block of the file, where it starts, and how much of it has been taken.
        self.block, self.start, self.taken = b"", 0, 0

    @property
    def position(self) -> int:
        """The place in the file of what is taken next."""
        return self.start + self.taken

    def error(self, what: str) -> CheckpointError:
        """An error that names the file and the problem, for the caller to raise."""
        return CheckpointError(f"{self.path.name} is not a readable GGUF file: {what}")

    def read(self) -> Container:
        """Read the whole header and check that the tensors lie in the file and do not overlap."""
        magic, version = self.take(4), self.number("<I")
        if magic != MAGIC or version not in (2, 3):
            # A version of 2 or 3 in the other byte order reads as 2 << 24 or 3 << 24.
            swapped = "; it was written for big-endian machines" if version in (2 << 24, 3 << 24) else ""
            raise self.error(f"magic {magic!r}, version {version}, expected {MAGIC!r}, 2 or 3{swapped}")
        # Both counts drive loops, so they are bounded before the loops start.
        tensors, pairs = self.number("<Q"), self.number("<Q")
        if tensors > _MAX_ENTRIES or pairs > _MAX_ENTRIES:
            raise self.error(
                f"it claims {tensors} tensors and {pairs} metadata entries, expected at most {_MAX_ENTRIES} of each"
            )
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.string()
            if key in metadata:
                raise self.error(f"metadata key {quoted(key)} comes twice")
            metadata[key] = self.value(self.number("<I"))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 65536 or alignment % 8:
            raise self.error(f"general.alignment is {brief(alignment)}, expected a multiple of 8 from 8 to 65536")
        # Offsets count from the start of the data, which is known only when all entries have been read.
        entries = [self.entry(alignment) for _ in range(tensors)]
        start = -(-self.position // alignment) * alignment
        found = {entry.name: self.placed(entry, start) for entry in entries}
        if len(found) != len(entries):
            raise self.error("a tensor name comes twice")
        # In the order of their data, each tensor must start at or after the end of the one before; gaps are allowed.
        end, last = start, ""
        for entry in sorted(found.values(), key=lambda entry: entry.offset):
            if entry.offset < end:
                raise self.error(f"tensors {quoted(last)} and {quoted(entry.name)} overlap")
            end, last = entry.offset + entry.rows * entry.row_bytes, entry.name
        return Container(self.path, metadata, found, {self.path: self.stamp})

    def take(self, size: int) -> bytes:
        """The next `size` bytes, refused before they are read where the file or the limit of a header ends first."""
        if size > self.limit - self.position:
            raise self.error(
                f"its header needs {size} bytes at byte {self.position}, but the file has {self.stamp.size} bytes "
                f"(and a header at most {_MAX_HEADER})"
            )
        if self.taken + size > len(self.block):
            rest = self.block[self.taken :]
            self.start, self.taken = self.position, 0
            wanted = min(max(size, _BLOCK), self.limit - self.start) - len(rest)
            self.block = rest + self.file.read(wanted)
            if len(self.block) < size:
                raise self.error(f"it ended at byte {self.start + len(self.block)} while it was being read")
        end = self.taken + size
        data, self.taken = self.block[self.taken : end], end
        return data

    def number(self, form: str) -> int:
        """The next integer, in `struct`'s format `form`."""
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def string(self) -> str:
        """The next string: a 64-bit length, then UTF-8."""
        data = self.take(self.number("<Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"a string that is not UTF-8 at byte {self.position - len(data)}") from error

    def strings(self, count: int) -> list[str]:
        """The next `count` strings, as `string` reads them: vocabularies have a hundred thousand."""
        found: list[str] = []
        while len(found) < count:
            # Those that lie in the block, whole and as UTF-8; what follows them `string` reads, or refuses.
            block, at = self.block, self.taken
            last = len(block) - 8
            try:
                for _ in range(count - len(found)):
                    if at > last:
                        break
                    end = at + 8 + _LENGTH(block, at)[0]
                    if end > len(block):
                        break
                    found.append(str(block[at + 8 : end], "utf-8"))
                    at = end
            except UnicodeDecodeError:
                pass
            self.taken = at
            if len(found) < count:
                found.append(self.string())
        return found

    def value(self, kind: int) -> Any:
        """The next metadata value, of type `kind`: a Python scalar, a string, a list of strings, or a NumPy array."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            if inner == _STRING:
                if count * 8 > self.stamp.size - self.position:  # each string takes 8 bytes for its length alone
                    raise self.error(
                        f"an array of {count} strings at byte {self.position} does not fit into "
                        f"its {self.stamp.size} bytes"
                    )
                return self.strings(count)
            return self.numbers(inner, count)
        return self.numbers(kind, 1)[0].item()

    def numbers(self, kind: int, count: int) -> npt.NDArray[Any]:
        """The next `count` numbers or booleans of type `kind`."""
        if kind == _BOOL:
            return np.frombuffer(self.take(count), np.uint8).astype(np.bool_)
        if kind not in _SCALARS:
            raise self.error(f"unknown metadata type {kind} at byte {self.position}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def entry(self, alignment: int) -> Entry:
        """The next tensor's entry, its offset still counted from the start of the data."""
        name = self.string()
        # Bounded before the shape is read: GGUF has at most four dimensions.
        rank = self.number("<I")
        if not 1 <= rank <= 4 or len(name) > 512:
            raise self.error(
                f"tensor {quoted(name)} has {rank} dimensions and a name of {len(name)} characters, "
                "expected 1 to 4 dimensions and at most 512 characters"
            )
        shape = tuple(int(size) for size in self.numbers(10, rank)[::-1])  # type 10: uint64
        kind, offset = self.number("<I"), self.number("<Q")
        if kind not in FORMATS:
            known = ", ".join(form.name for form in FORMATS.values())
            raise CheckpointError(
                f"{self.path.name}: tensor {quoted(name)} has type {_name(kind)}, "
                f"which is not supported; supported types: {known}"
            )
        form = FORMATS[kind]
        if not all(0 < size <= MAX_DIM for size in shape) or shape[-1] % form.count or offset % alignment:
            raise self.error(
                f"tensor {quoted(name)}: shape {list(shape)}, type {form.name}, offset {offset}: expected sizes from 1 "
                f"to {MAX_DIM}, a last size that is a multiple of {form.count}, and an offset that {alignment} divides"
            )
        return Entry(name, shape, form, self.path, offset)

    def placed(self, entry: Entry, start: int) -> Entry:
        """The entry with its offset counted from the start of the file; `start` is where the data begins."""
        offset = start + entry.offset
        if offset + entry.rows * entry.row_bytes > self.stamp.size:
            raise self.error(f"tensor {quoted(entry.name)} ends beyond the file; an incomplete copy?")
        return Entry(entry.name, entry.shape, entry.format, entry.file, offset)


_OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip
"""Types that no weight matrix has (intermediate results, integers), and those that llama.cpp itself has dropped."""


def _name(kind: int) -> str:
    """ggml's name of a tensor type that is not supported, or its number."""
    return _OTHER_TYPES.get(kind, str(kind))
