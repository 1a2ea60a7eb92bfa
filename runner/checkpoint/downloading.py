"""Downloads weights into the hub's cache: where there is room for them, and from where an earlier run has come to.

`huggingface_hub` removes what it has of a file when a run ends, and starts again. Here a file grows in `blobs` under a
name of its own until it is whole; then it is a blob like any other, and `huggingface_hub` makes the link to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from runner.errors import HubError
from runner.local_files import quoted
from runner.progress import ProgressBar, Watched

AT_ONCE = 4
"""Files that are downloaded side by side."""

PARTIAL = ".runner.incomplete"
"""End of the names of files that are not whole yet."""

_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHA256_DIGITS = 64


@dataclass(frozen=True)
class _Blob:
    """A file to download.

    Attributes:
        path: where it is to be in the cache, named by its hash.
        size: bytes.
    """

    url: str
    path: Path
    size: int
    lock: Path

    @property
    def partial(self) -> Path:
        """Where its bytes are until there are all of them."""
        return self.path.with_name(f"{self.path.name}{PARTIAL}")

    @property
    def there(self) -> int:
        """Bytes that need not be downloaded any more."""
        if self.path.exists():
            return self.size
        return min(self.partial.stat().st_size, self.size) if self.partial.exists() else 0


def fetch_weights(
    repo: str, commit: str, files: Sequence[str], cache: Path, *, progress: Watched, begin: Callable[[list[str]], None]
) -> None:
    """Download the blobs of `files`, and go on with those that an earlier run began.

    Files that the hub describes in another way than by hash and size, or that plain HTTP cannot give for their size,
    are left out: `huggingface_hub` downloads those.

    Args:
        cache: the hub's cache; blobs come into `models--org--name/blobs` there.
        progress: show a bar with the rate and the time left on stderr; or what is told of it.
        begin: called before a byte comes, with the names of the blobs that are not there whole.

    Raises:
        HubError: the disk has no room for them, or what came is not the file that the hub has described.
        Exception: what `huggingface_hub` raises; what came before is kept.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        described = list(pool.map(lambda file: _describe(repo, commit, file, cache), files))
    blobs = list({blob.path: blob for blob in described if blob is not None}.values())
    total, there = sum(blob.size for blob in blobs), sum(blob.there for blob in blobs)
    _check_room(repo, total - there, cache)
    begin([blob.path.name for blob in blobs if not blob.path.exists()])
    with ProgressBar(f"fetching {repo}", enabled=progress, rate=True) as bar:
        counter = _Counter(bar, there, total)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            jobs = [pool.submit(_download, blob, counter) for blob in blobs]
            try:
                wait(jobs, return_when=FIRST_EXCEPTION)
            finally:  # after an error or Ctrl-C the others stop at their next piece
                counter.stopped = not all(job.done() and job.exception() is None for job in jobs)
                pool.shutdown(cancel_futures=True)
        for job in jobs:
            if not job.cancelled() and not isinstance(job.exception(), _Stopped):
                job.result()


def unfinished(repository: Path) -> list[Path]:
    """Files in a repository's folder of the cache that a stopped download left, to be gone on with; sorted."""
    return sorted((repository / "blobs").glob(f"*{PARTIAL}"))


@contextlib.contextmanager
def not_downloaded(repository: Path, blobs: Sequence[str]) -> Iterator[None]:
    """Hold the locks of a repository's blobs, so that nobody downloads them meanwhile.

    Args:
        repository: its folder in the hub's cache.

    Raises:
        HubError: another process downloads one of them now.
    """
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    with contextlib.ExitStack() as held:
        for lock in (repository.parent / ".locks" / repository.name / f"{blob}.lock" for blob in blobs):
            if not lock.exists():  # nobody has ever begun it
                continue
            try:
                held.enter_context(WeakFileLock(str(lock), timeout=0.05))
            except TimeoutError as error:
                repo = repository.name.removeprefix("models--").replace("--", "/")
                raise HubError(f"{repo} is being downloaded by another process: wait for it, or stop it") from error
        yield


def _describe(repo: str, commit: str, file: str, cache: Path) -> _Blob | None:
    """Ask the hub for a file's hash and size."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repo, file, revision=commit)
    found = get_hf_file_metadata(url)
    if found.etag is None or not _ETAG.fullmatch(found.etag) or found.size is None:
        return None
    folder = f"models--{repo.replace('/', '--')}"
    blob = _Blob(
        url, cache / folder / "blobs" / found.etag, found.size, cache / ".locks" / folder / f"{found.etag}.lock"
    )
    return None if found.size > constants.MAX_HTTP_DOWNLOAD_SIZE else blob


def _check_room(repo: str, need: int, cache: Path) -> None:
    """Refuse what the disk has no room for, before it is begun."""
    place = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if need > free:
        raise HubError(
            f"{repo} needs {need / 1e9:.2f} GB more, and the disk of the cache ({cache}) has {free / 1e9:.2f} GB free: "
            "free some space, or set HF_HOME to another disk"
        )


def _download(blob: _Blob, counter: _Counter) -> None:
    """Download a blob, or what is missing of it."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]

    blob.path.parent.mkdir(parents=True, exist_ok=True)
    blob.lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(str(blob.lock)):  # the same that `huggingface_hub` takes for this blob
        if blob.path.exists():
            return
        with blob.partial.open("ab") as file:
            begun = file.tell()
            if begun > blob.size:
                file.truncate(begun := 0)
            check = _Check(blob)
            check.read(begun, counter)
            counted = cast(BinaryIO, _Counted(file, counter, check))
            http_get(
                blob.url, counted, resume_size=begun, headers=build_hf_headers(), expected_size=blob.size,
                displayed_filename=blob.path.name,
            )  # fmt: skip
        if not check.passed:
            blob.partial.unlink()
            what = f"what an earlier run left of {quoted(blob.url)} was not that file's beginning"
            if not begun:
                what = f"what came of {quoted(blob.url)} is not the file that its hash names"
            raise HubError(f"{what}, and is removed: run it again")
        blob.partial.replace(blob.path)


class _Check:
    """Hashes a blob as it comes: its name is a hash of what it is to hold.

    That is SHA-256 for large files and git's SHA-1 for small ones; mirrors may have that of the bytes alone.
    """

    def __init__(self, blob: _Blob) -> None:
        self._blob = blob
        self._begin()

    def _begin(self) -> None:
        if len(self._blob.path.name) == _SHA256_DIGITS:
            self._hashes = [hashlib.sha256()]
        else:
            head = b"blob %d\0" % self._blob.size
            self._hashes = [hashlib.sha1(start, usedforsecurity=False) for start in (head, b"")]

    def read(self, count: int, counter: _Counter) -> None:
        """Begin again with so many bytes that are there, a second per GB; ends early where the others have stopped."""
        self._begin()
        with self._blob.partial.open("rb") as file:
            while count > 0 and (piece := file.read(min(count, 8 << 20))):
                counter.add(0)
                self.update(piece)
                count -= len(piece)

    def update(self, data: bytes) -> None:
        """Take the next bytes."""
        for each in self._hashes:
            each.update(data)

    @property
    def passed(self) -> bool:
        """Whether the bytes so far are the blob."""
        return any(each.hexdigest() == self._blob.path.name for each in self._hashes)


class _Stopped(Exception):
    """Another file has failed, or the user has stopped: no more of this one."""


class _Counter:
    """Bytes of all files that are there."""

    def __init__(self, bar: ProgressBar, done: int, total: int) -> None:
        self.bar, self.done, self.total = bar, done, total
        self.stopped = False
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count bytes that have come (below zero: that are void); raises `_Stopped` where no more are wanted."""
        if self.stopped:
            raise _Stopped
        with self._lock:
            self.done += count
            self.bar.update(self.done, self.total)


class _Counted:
    """A file that counts and checks what is written to it: what `http_get` needs of a file, and no more."""

    def __init__(self, file: BinaryIO, counter: _Counter, check: _Check) -> None:
        self._file, self._counter, self._check = file, counter, check

    def write(self, data: bytes) -> int:
        self._counter.add(len(data))
        self._check.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(place, whence)

    def truncate(self) -> int:
        """Cut at the current place: the server began anew, and what was there is void."""
        place = self._file.tell()
        size = self._file.seek(0, os.SEEK_END)
        self._counter.add(place - size)
        self._file.seek(place)
        count = self._file.truncate()
        self._check.read(place, self._counter)
        return count
