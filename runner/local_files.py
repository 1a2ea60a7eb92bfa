"""Opens the files of a model directory that comes from strangers: safe names, no links out of it, strict JSON.

Every reader of such a file gets its path from `path_in`, `find_file` or `checked_path`, or its bytes from `read_file`.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from runner.errors import CheckpointError

MAX_DEPTH = 64  # levels of nesting in a JSON file
MAX_DIGITS = 64  # tokenizer configs hold 10**30 as "no limit"; nothing needs more


def quoted(text: str, limit: int = 120) -> str:
    """Quote `text` for a message: control characters are escaped and the length is bounded."""
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def is_plain_name(name: str) -> bool:
    """Whether `name` is the name of a file on any system: without separators, drive, `..` and control characters."""
    return (
        name not in ("", ".", "..")
        and name.isprintable()
        and PurePosixPath(name).name == name
        and PureWindowsPath(name).name == name
    )


def path_in(directory: Path, name: str) -> Path:
    """Return the path of the file `name` in `directory` itself.

    A link may point inside the directory, or into `blobs` of the same model in the hub's cache
    (`models--org--name/snapshots/COMMIT/file -> ../../blobs/HASH`).

    Raises:
        CheckpointError: `name` is not a plain file name, or the file is missing, is not a regular file, or is a link
            that leads out of these places.
    """
    if not is_plain_name(name):
        raise CheckpointError(f"{directory}: {quoted(name)} is not a plain file name; refusing to follow it")
    return checked_path(directory, directory / name)


def find_file(directory: Path, name: str) -> Path | None:
    """Return `path_in(directory, name)`, or None if the directory has no entry of this name.

    Raises:
        CheckpointError: there is an entry, but it is not a file that may be read (a dangling link is an entry).
    """
    return path_in(directory, name) if os.path.lexists(directory / name) else None


def checked_path(directory: Path, path: Path) -> Path:
    """Return `path` if it is a regular file in `directory` or a folder of it, and no link out, as in `path_in`.

    Raises:
        CheckpointError: it is not.
    """
    # A snapshot in the hub's cache, or a folder of it, consists of links into the blobs beside it.
    home = directory.resolve()
    roots = [home]
    for folder in (home, *home.parents):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            roots.append(folder.parent.parent / "blobs")
    # Links are resolved before anything is compared, so that no chain of links and no `..` can lead out unseen.
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise CheckpointError(f"{path}: {_reason(error, path)}") from error
    if not any(real.is_relative_to(root) for root in roots):
        raise CheckpointError(
            f"{path}: links to {real}, outside the model's directory; refusing to follow it "
            "(put the file itself there, or name the directory that holds it)"
        )
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a regular file")
    return path


def _reason(error: Exception, path: Path) -> str:
    """Why `path` could not be resolved, in words."""
    if isinstance(error, FileNotFoundError):
        if not path.is_symlink():
            return "no such file"
        target = os.readlink(path)
        annexed = "annex/objects/" in target
        return f"a link to a file that does not exist{': run `git annex get` there' if annexed else ''}"
    return (error.strerror or str(error)) if isinstance(error, OSError) else "a loop of links"


def is_gguf(path: Path) -> bool:
    """Whether a file's first bytes say that it is GGUF, whatever its name; False for what cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for a writer
            return False
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def read_file(path: Path, max_bytes: int) -> bytes:
    """Read a whole file of at most `max_bytes`; `path` comes from one of the functions above.

    Raises:
        CheckpointError: it cannot be read, is not a regular file, or is larger.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for a writer
            raise CheckpointError(f"{path}: not a regular file")
        with path.open("rb") as file:
            # No more than there is, since Python sets that much memory aside; one more than allowed tells an excess.
            data = file.read(min(os.fstat(file.fileno()).st_size, max_bytes) + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) > max_bytes:
        raise CheckpointError(f"{path}: larger than {max_bytes} bytes, the most this file may have")
    refuse_placeholder(path, data)
    return data


MAX_PLACEHOLDER = 1024
"""Bytes that a file in place of another has at most; Git LFS reads no longer ones."""

_LINK = re.compile(rb"(?:\.{1,2}[/\\])+[^\0\n]+\n?|[^\0\n]*[/\\]blobs[/\\][0-9a-f]{40,64}\s*")
_ANNEX = re.compile(rb"[^\0\n]*[/\\]annex[/\\]objects[/\\][^\0]+")


def refuse_placeholder(path: Path, data: bytes) -> None:
    """Refuse a small file that only says where the contents of `path` are: a copy that was never completed.

    Args:
        data: the whole file, or more than its first `MAX_PLACEHOLDER` bytes.

    Raises:
        CheckpointError: naming what the file is, and how to get the contents.
    """
    if len(data) > MAX_PLACEHOLDER:
        return
    if data.startswith(b"version ") and b"git-lfs" in data[:100]:
        raise CheckpointError(f"{path}: a Git LFS pointer, not the file itself: run `git lfs pull` there")
    if data.startswith(b"# xet version"):
        raise CheckpointError(f"{path}: a Xet pointer, not the file itself: fetch it with `hf download` or git-xet")
    if _ANNEX.fullmatch(data):
        raise CheckpointError(f"{path}: a git-annex pointer, not the file itself: run `git annex get` there")
    if _LINK.fullmatch(data):
        target = quoted(data.decode("utf-8", "replace").strip())
        raise CheckpointError(
            f"{path}: holds {target} as text: a symbolic link that was copied or checked out as a file. Copy the model "
            "with links followed (cp -L, rsync -L), or let git make them (git config core.symlinks true, then "
            "git checkout -- .), or fetch it again"
        )


def read_json(path: Path, max_bytes: int = 16 << 20) -> dict[str, Any]:
    """Read the JSON object in the file `path`, strictly.

    Refused are files of more than `max_bytes`, invalid UTF-8, a repeated key, NaN, nesting deeper than 64 levels,
    integers of more than 64 digits, unpaired surrogates, and anything but an object at the top. Infinity is accepted,
    because transformers writes it (`time_step_limit` of Mamba); a config class that reads a number must check that it
    is finite.

    Raises:
        CheckpointError: the file cannot be read or is refused; the message names the file and the problem.
    """
    return parse_json(read_file(path, max_bytes), str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Parse the bytes of a JSON object as strictly as `read_json`; error messages start with `where`."""
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant, parse_int=_bounded_int
        )
        _check_depth(value)
        if data.find(b"\\u") >= 0:  # only an escape can spell half a character
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{where}: a string holds an unpaired surrogate (half a character)") from error
    except RecursionError as error:
        raise CheckpointError(f"{where}: nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {_KINDS[type(value)]}")
    return value


_KINDS = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean", type(None): "null"}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these keys and values; refuses a repeated key, of which readers take the first or the last."""
    result = dict(pairs)
    if len(result) != len(pairs):
        again = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {quoted(again)} appears twice in one object")
    return result


def _constant(name: str) -> float:
    """Value of `Infinity` or `-Infinity`; refuses `NaN`."""
    if name == "NaN":
        raise ValueError("it has the number NaN, which no setting can mean")
    return float(name)


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it has an integer of {len(digits)} digits, more than {MAX_DIGITS}")
    return int(digits)


def _check_depth(value: object) -> None:
    """Refuse deep nesting, level by level, since a recursive check could itself go too deep."""
    level, depth = [value], 0
    while level := [
        child
        for item in level
        if isinstance(item, dict | list)
        for child in (item.values() if isinstance(item, dict) else item)
    ]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
