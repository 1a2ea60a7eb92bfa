"""Deletes models that this program stored: the files it wrote, and nothing that came beside them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from runner.checkpoint.kept import UNFINISHED, Kept, forget
from runner.errors import UserFileError


def remove(path: Path, kept: Kept) -> list[str]:
    """Delete the files of a stored model, its directory where nothing else is in it, and what the table says of it.

    In the hub's cache the blobs that the files link to go too, unless another snapshot has them.

    Args:
        path: the model's directory or GGUF file, as in the table of names; of a download that was stopped, the
            directory of its files.

    Returns:
        Names of what else is in the directory, which stays; sorted.

    Raises:
        UserFileError: a file cannot be deleted, or a link stands in the place of the model's directory.
    """
    if kept.by == UNFINISHED:
        for file in kept.files:
            (path / file).unlink(missing_ok=True)
        return []
    directory = path.parent if path.is_file() else path
    files: Sequence[str] = kept.files
    if kept.by == "hub":  # a GGUF file may be in a folder of the snapshot
        folder = directory
        directory = next(each for each in (directory, *directory.parents) if each.parent.name == "snapshots")
        files = [(folder / file).relative_to(directory).as_posix() for file in files]
    if directory.is_symlink():
        raise UserFileError(
            f"{directory}: a link, and not the directory that was written: delete what it leads to yourself"
        )
    try:
        if kept.by == "hub":
            _remove_links(directory, files)
        else:
            for file in files:
                (directory / file).unlink(missing_ok=True)
        _prune(directory, files)
        rest = sorted(os.listdir(directory)) if directory.exists() else []
        if kept.by == "hub" and not directory.exists():
            _forget_commit(directory)
    except OSError as error:
        raise UserFileError(f"{error.filename}: cannot be deleted: {error.strerror or error}") from error
    forget(path)
    return rest


def _remove_links(snapshot: Path, files: Sequence[str]) -> None:
    """Delete a snapshot's files with their blobs, which other snapshots of the repository may share."""
    repository = snapshot.parent.parent
    blobs = repository / "blobs"
    gone = set()
    for file in files:
        link = snapshot / file
        if link.is_symlink():
            gone.add(Path(os.path.normpath(link.parent / os.readlink(link))))
        link.unlink(missing_ok=True)
    links = [link for link in (repository / "snapshots").rglob("*") if link.is_symlink()]
    shared = {Path(os.path.normpath(link.parent / os.readlink(link))) for link in links}
    for blob in gone - shared:
        if blob.parent == blobs:  # a link that leads elsewhere is no blob of ours
            blob.unlink(missing_ok=True)


def _prune(directory: Path, files: Sequence[str]) -> None:
    """Remove the folders that held `files`, and `directory`, where they are empty."""
    folders = {directory / parent for file in files for parent in Path(file).parents}
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _forget_commit(snapshot: Path) -> None:
    """Remove what the hub's cache notes of a commit whose snapshot is gone, and a repository's folder that is bare."""
    repository, commit = snapshot.parent.parent, snapshot.name
    for ref in [path for path in (repository / "refs").rglob("*") if path.is_file()]:
        if ref.read_text(encoding="ascii", errors="replace").strip() == commit:
            ref.unlink()
    shutil.rmtree(repository / ".no_exist" / commit, ignore_errors=True)
    bare = not any(os.listdir(repository / name) for name in ("snapshots", "blobs") if (repository / name).is_dir())
    if bare and repository.name.startswith("models--"):
        shutil.rmtree(repository, ignore_errors=True)
