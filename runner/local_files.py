"""Reading small files of a model directory that nobody vouches for: safe names, no links out, strict JSON."""

from __future__ import annotations

import json
import stat
from collections import Counter
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from runner.errors import CheckpointError

MAX_DEPTH = 64
MAX_DIGITS = 64  # tokenizer configs hold 10**30 as "no limit"; nothing needs more


def quoted(text: str, limit: int = 120) -> str:
    """`text` quoted for a message: control characters escaped, length bounded."""
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def is_plain_name(name: str) -> bool:
    """Whether `name` is one file's name on any system: no separator, drive, `..` or control character."""
    return (
        name not in ("", ".", "..")
        and name.isprintable()
        and PurePosixPath(name).name == name
        and PureWindowsPath(name).name == name
    )


def path_in(directory: Path, name: str) -> Path:
    """The path of a file that lies in `directory` itself.

    A link is followed where it stays inside the directory, or inside `blobs` of the same model in the hub's cache
    (`models--org--name/snapshots/COMMIT/file -> ../../blobs/HASH`).

    Raises:
        CheckpointError: not a plain file name, a missing file, not a regular file, or a link that leads out.
    """
    if not is_plain_name(name):
        raise CheckpointError(f"{directory}: {quoted(name)} is not a plain file name; refusing to follow it")
    return checked_path(directory, directory / name)


def checked_path(directory: Path, path: Path) -> Path:
    """`path` itself, a regular file that lies in `directory` or a folder of it, as `path_in` demands."""
    home = directory.resolve()
    roots = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        roots.append(home.parent.parent / "blobs")
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
    if isinstance(error, FileNotFoundError):
        return "a link to a file that does not exist" if path.is_symlink() else "no such file"
    return (error.strerror or str(error)) if isinstance(error, OSError) else "a loop of links"


def read_json(path: Path, max_bytes: int = 16 << 20) -> dict[str, Any]:
    """The JSON object in `path`, strictly read.

    Refused: more than `max_bytes`, invalid UTF-8, a repeated key, NaN, nesting deeper than 64, integers beyond 64
    digits, unpaired surrogates, and anything but an object at the top. Infinity is accepted, because transformers
    writes it (`time_step_limit` of Mamba); a config class that takes a number must check that it is finite.

    Raises:
        CheckpointError: naming the file and the problem.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for a writer
            raise CheckpointError(f"{path}: not a regular file")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) > max_bytes:
        raise CheckpointError(f"{path}: larger than {max_bytes} bytes, the most this file may have")
    return parse_json(data, str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """`read_json` of bytes; `where` begins the message of an error."""
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
    result = dict(pairs)
    if len(result) != len(pairs):
        again = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {quoted(again)} appears twice in one object")
    return result


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN, which no setting can mean")
    return float(name)


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _check_depth(value: object) -> None:
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
