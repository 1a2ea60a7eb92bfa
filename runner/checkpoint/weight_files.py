"""Which files of a model directory hold its weights, where there is more than one answer, and their headers.

Directories outlive what they were written for: an index stays behind when a model is saved again as one file, shards of
a first version lie beside those of a second. What is whole is read; where nothing is, the message says what was found.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

from runner.checkpoint.safetensors_header import INDEX, SINGLE, ShardHeader, TensorInfo, read_header, read_index
from runner.errors import CheckpointError
from runner.local_files import path_in, quoted

NUMBERED = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors", re.ASCII)
SHOWN = 5
"""Names of files that a message lists."""

Weights = tuple[dict[str, ShardHeader], dict[str, TensorInfo]]
"""Headers of the weight files by name, and of every tensor by name."""


def choose(names: Collection[str], weight_map: Mapping[str, str] | None) -> list[str]:
    """The weight files among the files `names`: those of the index, unless it is stale and others are whole.

    The index decides where all its files are there. Where some are missing, it is stale if the single file is there, or
    if none of its own is and there is a whole numbered set (`model-00001-of-00002.safetensors` ...).

    Args:
        weight_map: what the index says, None where there is no index.

    Returns:
        Names of files, in order; files of the index that are missing are among them if nothing else is whole.
    """
    named = sorted(set(weight_map.values())) if weight_map else []
    if named and all(name in names for name in named):
        return named
    if SINGLE in names:
        return [SINGLE]
    return named if any(name in names for name in named) else _whole_set(names) or named


def _whole_set(names: Collection[str]) -> list[str]:
    """The numbered shards, if all of one set are there and no other set is; else nothing."""
    sets: dict[int, list[str]] = defaultdict(list)
    for name in sorted(names):
        found = NUMBERED.fullmatch(name)
        if found is not None and 1 <= int(found[1]) <= int(found[2]):
            sets[int(found[2])].append(name)
    whole = [found for total, found in sets.items() if len(found) == total]
    return whole[0] if len(whole) == 1 else []


def read_weights(directory: Path) -> Weights:
    """Read and check the headers of the weight files of a model directory.

    Raises:
        CheckpointError: naming the file and the problem; where files are missing, what was found instead.
    """
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror or error}") from error
    weight_map = read_index(path_in(directory, INDEX)) if INDEX in names else None
    files = choose(names, weight_map)
    if not files:
        raise CheckpointError(f"{directory}: {_no_weights(names, directory)}")
    missing = [name for name in files if name not in names]
    if missing:
        raise CheckpointError(_incomplete(directory, missing, len(files), names))
    shards = {name: read_header(path_in(directory, name)) for name in files}
    stale = weight_map is None or set(weight_map.values()) != set(files)
    return shards, _tensors(directory / INDEX, shards, {} if stale or weight_map is None else weight_map)


def _tensors(index: Path, shards: Mapping[str, ShardHeader], weight_map: Mapping[str, str]) -> dict[str, TensorInfo]:
    """Every tensor by name, from the file that `weight_map` gives for it, or else from the only one that holds it."""
    headers: dict[str, TensorInfo] = {}
    for file, shard in shards.items():
        for name, info in shard.tensors.items():
            wanted = weight_map.get(name, file)
            if wanted != file and name in shards[wanted].tensors:  # the index takes it from there
                continue
            if name in headers:
                raise CheckpointError(_twice(index, name, headers[name].file.name, file, weight_map))
            headers[name] = info
    lacking = [name for name in weight_map if name not in headers]
    if lacking:
        more = f" (and {len(lacking) - 1} more like it)" if len(lacking) > 1 else ""
        raise CheckpointError(
            f"{index}: tensor {quoted(lacking[0])} is not in {weight_map[lacking[0]]}, nor in another file that it "
            f"names{more}: the index is stale, or belongs to other files; fetch the model again or, if the "
            f"{len(headers)} tensors that are there are all, write an index that lists them"
        )
    return headers


def _twice(index: Path, name: str, first: str, second: str, weight_map: Mapping[str, str]) -> str:
    """The message for a tensor in two files, neither of which the index gives for it."""
    if not weight_map:
        return f"{index.parent}: both {first} and {second} hold {quoted(name)}; remove the files of an older version"
    if name in weight_map:
        return f"{index}: {quoted(name)} is not in {weight_map[name]}, and both {first} and {second} hold it"
    return f"{index}: does not list {quoted(name)}, and both {first} and {second} hold it"


def _incomplete(directory: Path, missing: list[str], total: int, names: list[str]) -> str:
    """Say which files of the index are missing, and what is there instead."""
    found = [name for name in names if name.endswith(".safetensors")]
    return (
        f"{directory / missing[0]}: no such file, though {INDEX} names it ({len(missing)} of {total} files are "
        f"missing; found: {_listed(found) or 'no .safetensors file'}): an incomplete download, to be finished, or a "
        "stale index of other files"
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(quoted, names[:SHOWN])) + more


def _no_weights(names: list[str], directory: Path) -> str:
    """Say why a directory with these files has no weights to load, and what to do about it."""
    expected = f"no {SINGLE} and no {INDEX}"
    stray = [name for name in names if name.endswith(".safetensors")]
    gguf = [name for name in names if name.endswith(".gguf")]
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".bin.index.json"))]
    if any(name.startswith("consolidated") for name in stray):
        return f"{expected}, only {_listed(stray)}: Mistral's own format; get the model's transformers version"
    if stray:
        return f"{expected}, only {_listed(stray)}; an incomplete copy, or not a transformers model"
    if gguf:
        return f"{expected}, but a GGUF file: to load it, name that file: {directory / gguf[0]}"
    if pickles:
        return (
            f"only pickle weights ({quoted(pickles[0])}); reading a pickle can run its author's code, so they are "
            "refused: get the model's safetensors version or, if you trust the file, convert it (transformers: "
            "from_pretrained, then save_pretrained)"
        )
    return f"{expected}; is this a model's directory?"
