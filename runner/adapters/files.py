"""Opens an adapter's directory, in PEFT's format or mlx-lm's: checks its config and the headers of its tensors."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.adapters.config import AdapterConfig
from runner.adapters.mlx_config import MlxConfig, is_mlx
from runner.checkpoint.directory import Checkpoint
from runner.errors import CheckpointError, ConfigError, UsageError, WeightsError
from runner.local_files import path_in, quoted, read_json
from runner.weights.problems import Problems

CONFIG = "adapter_config.json"
WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
MLX_WEIGHTS, MLX_ARCHIVE = "adapters.safetensors", "adapters.npz"

LONGEST_NAME = 512
"""Characters of the name of a tensor or a module: as many as GGUF allows, and names of models have a tenth."""

MAX_PROBLEMS = 1000
"""Tensors without a place, or given twice, at which no more is looked for: it is another model's adapter."""

Given = Mapping[str, float] | Iterable[str]
"""Adapters by directory or hub id: a mapping to their weights, or strings "PATH" (weight 1) or "PATH=WEIGHT"."""


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter on disk.

    Attributes:
        name: the name by which its weight is set.
        weight: the factor on what the adapter adds; 0 turns it off.
        spec: the path or hub id by which it was given; "" where it was opened by its directory.
    """

    name: str
    weight: float
    config: AdapterConfig | MlxConfig
    source: Checkpoint
    spec: str = ""

    @classmethod
    def open(cls, path: Path, name: str, weight: float = 1.0, spec: str = "") -> AdapterFiles:
        """Read and check `adapter_config.json` and the header of the tensors' file, which has PEFT's or mlx-lm's name.

        Raises:
            CheckpointError: a file is missing or malformed, or the weights are a pickle.
            ConfigError: the config asks for something that is not supported.
        """
        if not os.path.isdir(path):
            what = "is a file; an adapter is a directory" if os.path.exists(path) else "no such directory"
            raise CheckpointError(f"{path}: {what}")
        if not os.path.lexists(path / CONFIG):
            raise CheckpointError(f"{path}: no {CONFIG}; is this an adapter's directory?")
        raw = read_json(path_in(path, CONFIG))
        mlx = is_mlx(raw)
        try:
            _check_names(raw)
            config = MlxConfig.from_dict(raw) if mlx else AdapterConfig.from_dict(raw)
        except ConfigError as error:
            raise ConfigError(f"{path / CONFIG}: {error}") from error
        weights = MLX_WEIGHTS if mlx else WEIGHTS
        if not os.path.lexists(path / weights):
            raise CheckpointError(f"{path}: {_no_weights(path, weights)}")
        source = Checkpoint.open_file(path, weights, CONFIG)
        for tensor in source.headers:
            if len(tensor) > LONGEST_NAME:
                raise CheckpointError(f"{path / weights}: a tensor's name has {len(tensor)} letters: {quoted(tensor)}")
        return cls(name, weight, config, source, spec)


def _check_names(raw: Mapping[str, Any]) -> None:
    """Refuse names of modules that are none: every tensor is compared with each of them."""
    for key, value in raw.items():
        names = value if isinstance(value, list) or key == "trainable_token_indices" else ()  # other keys are patterns
        for name in names if isinstance(names, list | dict) else ():
            if isinstance(name, str) and len(name) > LONGEST_NAME:
                raise ConfigError(f"{quoted(key)} has a name of {len(name)} letters: {quoted(name)}")


def stop_at_many(problems: Problems, directory: Path) -> None:
    """Raise a `WeightsError` with the problems so far, where they are very many."""
    if problems.count > MAX_PROBLEMS:
        raise WeightsError(
            problems.message((), f"{directory}: the adapter does not fit the model; no more was looked for")
        )


def _no_weights(path: Path, weights: str) -> str:
    """Say what the directory has in place of the file `weights`, and what to do about it."""
    if weights == WEIGHTS and os.path.lexists(path / PICKLE):
        return (
            f"only {PICKLE}, a pickle, which can run its author's code when it is read, so it is refused: if "
            "you trust it, save the adapter again (PEFT's save_pretrained writes safetensors)"
        )
    if weights == MLX_WEIGHTS and os.path.lexists(path / MLX_ARCHIVE):
        return f"only {MLX_ARCHIVE}, as mlx-lm wrote until March 2024: save its arrays with mx.save_safetensors"
    return f"no {weights}"


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
    # One directory may be spelled in several ways, and would be added as often.
    directories = {spec: resolve(spec) for spec in weights}
    spellings: dict[Path, str] = {}
    for spec, directory in directories.items():
        other = spellings.setdefault(directory.resolve(), spec)
        if other != spec:
            raise UsageError(f"the adapter {spec} is given twice: {other} is the same directory")
    names = [_last_part(spec) for spec in weights]
    return [
        AdapterFiles.open(directories[spec], name if names.count(name) == 1 else spec, weight, spec)
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
