"""Deletes models that this program stored: the files it wrote, and nothing that came beside them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from runner.checkpoint.kept import BEGUN, Kept, forget, forget_begun, read_names
from runner.errors import HubError, UserFileError


def remove(path: Path, kept: Kept) -> list[str]:
    """Delete the files of a stored model, its directory where nothing else is in it, and what the table says of it.

    In the hub's cache the blobs that the files link to go too, unless another snapshot has them.

    Args:
        path: the model's directory or GGUF file, as in the table of names; of a download that was stopped and is not
            in the table, the folder `blobs`.

    Returns:
        Names of what else is in the directory, which stays; sorted.

    Raises:
        HubError: another process downloads the model now.
        UserFileError: a file cannot be deleted, or a link stands in the place of the model's directory.
    """
    if kept.by == BEGUN:
        try:
            _remove_begun(path, kept)
        except HubError:  # an OSError too
            raise
        except OSError as error:
            raise UserFileError(f"{error.filename}: cannot be deleted: {error.strerror or error}") from error
        forget_begun(path)
        return []
    directory, files = (path, kept.files) if kept.by == "convert" else _in_snapshot(path, kept)
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


def _in_snapshot(path: Path, kept: Kept) -> tuple[Path, Sequence[str]]:
    """The snapshot that a model of the hub is in, and the model's files relative to it: GGUF may be in a folder."""
    snapshot = next(each for each in (path, *path.parents) if each.parent.name == "snapshots")
    folder = path.parent if path != snapshot else snapshot
    return snapshot, [(folder / file).relative_to(snapshot).as_posix() for file in kept.files]


def _remove_begun(path: Path, kept: Kept) -> None:
    """Delete what has come of a download: blobs, whole or not, that are not linked to yet, and the links there are."""
    from runner.checkpoint.downloading import PARTIAL, not_downloaded

    repository = next(each for each in (path, *path.parents) if each.name.startswith("models--"))
    begun = read_names().begun
    others = {blob for other in begun if other != path and repository in other.parents for blob in begun[other].blobs}
    with not_downloaded(repository, kept.blobs):
        if kept.files:
            snapshot, files = _in_snapshot(path, kept)
            _remove_links(snapshot, files)
            _prune(snapshot, files)
        linked = {blob.name for blob in _linked(repository)}
        for blob in set(kept.blobs) - others - linked:
            for name in (blob, f"{blob}{PARTIAL}"):
                (repository / "blobs" / name).unlink(missing_ok=True)
    if kept.files and not snapshot.exists():
        _forget_commit(snapshot)


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
    for blob in gone - _linked(repository):
        if blob.parent == blobs:  # a link that leads elsewhere is no blob of ours
            blob.unlink(missing_ok=True)


def _linked(repository: Path) -> set[Path]:
    """What the snapshots of a repository link to."""
    links = [link for link in (repository / "snapshots").rglob("*") if link.is_symlink()]
    return {Path(os.path.normpath(link.parent / os.readlink(link))) for link in links}


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
