"""What is written for a model of the hub: `org/name[@revision][:quantization]`, or an address of the hub's pages.

Everything in it is checked to be safe as a part of a path.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

from runner.errors import HubError, UsageError
from runner.local_files import is_plain_name, quoted

MAIN = "main"
HOSTS = ("huggingface.co", "hf.co", "www.huggingface.co")
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"{_PART}/{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]{0,254}")
_QUANTIZATION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class HubId:
    """A model of the hub.

    Attributes:
        repo: `org/name`.
        revision: branch, tag or commit.
        gguf: which of the repository's GGUF files: its quantization ("Q4_K_M"), or its path there, which ends in
            `.gguf`; None: the safetensors, or the usual GGUF file of a repository that has only those.
    """

    repo: str
    revision: str = MAIN
    gguf: str | None = None

    def __str__(self) -> str:
        at = "" if self.revision == MAIN else f"@{self.revision}"
        return f"{self.repo}{at}{'' if self.gguf is None else f':{self.gguf}'}"


def parse(text: str, revision: str | None = None) -> HubId:
    """Read what a user wrote for a model of the hub.

    Args:
        text: `org/name`, with `@revision` and `:quantization` or `:file.gguf` after it; the same behind `hf.co/`; or
            the address of a repository or of a file in it, as a browser shows it.
        revision: the same as `@revision`.

    Raises:
        HubError: it is none of these.
        UsageError: it has one revision, and another one was given.
    """
    found = _from_address(text) if is_address(text) else _from_id(text)
    if revision is None:
        return found
    if found.revision not in (MAIN, revision) or ("@" in text and found.revision != revision):
        raise UsageError(
            f"two revisions of {found.repo} were asked for: {quoted(found.revision)} and {quoted(revision)}"
        )
    return _checked(found.repo, revision, found.gguf, text)


def is_address(text: str) -> bool:
    """Whether a text is an address (a URL), or begins with the hub's host, as one without `https://` does."""
    return "://" in text or text.partition("/")[0].lower() in HOSTS


def _from_id(text: str) -> HubId:
    repo, at, revision = text.partition("@")
    quantization: str | None
    repo, colon, quantization = repo.partition(":")
    if not colon:
        revision, colon, quantization = revision.partition(":")
    return _checked(repo, revision if at else MAIN, quantization if colon else None, text)


def _from_address(text: str) -> HubId:
    """Read `https://huggingface.co/org/name[/tree/REVISION | /blob/REVISION/FILE | /resolve/REVISION/FILE]`."""
    try:
        url = urlsplit(text if "://" in text else f"https://{text}")
    except ValueError as error:
        raise HubError(f"{quoted(text)} is not an address: {error}") from error
    own = urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc
    if url.scheme not in ("https", "http") or url.netloc.lower() not in (*HOSTS, own.lower() or HOSTS[0]):
        raise HubError(
            f"{quoted(text)} is not on {own or HOSTS[0]}, and models are fetched from there alone: "
            "download it, and name the directory or file"
        )
    path = url.path.strip("/")
    parts = [unquote(part) for part in path.split("/")]
    if parts[0] in ("datasets", "spaces", "collections", "papers", "docs") and len(parts) > 1:
        raise HubError(f"{quoted(text)} is an address of the hub, but not that of a model")
    if len(parts) == 2:
        found = _from_id(unquote(path))
        shown = parse_qs(url.query).get("show_file_info", [""])[0]  # the page of a repository with one file's details
        return _checked(found.repo, found.revision, shown, text) if shown.endswith(".gguf") else found
    kind, revision, file = "".join(parts[2:3]), "".join(parts[3:4]), "/".join(parts[4:])
    if kind not in ("tree", "blob", "resolve", "raw") or not revision or (kind == "tree" and file):
        raise HubError(f"{quoted(text)}: expected the address of a model's page, or of a file of it")
    # Another file of the repository's own folder (config.json, a shard) stands for the whole.
    if file and not file.endswith(".gguf") and "/" in file:
        raise HubError(f"{quoted(text)}: of a file in a folder only GGUF files are read")
    return _checked("/".join(parts[:2]), revision, file if file.endswith(".gguf") else None, text)


def _checked(repo: str, revision: str, gguf: str | None, text: str) -> HubId:
    """The parts of `text`, after a check of each."""
    if not _ID.fullmatch(repo) or len(repo) > 96 or "--" in repo or ".." in repo or repo.endswith(".git"):
        raise HubError(
            f"{quoted(text)} is neither an existing directory nor a hub id such as org/name or org/name@main"
        )
    # Git's rules for ref names; without `..`, a name cannot lead out of the cache's `refs` folder.
    bad = not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision
    if bad or revision.endswith(("/", ".", ".lock")):
        raise HubError(f"{quoted(revision)} is not a revision: expected a branch, a tag or a commit")
    if gguf is not None and gguf.endswith(".gguf"):
        if not all(is_plain_name(part) for part in gguf.split("/")):
            raise HubError(f"{quoted(gguf)} is not the name of a file in a repository")
    elif gguf is not None and not _QUANTIZATION.fullmatch(gguf):
        raise HubError(f"{quoted(gguf)} is not a quantization such as Q4_K_M, nor a file's name that ends in .gguf")
    return HubId(repo, revision, gguf)
