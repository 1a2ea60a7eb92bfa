"""Opens an adapter's directory in PEFT's format: checks its config and the headers of its tensors."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from runner.adapters.config import AdapterConfig
from runner.checkpoint.directory import Checkpoint
from runner.errors import CheckpointError, ConfigError, UsageError
from runner.local_files import path_in, quoted, read_json

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

Given = Mapping[str, float] | Iterable[str]
"""Adapters by directory or hub id: a mapping to their weights, or strings "PATH" (weight 1) or "PATH=WEIGHT"."""


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter on disk.

    Attributes:
        name: the name by which its weight is set.
        weight: the factor on what the adapter adds; 0 turns it off.
    """

    name: str
    weight: float
    config: AdapterConfig
    source: Checkpoint

    @classmethod
    def open(cls, path: Path, name: str, weight: float = 1.0) -> AdapterFiles:
        """Read and check `adapter_config.json` and the header of `adapter_model.safetensors`.

        Raises:
            CheckpointError: a file is missing or malformed, or the weights are a pickle.
            ConfigError: the config asks for something that is not supported.
        """
        if not os.path.isdir(path):
            what = "is a file; an adapter is a directory" if os.path.exists(path) else "no such directory"
            raise CheckpointError(f"{path}: {what}")
        if not os.path.lexists(path / CONFIG):
            raise CheckpointError(f"{path}: no {CONFIG}; is this an adapter's directory?")
        try:
            config = AdapterConfig.from_dict(read_json(path_in(path, CONFIG)))
        except ConfigError as error:
            raise ConfigError(f"{path / CONFIG}: {error}") from error
        if not os.path.lexists(path / WEIGHTS):
            why = f"no {WEIGHTS}"
            if os.path.lexists(path / PICKLE):
                why = (
                    f"only {PICKLE}, a pickle, which can run its author's code when it is read, so it is refused: if "
                    "you trust it, save the adapter again (PEFT's save_pretrained writes safetensors)"
                )
            raise CheckpointError(f"{path}: {why}")
        return cls(name, weight, config, Checkpoint.open_file(path, WEIGHTS, CONFIG))


def open_adapters(given: Given, resolve: Callable[[str], Path]) -> list[AdapterFiles]:
    """Open the adapters given to `runner.load`, in order; `resolve` finds the directory of each.

    An adapter's name is the last part of its path or hub id; where two share that, each is named as it was given.

    Raises:
        UsageError: a weight is not a finite number, or an adapter is given twice.
        RunnerError: raised by `AdapterFiles.open` or `resolve`.
    """
    if isinstance(given, str):
        raise UsageError(f"adapters must be a list or a mapping to weights, not the string {given!r}")
    if isinstance(given, Mapping):
        weights = {str(spec): checked_weight(str(spec), value) for spec, value in given.items()}
    else:
        weights = {}
        for item in map(str, given):
            spec, weight = parse(item)
            if spec in weights:
                raise UsageError(f"the adapter {spec} is given twice")
            weights[spec] = weight
    names = [_last_part(spec) for spec in weights]
    return [
        AdapterFiles.open(resolve(spec), name if names.count(name) == 1 else spec, weight)
        for (spec, weight), name in zip(weights.items(), names, strict=True)
    ]


def parse(item: str) -> tuple[str, float]:
    """Split "PATH=WEIGHT" or "PATH" into path and weight; an existing directory with "=" in its name is a path."""
    path, equals, number = item.rpartition("=")
    if not equals or os.path.isdir(os.path.expanduser(item)):
        return item, 1.0
    try:
        weight = float(number)
    except ValueError as error:
        raise UsageError(f"{item}: expected PATH or PATH=WEIGHT, and {quoted(number)} is not a number") from error
    return path, checked_weight(path, weight)


def checked_weight(name: str, weight: object) -> float:
    """Return `weight` as a float; raises `UsageError` if it is not a finite number."""
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise UsageError(f"the weight of adapter {name} must be a finite number, not {weight!r}")
    return float(weight)


def _last_part(spec: str) -> str:
    """The last part of a path, or of a hub id without its revision."""
    return re.split(r"[/\\]", re.sub(r"@[^/]*$", "", spec).rstrip("/\\"))[-1] or spec
