"""The table of names: what aliases stand for, and which models this program stored itself.

It is `names.json` in the user's data directory:

    {"version": 1,
     "aliases": {"mine": "org/name@main", "small": "/home/me/models/small"},
     "stored": {"/me/small": {"by": "convert", "files": ["config.json"], "written": {"config.json": [9, 1764547]}}},
     "begun": {"/cache/models--org--name/snapshots/COMMIT": {"of": "org/name", "files": ["config.json"], "blobs": []}}}

`stored` is what `runner rm` may delete: the files of each model that `convert` wrote or that were fetched from the hub.
`written` has the size of each and the second it was written in: what is otherwise now is no more the program's.
`begun` is the same of downloads that have not ended, and maybe never will. A model's path is its directory or, of a
GGUF file, the file (the first where there are several).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import UsageError, UserFileError
from runner.local_files import quoted
from runner.user_files import change_table, data_directory, read_table

VERSION = 1
STORED_BY = ("convert", "hub")
BEGUN = "begun"
"""What stored the files of a download that has not ended."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SNAPSHOT = re.compile(r"/models--[^/]+/snapshots/[^/]+(/|$)")
_BLOB = re.compile(r"[0-9a-f]{40,64}")
_RESERVED = ("shape", "hf.co", "huggingface.co")
EXAMPLES = "letters, digits, '.', '_' and '-', at most 64"


@dataclass(frozen=True)
class Kept:
    """What the table says of a model that this program stored.

    Attributes:
        by: "convert", "hub" or `BEGUN`: what stored it.
        files: its files, relative to its directory (for a GGUF file, the directory that the file is in).
        blobs: of a download that has not ended, names of what it fetches into the cache's `blobs`.
        of: of such a download, the hub id that was asked for.
    """

    by: str
    files: tuple[str, ...]
    blobs: tuple[str, ...] = ()
    of: str = ""


@dataclass(frozen=True)
class Names:
    """The table as it was read.

    Attributes:
        aliases: hub ids and absolute paths, by the name that stands for them.
        stored: models by `place`; those that are gone are left out.
        begun: downloads that have not ended, by the `place` that the model is to have.
    """

    aliases: dict[str, str]
    stored: dict[Path, Kept]
    begun: dict[Path, Kept]


def place(path: str | Path) -> Path:
    """The one path of a model that has several, through links, `..` or from the current directory: as the table has it.

    The links that a hub's cache consists of are left as they are: they say which repository and file it is.
    """
    whole = os.path.join("" if os.path.isabs(path) else os.getcwd(), path)
    found = _SNAPSHOT.search(whole)
    if found is None or ".." in whole[found.start() :].split("/"):
        return Path(os.path.realpath(whole))
    return Path(os.path.realpath(whole[: found.start()]) + whole[found.start() :])


def _place_of(key: str) -> Path:
    """The path of a model in the table, whose surroundings may be links by now; a link in its own place is none."""
    return place(key) if _SNAPSHOT.search(key) else place(os.path.dirname(key)) / os.path.basename(key)


def _drop(models: dict[str, Any], path: Path) -> None:
    """Remove the model of a path from a part of the table."""
    for key in [key for key in models if _place_of(key) == place(path)]:
        del models[key]


def table_path() -> Path:
    """Where the table lies."""
    return data_directory() / "names.json"


def read_names() -> Names:
    """Read the table; an absent one is empty.

    Raises:
        UserFileError: it is damaged, or a newer version wrote it.
    """
    table = _checked(read_table(table_path()))
    stored = {_place_of(path): _kept(_place_of(path), entry) for path, entry in table["stored"].items()}
    begun = {
        _place_of(path): Kept(BEGUN, tuple(entry["files"]), tuple(entry["blobs"]), entry["of"])
        for path, entry in table["begun"].items()
    }
    return Names(table["aliases"], {path: kept for path, kept in stored.items() if path.exists() and kept.files}, begun)


def _kept(path: Path, entry: dict[str, Any]) -> Kept:
    """A stored model with those of its files that are there as this program left them, if the table says how."""
    files, written = entry["files"], entry.get("written")
    if written is not None:
        files = [file for file in files if file in written and _state(path, file) == written[file]]
    return Kept(entry["by"], tuple(files))


def _state(path: Path, file: str) -> list[int] | None:
    """Size of a model's file, and the second it was written in; of the link in a hub's snapshot. None: it is not there.

    Copies keep both where they keep times; numbers of files and disks change when a disk is mounted again.
    """
    try:
        found = ((path if path.is_dir() else path.parent) / file).lstat()
    except OSError:
        return None
    return [found.st_size, int(found.st_mtime)]


def check_alias(name: str) -> str:
    """Return `name` if it may be an alias.

    Without a slash, an alias cannot hide a hub id, nor a path that is written as one.

    Raises:
        UsageError: it may not.
    """
    if not _NAME.fullmatch(name) or name in _RESERVED or name.endswith(".gguf"):
        raise UsageError(f"{quoted(name)} cannot be an alias: it takes {EXAMPLES}, and does not end in .gguf")
    return name


def set_alias(name: str, target: str) -> None:
    """Let `name` stand for `target`, a hub id or an absolute path, from now on.

    Raises:
        UsageError: `name` may not be an alias.
        UserFileError: the table is damaged or cannot be written.
    """
    check_alias(name)
    _change(lambda table: table["aliases"].update({name: target}))


def drop_alias(name: str) -> None:
    """Let `name` stand for nothing."""
    _change(lambda table: table["aliases"].pop(name, None))


def keep(path: Path, by: str, files: Sequence[str]) -> None:
    """Note that this program stored a model: `path` and `files` as in `Kept`.

    Raises:
        UserFileError: the table is damaged or cannot be written.
    """
    states = {file: _state(path, file) for file in sorted(files)}
    entry = {"by": by, "files": sorted(files), "written": {file: state for file, state in states.items() if state}}

    def edit(table: dict[str, Any]) -> None:
        for part in ("stored", "begun"):
            _drop(table[part], path)
        table["stored"][str(place(path))] = entry

    _change(edit)


def try_to_keep(path: Path, by: str, files: Sequence[str]) -> None:
    """As `keep`, where a model must not fail for the table's sake: what cannot be noted `runner rm` will not delete."""
    with contextlib.suppress(UserFileError, UsageError):
        keep(path, by, files)


def try_to_begin(path: Path, of: str, files: Sequence[str], blobs: Sequence[str] = ()) -> None:
    """Note, before they come, what a download is to fetch; as `try_to_keep`, which ends it. Later calls add.

    Args:
        path: what the model is to have, as `files` and `blobs` as in `Kept`.
        of: the hub id that was asked for.
    """

    def edit(table: dict[str, Any]) -> None:
        known = table["begun"].get(str(place(path)), {"files": [], "blobs": []})
        wanted = {name: sorted({*known[name], *more}) for name, more in (("files", files), ("blobs", blobs))}
        table["begun"][str(place(path))] = {"of": of, **wanted}

    with contextlib.suppress(UserFileError, UsageError):
        _change(edit)


def forget(path: Path) -> None:
    """Remove what the table says of a model that is deleted."""
    _change(lambda table: _drop(table["stored"], path))


def forget_begun(path: Path) -> None:
    """Remove what the table says of a download that has not ended."""
    _change(lambda table: _drop(table["begun"], path))


def try_to_forget_begun(path: Path) -> None:
    """As `forget_begun`, where another program has ended a download."""
    with contextlib.suppress(UserFileError, UsageError):
        forget_begun(path)


def _change(change: Callable[[dict[str, Any]], object]) -> None:
    """Change the checked table, and drop what it says of models that are gone."""

    def edit(table: dict[str, Any]) -> None:
        _checked(table)
        for path in [path for path in table["stored"] if _is_gone(path)]:
            del table["stored"][path]
        # The files of these may be still to come, but the repository's folder is there soon.
        for path in [path for path in table["begun"] if _is_gone(path.partition("/snapshots/")[0])]:
            del table["begun"][path]
        change(table)

    change_table(table_path(), edit)


def _is_gone(path: str) -> bool:
    """Whether a model is no more, where its surroundings are: a disk that is not mounted will come again."""
    found = _SNAPSHOT.search(path)
    around = os.path.dirname(path) if found is None else path[: found.start()]
    return not os.path.lexists(path) and os.path.isdir(around)


def _checked(table: dict[str, Any]) -> dict[str, Any]:
    """The table with all its parts, after a check of each."""

    def damaged(what: str) -> UserFileError:
        return UserFileError(f"{table_path()}: {what}: repair it, or remove it and lose the names in it")

    version = table.setdefault("version", VERSION)
    if version != VERSION or isinstance(version, bool):
        raise UserFileError(
            f"{table_path()}: its version is {version!r}, and this runner reads {VERSION}: update runner"
        )
    aliases, stored, begun = (table.setdefault(part, {}) for part in ("aliases", "stored", "begun"))
    if not all(isinstance(part, dict) for part in (aliases, stored, begun)):
        raise damaged("'aliases', 'stored' and 'begun' must be objects")
    for name, target in aliases.items():
        if not _NAME.fullmatch(name) or not isinstance(target, str) or not target:
            raise damaged(f"the alias {quoted(name)} is not a name for a text")
    for path, kept in stored.items():
        right = isinstance(kept, dict) and kept.get("by") in STORED_BY and isinstance(kept.get("files"), list)
        right = right and isinstance(kept.get("written", {}), dict)
        right = right and (kept["by"] != "hub" or bool(_SNAPSHOT.search(path)))
        if not right or not os.path.isabs(path) or not all(_is_inside(file) for file in kept["files"]):
            raise damaged(f"what it says of {quoted(path)} is not understood")
    for path, entry in begun.items():
        right = os.path.isabs(path) and bool(_SNAPSHOT.search(path)) and isinstance(entry, dict)
        right = right and isinstance(entry.get("of"), str) and isinstance(entry.get("files"), list)
        right = right and isinstance(entry.get("blobs"), list) and all(_is_inside(file) for file in entry["files"])
        if not right or not all(isinstance(blob, str) and _BLOB.fullmatch(blob) for blob in entry["blobs"]):
            raise damaged(f"what it says of {quoted(path)} is not understood")
    return table


def _is_inside(file: Any) -> bool:
    """Whether `file` is a relative path that cannot lead out of a directory."""
    named = isinstance(file, str) and bool(file) and "\0" not in file
    return named and not os.path.isabs(file) and ".." not in file.split("/")
