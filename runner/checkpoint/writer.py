"""Writing a model directory: completely or not at all, with one shard in memory at a time."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from runner.checkpoint.safetensors_header import read_header
from runner.errors import CheckpointError, UsageError
from runner.local_files import is_plain_name, parse_json, quoted

if TYPE_CHECKING:
    import mlx.core as mx


def write_checkpoint(
    directory: Path,
    tensors: Iterable[tuple[str, mx.array]],
    config: dict[str, Any],
    extra_files: Mapping[str, bytes | str] = {},
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write `config.json`, the weights and other files as a directory that `Checkpoint.open` reads back unchanged.

    The files are written to a hidden sibling of `directory`, which is renamed once complete; after an error nothing is
    left behind. `tensors` is consumed once, and a shard's tensors are released as soon as it is written. One shard
    becomes `model.safetensors`, several become `model-00001-of-0000N.safetensors` with an index.

    Args:
        directory: must not exist, or must be an empty directory; missing parents are created.
        extra_files: contents by name; a name may include folders (`additional_chat_templates/rag.jinja`).
        max_shard_bytes: tensor bytes per shard; a larger tensor gets a shard to itself.

    Raises:
        CheckpointError: `directory` exists and is not empty, a name is repeated or unsafe, `tensors` is empty, or the
            disk cannot be written.
        UsageError: `max_shard_bytes` is below 1.
    """
    if max_shard_bytes < 1:
        raise UsageError(f"max_shard_bytes is {max_shard_bytes}; expected at least 1")
    with new_directory(directory, config, extra_files) as temporary:
        _Shards(temporary, max_shard_bytes).write(tensors)


@contextlib.contextmanager
def new_directory(directory: Path, config: dict[str, Any], extra_files: Mapping[str, bytes | str]) -> Iterator[Path]:
    """Yield a hidden sibling of `directory` that has all files but the weights, for the caller to write them there.

    On leaving the context it is renamed to `directory`; after an error it is removed, as is first what a killed process
    left of an earlier one. Arguments and errors are those of `write_checkpoint`.
    """
    target = Path(directory).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{directory}: already exists and is not an empty directory; choose another or remove it")
    # Config and file names are checked before anything is written.
    contents: dict[str, bytes | str] = {"config.json": _config_text(config), **_checked(extra_files)}
    # A sibling, so that both are on one disk and the rename is atomic.
    temporary = target.parent / f".{target.name}.{secrets.token_hex(6)}.tmp"
    lock: int | None = None
    try:
        try:
            _remove_stale(target)
            temporary.mkdir(parents=True)
            lock = _lock(temporary)
            for name, content in contents.items():
                file = temporary / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        except OSError as error:
            raise CheckpointError(f"{directory}: cannot be written: {error.strerror or error}") from error
        yield temporary
        try:
            _settle(temporary)
            temporary.rename(target)  # replaces an empty directory, fails if it was filled meanwhile
            _settle_one(target.parent)
        except OSError as error:
            raise CheckpointError(f"{directory}: cannot be put in place: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_stale(target: Path) -> None:
    """Remove what killed processes left of this directory; who still writes one holds its lock."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        ours = re.fullmatch(r"[0-9a-f]{12}", path.name[len(target.name) + 2 : -len(".tmp")])
        if ours and not path.is_symlink() and (lock := _lock(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _lock(directory: Path) -> int | None:
    """Lock a directory until the number that is returned is closed; None where another has, or disks have no locks."""
    import fcntl

    number = None
    try:
        number = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if number is not None:
            os.close(number)
        return None
    return number


def _settle(directory: Path) -> None:
    """Have the disk take all that is in a directory, else its new name could be there before its contents."""
    for path in (*directory.rglob("*"), directory):
        _settle_one(path)


def _settle_one(path: Path) -> None:
    # Some disks and systems do so by themselves for directories, and refuse to be asked.
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _config_text(config: dict[str, Any]) -> str:
    """The text of `config.json`, tried with the parser that will read it back."""
    try:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        parse_json(text.encode("utf-8"), "config")  # refuses what `json.dumps` accepts, such as NaN
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config cannot be written as JSON that reads back: {error}") from error
    return text


def _checked(extra_files: Mapping[str, bytes | str]) -> dict[str, bytes | str]:
    """`extra_files`, after refusing names that lead elsewhere or collide with each other or with our own files."""
    for name in extra_files:
        if not name or not all(is_plain_name(part) for part in name.split("/")):
            raise CheckpointError(f"extra file {quoted(name)}: not a plain relative file name")
        if name == "config.json" or name.endswith((".safetensors", ".safetensors.index.json")):
            raise CheckpointError(f"extra file {quoted(name)}: write_checkpoint writes this file itself")
        if any(str(parent) in extra_files for parent in PurePosixPath(name).parents):
            raise CheckpointError(f"extra file {quoted(name)}: its folder has the name of another extra file")
    return dict(extra_files)


class _Shards:
    """Collects tensors into shards and writes each shard when it is full."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self.batch: dict[str, mx.array] = {}
        self.batch_bytes = 0
        self.names: list[list[str]] = []
        self.total = 0

    def write(self, tensors: Iterable[tuple[str, mx.array]]) -> None:
        """Write all tensors, and the index if one is needed."""
        seen: set[str] = set()
        for name, array in tensors:
            if name in seen or name == "__metadata__":
                raise CheckpointError(f"tensor {quoted(name)} comes twice, or has the name that safetensors reserves")
            seen.add(name)
            # Only here is an array's size known, so a shard is full when the next tensor does not fit.
            if self.batch and self.batch_bytes + array.nbytes > self.max_bytes:
                self.flush()
            self.batch[name] = array
            self.batch_bytes += array.nbytes
        if not seen:
            raise CheckpointError("no tensors to write")
        del array  # otherwise the loop variable would keep the last tensor alive after its shard is written
        self.flush()
        self.finish()

    def path(self, number: int) -> Path:
        """Path of a shard until `finish`: its final name needs the number of shards."""
        return self.directory / f"model-{number:05d}.safetensors"

    def flush(self) -> None:
        """Write the collected tensors as the next shard, check the file, and release them."""
        import mlx.core as mx

        path = self.path(len(self.names) + 1)
        try:
            mx.save_safetensors(str(path), self.batch, {"format": "mlx"})
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path.name}: cannot be written: {error}") from error
        found = read_header(path).tensors  # a full disk may go unnoticed until here
        for name, array in self.batch.items():
            if name not in found or found[name].shape != array.shape or found[name].nbytes != array.nbytes:
                raise CheckpointError(f"{path.name}: tensor {quoted(name)} was not written whole; is the disk full?")
        self.names.append(list(self.batch))
        self.total += self.batch_bytes
        self.batch, self.batch_bytes = {}, 0

    def finish(self) -> None:
        """Give the shards their final names, and write the index if there is more than one."""
        count = len(self.names)
        if count == 1:
            self.path(1).rename(self.directory / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.names, 1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            os.rename(self.path(number), self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        (self.directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
