"""Which of a repository's GGUF files are one model, and which model a quantization names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from runner.errors import HubError
from runner.local_files import is_plain_name, quoted

USUAL = "Q4_K_M"
"""The quantization where none is named, as in llama.cpp and ollama."""

MOST = 40
"""Names in a message at most."""

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})")
_LABEL = re.compile(r"(?:^|[-._/])((?:UD-)?(?:I?Q|TQ|BF|FP?|MXFP|NVFP)\d+(?:_[0-9A-Z]+)*)$", re.IGNORECASE)
_NO_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)


@dataclass(frozen=True)
class GGUFModel:
    """One model among a repository's GGUF files.

    Attributes:
        label: what it is called by: its quantization as the file's name ends in it, else the file's path.
        files: paths of its files, the first shard first.
        whole: whether all its shards are there.
    """

    label: str
    files: tuple[str, ...]
    whole: bool


def gguf_models(files: Iterable[str]) -> list[GGUFModel]:
    """The models among the paths `files`, sorted by path; encoders of images and matrices of importance are none."""
    shards: dict[tuple[str, int], dict[int, str]] = {}
    for file in files:
        # The names come from strangers: what could lead out of a directory is no model's.
        named = file.endswith(".gguf") and all(is_plain_name(part) for part in file.split("/"))
        if not named or _NO_MODEL.search(file.rpartition("/")[2]):
            continue
        stem = file.removesuffix(".gguf")
        found = _SHARD.fullmatch(stem)
        key, number = ((found[1], int(found[3])), int(found[2])) if found else ((stem, 1), 1)
        shards.setdefault(key, {})[number] = file
    labels = [found[1] if (found := _LABEL.search(stem)) else "" for stem, _ in sorted(shards)]
    models = []
    for (stem, count), label in zip(sorted(shards), labels, strict=True):
        parts = shards[stem, count]
        alone = label and sum(other.casefold() == label.casefold() for other in labels) == 1
        names = tuple(parts[number] for number in sorted(parts))
        models.append(GGUFModel(label if alone else names[0], names, sorted(parts) == list(range(1, count + 1))))
    return models


def choose_gguf(repo: str, files: Iterable[str], wanted: str | None) -> GGUFModel:
    """The model that a quantization or a file's name means; without either Q4_K_M, or the only one.

    Args:
        repo: the repository's name, for messages.
        files: paths of its files.
        wanted: in any case of letters: a quantization, the last words of a file's name before `.gguf`, or a path.

    Raises:
        HubError: there is none or more than one; the message names those that there are.
    """
    models = gguf_models(files)
    named = (USUAL if wanted is None else wanted).casefold()
    found = [one for one in models if named in (one.label.casefold(), *map(_base, one.files), *map(_folded, one.files))]
    found = found or [one for one in models if re.search(rf"(?:^|[-._/]){re.escape(named)}$", _stem(one.files[0]))]
    if wanted is None and not found and len(models) == 1:
        found = models
    if len(found) == 1:
        if not found[0].whole:
            raise HubError(f"{repo} has only {len(found[0].files)} of the shards of {quoted(found[0].files[0])}")
        return found[0]
    if not models:
        raise HubError(f"{repo} has no GGUF files" + ("" if wanted is None else f", and so no {quoted(wanted)}"))
    labels = [one.label for one in found or models]
    there = ", ".join(quoted(label)[1:-1] for label in labels[:MOST]) + ("" if len(labels) <= MOST else ", ...")
    if wanted is None:
        raise HubError(f"{repo} has several GGUF files: name one, as in {repo}:{labels[0]} (there are {there})")
    raise HubError(f"{repo} has {'more than one' if found else 'no'} {quoted(wanted)}: there are {there}")


def _folded(file: str) -> str:
    return file.casefold()


def _base(file: str) -> str:
    return file.rpartition("/")[2].casefold()


def _stem(file: str) -> str:
    """A file's path without the number of the shard and the suffix, in small letters."""
    stem = file.removesuffix(".gguf")
    found = _SHARD.fullmatch(stem)
    return (found[1] if found else stem).casefold()
