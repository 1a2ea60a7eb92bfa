"""Files that a user's account has of this program: where they lie, and tables written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from runner.errors import CheckpointError, RunnerError, UsageError, UserFileError
from runner.local_files import read_json

FOLDER = "runner"
MAX_TABLE = 4 << 20
"""Bytes of the longest table that is read."""


def data_directory() -> Path:
    """The directory for what the program keeps for the user: names, histories; it need not exist.

    `$XDG_DATA_HOME/runner`, which is `~/.local/share/runner` where the variable is not set, and
    `~/Library/Application Support/runner` on a Mac (https://specifications.freedesktop.org/basedir-spec; that variable
    counts on a Mac too). Relative without a home directory: nothing is written then.
    """
    return _directory("XDG_DATA_HOME", ".local/share")


def config_directory() -> Path:
    """The directory for what the user tells the program; as `data_directory`, from XDG_CONFIG_HOME and `~/.config`."""
    return _directory("XDG_CONFIG_HOME", ".config")


def _directory(variable: str, usual: str) -> Path:
    named = os.environ.get(variable, "")
    if os.path.isabs(named):  # the specification has relative ones ignored
        return Path(named) / FOLDER
    return Path(os.path.expanduser("~"), "Library/Application Support" if sys.platform == "darwin" else usual, FOLDER)


def read_table(path: Path) -> dict[str, Any]:
    """The JSON object in a table's file, `{}` where there is no file.

    Raises:
        UserFileError: the file cannot be read or is damaged; the message names it.
    """
    try:
        return read_json(path, MAX_TABLE) if os.path.lexists(path) else {}
    except CheckpointError as error:
        raise UserFileError(
            f"{error} (a file of runner's own: repair it, or remove it and lose what it says)"
        ) from error


def change_table(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Let `change` edit the table in the file `path`, and replace the file; after an error the old one stays.

    Of processes that change a table at once each edits what the one before has written. Readers need no lock: they
    find the table of before or of after. Nobody but the user can read the file.

    Raises:
        UserFileError: the file is damaged, or cannot be written.
        UsageError: there is no home directory to write to.
    """
    if not path.is_absolute():
        raise UsageError("there is no home directory to keep names in: set HOME, or XDG_DATA_HOME to a directory")
    path = Path(os.path.realpath(path))  # a link to it, as managers of dotfiles make them, stays one
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(path.with_name(f".{path.name}.lock")):
            table = read_table(path)
            change(table)
            _replace(path, json.dumps(table, indent=2, ensure_ascii=False) + "\n")
    except RunnerError:
        raise
    except OSError as error:
        raise UserFileError(f"{error.filename or path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`. It is never removed: who waits for a removed one holds another than the next one."""
    import fcntl

    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # which gives the lock back


def _replace(path: Path, text: str) -> None:
    """Put a file with `text` in the place of `path`; a crash at any moment leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else the rename could reach the disk before the text
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
