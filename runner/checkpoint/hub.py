"""Models of the Hugging Face hub, read from or fetched into its cache on this machine.

`resolve` looks in the cache first and makes no request when the model is there; `pull` always asks the hub. Only what
this package reads is fetched: configuration, the tokenizer, chat templates, and the safetensors files that the
index names. Requests, `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE` and `HF_ENDPOINT` are left to `huggingface_hub`,
which is imported only when needed.

The weights are fetched after everything else and the revision's name is recorded last, so a snapshot that has its
weights has all other files, and an interrupted download never hides an older, complete snapshot. Downloads of weights
go on where a connection was dropped or an earlier run ended (`downloading.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.checkpoint import side_files
from runner.checkpoint.gguf_choice import choose_gguf, gguf_models
from runner.checkpoint.hub_ids import MAIN, HubId, parse
from runner.checkpoint.kept import try_to_begin, try_to_forget_begun, try_to_keep
from runner.checkpoint.safetensors_header import INDEX, SINGLE, read_index
from runner.checkpoint.weight_files import choose
from runner.errors import CheckpointError, HubError, UsageError
from runner.local_files import is_gguf, is_plain_name, path_in, quoted
from runner.progress import Watched

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class CachedModel:
    """A model in the cache that can be loaded without a request to the hub.

    Attributes:
        hub_id: its hub id; the revision is the commit, 40 hexadecimal digits.
        nbytes: size of its files on disk, in bytes.
        path: directory of the snapshot, or the GGUF file.
        current: whether the branch `main` was at this commit when it was last asked for.
    """

    hub_id: HubId
    nbytes: int
    path: Path
    current: bool = False


def resolve(model: str, *, revision: str | None = None, progress: bool = True) -> Path:
    """Find a model on this machine, or fetch it from the hub, and return its path.

    An existing directory or GGUF file is returned as it is. Anything else must be written as `hub_ids.parse` reads it,
    and is looked up in the cache and fetched where the cache does not have it.

    Args:
        revision: branch, tag or commit; means the same as `@revision` in `model`. Default: `main`.
        progress: show a progress bar on stderr while downloading.

    Raises:
        HubError: `model` is neither a path nor a hub id, or the hub lacks it, refuses access, or cannot be reached.
        UsageError: `model` is a file but not GGUF, a path came with a revision, or two different revisions were given.
    """
    path = os.path.expanduser(model)
    is_directory = os.path.isdir(path)
    if is_directory or (os.path.exists(path) and (path.endswith(".gguf") or is_gguf(Path(path)))):
        if revision is not None:
            raise UsageError(
                f"revision {quoted(revision)} was given, but {path} is a {'directory' if is_directory else 'file'}; "
                "only hub ids have revisions"
            )
        return Path(path)
    if os.path.exists(path):
        raise UsageError(f"{path} is a file, neither a model's directory nor a GGUF file: name its directory")
    wanted = parse(model, revision)
    found = find(wanted)
    return _fetch(wanted, progress) if found is None else found


def find(wanted: HubId) -> Path | None:
    """Where in the cache a model is, None where it is not there whole; nothing is asked of the hub."""
    cached = _snapshot(wanted.repo, wanted.revision)
    return None if cached is None else _found(cached, wanted)


def resolve_adapter(adapter: str, *, progress: bool = True, tokenizer: bool = False) -> Path:
    """Find an adapter (PEFT's or mlx-lm's) on this machine, or fetch it from the hub, and return its directory.

    Args:
        adapter: an existing directory, or a hub id `org/name[@revision]`.
        progress: show a progress bar on stderr while downloading.
        tokenizer: fetch the tokenizer too, if the repository has one: of an adapter with added tokens.

    Raises:
        HubError: for the same reasons as in `resolve`.
    """
    path = os.path.expanduser(adapter)
    if os.path.exists(path):
        return Path(path)
    wanted = parse(adapter)
    repo, revision = wanted.repo, wanted.revision
    if wanted.gguf is not None:
        raise HubError(f"{quoted(adapter)}: adapters are read from safetensors, not from GGUF files")
    cached = _snapshot(repo, revision)
    if (
        cached is not None
        and (cached / ADAPTER_CONFIG).is_file()
        and any((cached / name).is_file() for name in ADAPTER_WEIGHTS)
        and (not tokenizer or any((cached / name).is_file() for name in TOKENIZER_FILES))
    ):
        return cached
    return _fetch_adapter(repo, revision, progress, tokenizer)


def pull(model: str, *, revision: str | None = None, progress: Watched = True) -> Path:
    """Fetch a model, or bring the cached one up to date with its branch, and return its directory.

    Args:
        progress: whether a bar on stderr shows how weights come; or what is told of it, from several threads.

    Raises:
        HubError: for the same reasons as in `resolve`.
        UsageError: two different revisions were given.
    """
    return _fetch(parse(model, revision), progress)


def list_cached() -> list[CachedModel]:
    """List the models in the cache whose weights are complete, sorted by id and revision."""
    found = []
    for folder in sorted(cache_directory().glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/")
        for snapshot in sorted(path for path in folder.glob("snapshots/*") if path.is_dir()):
            current = _snapshot(repo, MAIN) == snapshot
            files = _files(snapshot)
            models = [one for one in gguf_models(files) if one.whole]
            if _has_weights(snapshot):
                rest = files - {file for one in models for file in one.files}
                found.append(CachedModel(HubId(repo, snapshot.name), _size(snapshot, rest), snapshot, current))
            for one in models:
                hub_id = HubId(repo, snapshot.name, one.label)
                found.append(CachedModel(hub_id, _size(snapshot, one.files), snapshot / one.files[0], current))
    return found


# --- the cache --------------------------------------------------------------------------------------------------------


def cache_directory() -> Path:
    """The directory of the hub's cache; it need not exist."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def repository(repo: str) -> Path:
    """The folder of a repository in the cache; it need not exist."""
    return cache_directory() / f"models--{repo.replace('/', '--')}"


def _place(repo: str, commit: str) -> Path:
    """Where in the cache a commit's files are, or are to be."""
    return repository(repo) / "snapshots" / commit


def _snapshot(repo: str, revision: str) -> Path | None:
    """Find the cached directory of a revision, complete or not; None where the cache has none.

    Cache layout: the file `models--org--name/refs/REVISION` holds a commit, `snapshots/COMMIT` holds its files.
    """
    folder = repository(repo)
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = (folder / "refs" / revision).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        if not _COMMIT.fullmatch(commit):
            return None
    path = _place(repo, commit)
    return path if path.is_dir() else None


def _shards(snapshot: Path, names: Collection[str]) -> list[str]:
    """Which of the files `names` hold a snapshot's weights; the single file where nothing says."""
    weight_map = read_index(path_in(snapshot, INDEX)) if (snapshot / INDEX).is_file() else None
    return choose(names, weight_map) or [SINGLE]


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors")
"""PEFT's file of tensors, and mlx-lm's."""
TOKENIZER_FILES = ("tokenizer.json", "tekken.json", "tokenizer.model", "merges.txt")


def _has_weights(snapshot: Path) -> bool:
    try:
        files = ["config.json", *_shards(snapshot, os.listdir(snapshot))]
    except (CheckpointError, OSError):
        return False
    return all((snapshot / file).is_file() for file in files)


def _is_complete(snapshot: Path) -> bool:
    """Whether a model can be loaded from the snapshot.

    Weights alone do not prove it: other programs fetch file by file, and may not have fetched the tokenizer.
    """
    return _has_weights(snapshot) and any((snapshot / name).is_file() for name in TOKENIZER_FILES)


def _found(snapshot: Path, wanted: HubId) -> Path | None:
    """The model `wanted` in a snapshot of its revision, None where it is not there whole.

    Where no quantization is named, a GGUF file that is there is what was fetched by that name.
    """
    if wanted.gguf is None and _is_complete(snapshot):
        return snapshot
    files = _files(snapshot)
    begun = any(name in TOKENIZER_FILES or name.endswith((".safetensors", INDEX)) for name in files)
    if wanted.gguf is None and "config.json" in files and begun:  # safetensors, of which some are missing
        return None
    try:
        return snapshot / choose_gguf(wanted.repo, files, wanted.gguf).files[0]
    except HubError:
        return None


def _files(snapshot: Path) -> set[str]:
    """Paths of a snapshot's files, relative to it; links that lead to no file are none."""
    return {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}


def _size(snapshot: Path, files: Collection[str]) -> int:
    """Total bytes on disk of the blobs that files of a snapshot link to, each blob counted once."""
    sizes = {(snapshot / file).resolve(): (snapshot / file).stat().st_size for file in files}
    return sum(sizes.values())


# --- fetching ---------------------------------------------------------------------------------------------------------


def _fetch(wanted: HubId, progress: Watched) -> Path:
    """Download a model into the cache and return its path; when offline, accept a cached one without tokenizer."""
    from huggingface_hub import HfApi, constants, hf_hub_download

    repo, revision = wanted.repo, wanted.revision
    if constants.HF_HUB_OFFLINE:
        cached = _snapshot(repo, revision)
        found = None if cached is None else _found(cached, wanted)
        if found is not None:
            return found
        if cached is not None and wanted.gguf is None and _has_weights(cached):
            return cached
        state = "only in part" if cached is not None else "not"
        named = f"{repo}@{revision}{'' if wanted.gguf is None else f':{wanted.gguf}'}"
        raise HubError(
            f"{named} is {state} in the cache ({cache_directory()}), and HF_HUB_OFFLINE forbids fetching it; "
            "unset it to download the model"
        )
    with _one_line(repo, revision), _progress_bars(False):
        info = HfApi().model_info(repo, revision=revision)
        files = [sibling.rfilename for sibling in info.siblings or ()]
        commit = info.sha
        if commit is None or not _COMMIT.fullmatch(commit):
            raise HubError(f"{repo}@{revision}: the hub's answer names no commit (40 hexadecimal digits)")
        if wanted.gguf is not None or _has_only_gguf(files):
            path, marker = _fetch_gguf(wanted, commit, files, progress)
        else:
            _require_safetensors(repo, files)
            path, marker = _fetch_safetensors(wanted, commit, files, progress), "config.json"
        if revision != commit:
            hf_hub_download(repo, marker, revision=revision)  # cached already: only records the ref's commit
    return path


def _fetch_safetensors(wanted: HubId, commit: str, files: list[str], progress: Watched) -> Path:
    """Download what is read of a directory of safetensors; returns the snapshot."""
    # All files by commit, not by branch, so that they belong together even if the branch moves meanwhile.
    # The weights come last: a snapshot that has them is complete.
    small = [name for name in files if _is_small(name)]
    place = _place(wanted.repo, commit)
    if begun := not _has_weights(place):
        try_to_begin(place, str(wanted), [name for name in small if not (place / name).is_file()])
    snapshot = _download(wanted.repo, commit, small)
    shards = _shards(snapshot, files)
    lacking = [name for name in shards if name not in files]
    if lacking:
        raise HubError(
            f"{wanted.repo}@{wanted.revision}: its index names {quoted(lacking[0])}, which the repository does not have"
        )
    was_there = _has_weights(snapshot)
    missing = [name for name in shards if not (snapshot / name).is_file()]
    _download_weights(
        wanted.repo, commit, shards, progress, lambda blobs: try_to_begin(snapshot, str(wanted), missing, blobs)
    )
    if not was_there:
        try_to_keep(snapshot, "hub", [*small, *shards])
    elif begun:
        try_to_forget_begun(snapshot)
    return snapshot


def _fetch_gguf(wanted: HubId, commit: str, files: list[str], progress: Watched) -> tuple[Path, str]:
    """Download the GGUF file that `wanted` means, or all its shards; returns the first's path, here and there."""
    chosen = choose_gguf(wanted.repo, files, wanted.gguf)
    known = _snapshot(wanted.repo, commit)
    was_there = known is not None and all((known / file).is_file() for file in chosen.files)
    place, shards = _place(wanted.repo, commit) / chosen.files[0], [file.rpartition("/")[2] for file in chosen.files]
    of = str(dataclasses.replace(wanted, gguf=chosen.label))
    path = _download_weights(
        wanted.repo, commit, chosen.files, progress, lambda blobs: try_to_begin(place, of, shards, blobs)
    )
    if not was_there:
        try_to_keep(path / chosen.files[0], "hub", shards)
    return path / chosen.files[0], chosen.files[0]


def _has_only_gguf(files: Collection[str]) -> bool:
    """Whether a repository's models are GGUF files."""
    return SINGLE not in files and INDEX not in files and bool(gguf_models(files))


def _fetch_adapter(repo: str, revision: str, progress: bool, tokenizer: bool) -> Path:
    """Download an adapter's two files into the cache, with those of its tokenizer if asked; returns the snapshot."""
    from huggingface_hub import HfApi, constants, hf_hub_download

    if constants.HF_HUB_OFFLINE:
        raise HubError(
            f"the adapter {repo}@{revision} is not in the cache ({cache_directory()}), and HF_HUB_OFFLINE is set; "
            "unset it to download the adapter"
        )
    with _one_line(repo, revision), _progress_bars(progress):
        info = HfApi().model_info(repo, revision=revision)
        files = [sibling.rfilename for sibling in info.siblings or ()]
        if info.sha is None or not _COMMIT.fullmatch(info.sha):
            raise HubError(f"{repo}@{revision}: the hub's answer names no commit (40 hexadecimal digits)")
        weights = [name for name in ADAPTER_WEIGHTS if name in files]
        if ADAPTER_CONFIG not in files or not weights:
            lacking = ADAPTER_WEIGHTS[0] if ADAPTER_CONFIG in files else ADAPTER_CONFIG
            pickle = ", only adapter_model.bin, a pickle" if "adapter_model.bin" in files else ""
            raise HubError(f"{repo} has no {lacking}{pickle}: not an adapter in PEFT's or mlx-lm's safetensors format")
        others = [name for name in files if tokenizer and _is_small(name) and name != ADAPTER_CONFIG]
        snapshot = _download(repo, info.sha, [ADAPTER_CONFIG, *others, *weights])
        if revision != info.sha:
            hf_hub_download(repo, ADAPTER_CONFIG, revision=revision)  # cached already: only records the ref's commit
    return snapshot


def _require_safetensors(repo: str, files: list[str]) -> None:
    """Refuse, before anything is fetched, a repository without a config and safetensors weights."""
    if "config.json" in files and (SINGLE in files or INDEX in files):
        return
    if "config.json" not in files:
        reason = "no config.json: not a transformers model"
    elif any(name.endswith((".bin", ".pt", ".pth")) for name in files):
        reason = "only pickle weights, which can run code when read: look for a safetensors version of it"
    else:
        reason = f"neither {SINGLE} nor {INDEX}"
    raise HubError(f"{repo} has {reason}")


def _is_small(name: str) -> bool:
    """Whether a file is needed besides the weights: configuration, tokenizer or chat template."""
    folder, _, base = name.rpartition("/")
    if folder:
        return folder == side_files.TEMPLATES and base.endswith(".jinja") and is_plain_name(base)
    return base in ("config.json", INDEX, *side_files.NAMES)


def _download_weights(
    repo: str, commit: str, files: Sequence[str], progress: Watched, begin: Callable[[list[str]], None]
) -> Path:
    """Download files of weights, and return the snapshot directory; `begin` as in `fetch_weights`."""
    snapshot = _snapshot(repo, commit)
    missing = [file for file in files if snapshot is None or not (snapshot / file).is_file()]
    if missing:
        from runner.checkpoint.downloading import fetch_weights  # imported late: with threads and hashes

        fetch_weights(repo, commit, missing, cache_directory(), progress=progress, begin=begin)
    return _download(repo, commit, files)


def _download(repo: str, commit: str, files: Sequence[str]) -> Path:
    """Download the named files of a commit into the cache, and return the snapshot directory."""
    from huggingface_hub import snapshot_download

    # `allow_patterns` takes globs; escaped, a name matches only itself.
    snapshot = Path(snapshot_download(repo, revision=commit, allow_patterns=[glob.escape(name) for name in files]))
    missing = [name for name in files if not (snapshot / name).is_file()]
    if missing:  # the library returns what it has when the connection fails half-way
        raise HubError(f"{repo}: the download stopped before {quoted(missing[0])}; run it again: it goes on there")
    return snapshot


@contextlib.contextmanager
def _progress_bars(wanted: bool) -> Iterator[None]:
    """Turn off the hub library's progress bars unless `wanted`; its process-wide switch is restored afterwards."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if wanted or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def _one_line(repo: str, revision: str) -> Iterator[None]:
    """Turn any error of the hub library into a `HubError` of one line that says what to do."""
    from huggingface_hub import constants, errors, get_token

    try:
        yield
    except (HubError, CheckpointError):
        raise
    except errors.GatedRepoError as error:
        terms = f"accept its terms at {constants.ENDPOINT}/{repo}"
        what = f"{terms} with the account of your token, which" if get_token() else f"{terms}, then set HF_TOKEN"
        end = " has no access yet" if get_token() else " (or `hf auth login`)"
        raise HubError(f"{repo} is gated: {what}{end}") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{repo} is not on {constants.ENDPOINT}, or private: check the spelling; for a private model set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo} has no revision {quoted(revision)}: check the branch, tag or commit") from error
    except errors.HfHubHTTPError as error:
        raise HubError(f"{constants.ENDPOINT} refused {repo}@{revision}: {_first_line(error)}") from error
    except Exception as error:  # the HTTP library has its own errors, and which library it is depends on the version
        raise HubError(_transport(repo, revision, error)) from error


def _transport(repo: str, revision: str, error: Exception) -> str:
    """The message for an error other than the hub's own answers: a full disk, or the network."""
    from huggingface_hub import constants

    # A full disk may be wrapped in other errors, so look through the whole chain.
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in (errno.ENOSPC, errno.EDQUOT):
            return (
                f"the disk of the cache ({cache_directory()}) is full: free some space, or set HF_HOME to another disk"
            )
        chain = chain.__cause__ or chain.__context__
    return (
        f"{repo}@{revision} is not complete in the cache, and could not be fetched from {constants.ENDPOINT}: "
        f"{_first_line(error)}; check the network and run it again: it goes on where it stopped"
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
