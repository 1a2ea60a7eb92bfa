"""Kept prefixes on disk, so that a later process needs not read them either.

A directory of safetensors files, one for each piece of a tree's path: the ids from the first token on, the rows of the
last of them, and the marks at their end. A file is written whole or not at all, and is used only where its checksum
holds and all that the numbers depend on is the same: the weights, the configuration, how rows are kept, the device.
What cannot be used is removed. What cannot be written turns writing off, with a note: requests go on.

The thread that owns the device hands over bytes; another one writes them, in the same order, while it computes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import re
import stat
import struct
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from runner.cache.caches import Caches, keeps_all
from runner.cache.mark import Edge, Mark, Marks
from runner.checkpoint.safetensors_header import ShardHeader, read_header
from runner.checkpoint.shard_writer import bytes_of
from runner.engine.background import Background
from runner.engine.loaded import Loaded
from runner.errors import CheckpointError, UsageError
from runner.weights import loading

FORMAT = "runner prefix 1"
"""Of the files; to be changed with the meaning of what is in them, that of the arrays' numbers included."""

NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{48}\.safetensors")
ARRAY = re.compile(r"ids|(rows|mark)\.\d{1,5}\.\w{1,40}")
TEMPORARY = re.compile(r"\.[0-9a-f]{12}\.tmp")
LOCK = ".lock"

DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "I16": mx.int16}
SPELLED = {dtype: name for name, dtype in DTYPES.items()}

BROKEN = (CheckpointError, OSError, ValueError, KeyError, IndexError, TypeError, RecursionError)
"""What reading a file that somebody has changed may raise."""

QUEUED = 64 << 20
"""Bytes that wait to be written at most; then whoever computes waits for the disk."""

HEADER = 16 << 20
"""Bytes of a header at most: a model has some hundred arrays."""


@dataclass(eq=False)
class Stored:
    """A file that holds the rows of the tokens from `first` up to `last`, and whether the marks at its end.

    `waiting` is set until its writing has ended, `gone` once it turned out to be unusable, or could not be written.
    """

    path: Path
    first: int
    last: int
    marked: bool
    nbytes: int
    gone: bool = False
    waiting: bool = False


@dataclass(frozen=True)
class Listed:
    """What a look at a file tells: the key and the ids from the first token on."""

    key: Hashable
    ids: list[int]
    stored: Stored


class PrefixFiles:
    """The files of one model in a directory, which those of others may lie in, too."""

    def __init__(self, directory: Path, limit: int, fingerprint: str, empty: Caches) -> None:
        """Open a directory, which is made if need be, readable for its owner alone.

        Args:
            limit: bytes of all files in it at most, those of other models included; the oldest go first.
            fingerprint: of all that the numbers depend on, 64 hexadecimal digits.
            empty: caches of the model.

        Raises:
            UsageError: it cannot be made, is no directory, or others may write into it.
        """
        self.directory = directory
        self.limit = limit
        self.note: str | None = None
        self._disk = Background(QUEUED)
        self._fingerprint = fingerprint
        self._kinds = [keeps_all(cache) for cache in empty]
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = directory.stat()
        except OSError as error:
            raise UsageError(f"{directory}: cannot hold kept prefixes: {error.strerror or error}") from error
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise UsageError(
                f"{directory}: must be a directory of your own that nobody else may write into: chmod 700 it"
            )
        directory.chmod(0o700)

    # ---- looking

    def listed(self) -> list[Listed]:
        """This model's files, those first that were used longest ago; what is broken is removed."""
        found: list[tuple[int, Listed]] = []
        try:
            with self._locked():  # nobody is writing: what is half written is of a process that ended in the middle
                for path, _ in self._files():
                    if TEMPORARY.fullmatch(path.name):
                        self._remove(path)
        except OSError as error:
            self._give_up(error)
        for path, status in self._files():
            if path.name.startswith(self._fingerprint[:16]) and status.st_size <= self.limit:
                try:
                    found.append((status.st_mtime_ns, self._look(path)))
                except BROKEN:
                    self._remove(path)
        return [one for _, one in sorted(found, key=lambda pair: pair[0])]

    def _look(self, path: Path) -> Listed:
        """What a file says of itself, checked; its arrays are not read.

        Raises:
            one of `BROKEN`: it is broken, or not what its name says.
        """
        header = self._header(path)
        first, key = int(header.metadata["first"]), header.metadata["key"]
        info = header.tensors.get("ids")
        if info is None or info.dtype != "I32" or len(info.shape) != 1:
            raise ValueError("no ids")
        with path.open("rb") as file:
            file.seek(info.offset)
            ids = np.frombuffer(file.read(info.nbytes), np.int32).tolist()
        if not 0 <= first < len(ids) or path.name != self._name(key, first, ids):
            raise ValueError("under another name")
        marked = header.metadata["marked"] == "yes"
        held = _hashable(json.loads(key))
        hash(held)
        return Listed(held, ids, Stored(path, first, len(ids), marked, header.stamp.size))

    def _header(self, path: Path) -> ShardHeader:
        """The checked header of a file of this model that is no link.

        Raises:
            one of `BROKEN`: it cannot be trusted.
        """
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError("no plain file")
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if length > HEADER:
            raise ValueError("too large a header")
        header = read_header(path)
        wrong = [info for info in header.tensors.values() if info.name != "ids" and info.dtype not in DTYPES]
        if wrong or not all(ARRAY.fullmatch(name) for name in header.tensors):
            raise ValueError("holds something else")
        if (header.metadata["format"], header.metadata["fingerprint"]) != (FORMAT, self._fingerprint):
            raise ValueError("of another model or version")
        return header

    # ---- reading

    def read(self, stored: Stored) -> tuple[Edge, Marks | None] | None:
        """The rows and the marks of a file; None: it is gone or broken, and will not be asked for again."""
        if stored.waiting:
            self._disk.wait()
        try:
            if not stored.gone:
                found = self._read(stored)
                self.touch(stored)
                return found
        except BROKEN:
            self._remove(stored.path)
        stored.gone = True
        return None

    def _read(self, stored: Stored) -> tuple[Edge, Marks | None]:
        header = self._header(stored.path)
        if header.stamp.size != stored.nbytes or header.metadata["first"] != str(stored.first):
            raise ValueError("changed")
        checksum = hashlib.sha256()
        arrays: dict[str, mx.array] = {}
        with stored.path.open("rb") as file:
            for info in header.tensors.values():
                file.seek(info.offset)
                data = file.read(info.nbytes)
                checksum.update(data)
                if info.name != "ids":
                    numbers = mx.array(np.frombuffer(data, np.uint8))
                    arrays[info.name] = numbers.view(DTYPES[info.dtype]).reshape(info.shape)
        if checksum.hexdigest() != header.metadata["sha256"]:
            raise ValueError("the checksum is another")
        rows: list[dict[str, mx.array]] = [{} for _ in self._kinds]
        marks: list[dict[str, mx.array]] = [{} for _ in self._kinds]
        for name, array in arrays.items():
            part, index, of = name.split(".", 2)
            {"rows": rows, "mark": marks}[part][int(index)][of] = array
        mx.eval(list(arrays.values()))
        edge = Edge(stored.first, stored.last, tuple(rows))
        if not stored.marked:
            return edge, None
        return edge, Marks(stored.last, tuple(Mark(stored.last, mark) for mark in marks))

    # ---- writing

    def write(
        self, key: Hashable, ids: Sequence[int], edge: Edge, marks: Marks | None, room: int | None = None
    ) -> Stored | None:
        """Have the rows of the last of `ids` written, and the marks at their end; it turns out later if that fails.

        Returns:
            None where it would take more than `room` bytes, or than the limit allows.
        """
        if self.note is not None:
            return None
        told = json.dumps(key)
        path = self.directory / self._name(told, edge.first, list(ids))
        arrays = {"ids": mx.array(list(ids), dtype=mx.int32)}
        arrays |= {f"rows.{at}.{name}": array for at, rows in enumerate(edge.rows) for name, array in rows.items()}
        if marks is not None:
            parts = enumerate(mark.arrays for mark in marks.marks)
            arrays |= {f"mark.{at}.{name}": array for at, mark in parts for name, array in mark.items()}
        about = {
            "format": FORMAT, "fingerprint": self._fingerprint, "key": told, "first": str(edge.first),
            "marked": "no" if marks is None else "yes",  # a mark where a chunk begins holds nothing
            "sha256": "0" * 64,
        }  # fmt: skip
        shapes = {name: (array.dtype, array.shape, array.nbytes) for name, array in arrays.items()}
        nbytes = len(_encoded(shapes, about)) + sum(array.nbytes for array in arrays.values())
        if nbytes > self.limit or (room is not None and nbytes > room):
            return None
        # Copies, made here: the other thread knows nothing of MLX.
        buffers = [bytes(bytes_of(_copied(array))) for array in arrays.values()]
        stored = Stored(path, edge.first, edge.last, marks is not None, nbytes, waiting=True)

        def job() -> None:
            try:
                checksum = hashlib.sha256()
                for buffer in buffers:
                    checksum.update(buffer)
                header = _encoded(shapes, {**about, "sha256": checksum.hexdigest()})
                if self.note is None:
                    with self._locked():
                        stored.gone = not self._make_room(nbytes)
                        if not stored.gone:
                            self._write(path, [header, *buffers])
                else:
                    stored.gone = True
            except OSError as error:
                stored.gone = True
                self._give_up(error)
            finally:
                stored.waiting = False

        self._disk.put(nbytes, job)
        return stored

    def finish(self) -> None:
        """Wait until all is written."""
        self._disk.wait()

    def _write(self, path: Path, buffers: Sequence[bytes]) -> None:
        """Put a file in its place; a crash at any moment leaves all of it or nothing."""
        temporary = self.directory / f".{os.urandom(6).hex()}.tmp"
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                for buffer in buffers:
                    file.write(buffer)
                file.flush()
                os.fsync(file.fileno())  # else the rename could reach the disk before the bytes
            temporary.replace(path)
            handle = os.open(self.directory, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, nbytes: int) -> bool:
        """Remove the files that were used longest ago, until `nbytes` more are within the limit."""
        if nbytes > self.limit:
            return False
        files = sorted(self._files(), key=lambda pair: pair[1].st_mtime_ns)
        held = sum(status.st_size for _, status in files)
        for path, status in files:
            if held + nbytes <= self.limit:
                break
            path.unlink(missing_ok=True)
            held -= status.st_size
        return held + nbytes <= self.limit

    # ---- the directory

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """The directory's plain files that have a name of ours."""
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if NAME.fullmatch(entry.name) or TEMPORARY.fullmatch(entry.name):
                    with contextlib.suppress(OSError):
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode):
                            yield self.directory / entry.name, status

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from making room at the same time."""
        import fcntl  # absent where files have no such locks

        handle = os.open(self.directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _name(self, key: str, first: int, ids: list[int]) -> str:
        """A file's name: the model's fingerprint, and a digest of the key, the ids and which of them have rows."""
        digest = hashlib.sha256(f"{self._fingerprint} {key} {first} ".encode() + np.array(ids, np.int64).tobytes())
        return f"{self._fingerprint[:16]}-{digest.hexdigest()[:48]}.safetensors"

    def touch(self, stored: Stored) -> None:
        """Let a file be the last to go."""
        if stored.waiting:
            self._disk.put(0, lambda: self._touch(stored))
        else:
            self._touch(stored)

    def _touch(self, stored: Stored) -> None:
        with contextlib.suppress(OSError):
            os.utime(stored.path)

    def remove(self, stored: Stored) -> None:
        """Remove a file that nothing can begin with, once it is written."""
        if stored.waiting:
            self._disk.put(0, lambda: self._remove(stored.path))
        else:
            self._remove(stored.path)

    def _give_up(self, error: OSError) -> None:
        """Write no more from now on."""
        why = error.strerror or str(error)
        self.note = f"{self.directory}: cannot be written, so that no more prefixes are kept there: {why}"
        logging.getLogger(__name__).warning(self.note)

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()


def fingerprint(loaded: Loaded) -> str:
    """A digest of all that the rows of a prompt depend on: every weight, those of adapters included, is read.

    Takes a second for each 1 to 2 GB.
    """
    found = hashlib.sha256()
    device = loaded.device
    storage = "as they come" if loaded.storage is device.ops.storage else "dense"
    versions = (FORMAT, metadata.version("mlx-runner"), vars(mx)["__version__"])
    # The name of the operations tells how activations are rounded.
    computed = (device.name.split(",")[0], device.ops.name, loaded.dtype)
    found.update(repr((versions, computed, storage, loaded.config)).encode())
    for name, array in loading.arrays(loaded.model):
        found.update(f"{name} {array.dtype} {array.shape} ".encode())
        found.update(bytes_of(_copied(array)))
    if loaded.adapters is not None:
        from runner.adapters.layers import factors  # not for those who have none

        for name, number in factors(loaded.model):
            found.update(f"{name} ".encode())
            found.update(bytes_of(_copied(number)) if isinstance(number, mx.array) else repr(number).encode())
    return found.hexdigest()


def _copied(array: mx.array) -> mx.array:
    """The bytes of an array, in memory of their own: one that the host reads may move, and kernels know its place."""
    return array.flatten().view(mx.uint8) + 0


def _encoded(arrays: dict[str, tuple[mx.Dtype, tuple[int, ...], int]], about: dict[str, str]) -> bytes:
    """The header of a safetensors file with arrays of these dtypes, shapes and bytes, and `about` as its metadata."""
    ends = itertools.accumulate((nbytes for _, _, nbytes in arrays.values()), initial=0)
    entries: dict[str, Any] = {"__metadata__": about}
    for (name, (kind, shape, _)), (begin, end) in zip(arrays.items(), itertools.pairwise(ends), strict=True):
        dtype = "I32" if name == "ids" else SPELLED[kind]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (math.ceil(len(text) / 8) * 8 - len(text))
    return struct.pack("<Q", len(text)) + text


def _hashable(key: Any) -> Hashable:
    """A key as it was before it was written: tuples, where JSON has lists."""
    return tuple(_hashable(item) for item in key) if isinstance(key, list) else key
