"""A model as it lies on disk, whatever its format: one object for `load`, `inspect` and the engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoint.directory import Checkpoint
from runner.checkpoint.side_files import side_files
from runner.text.tokenizer import Tokenizer
from runner.weights.tags import Source


@dataclass(frozen=True)
class ModelFiles:
    """`config` and `generation_config` as the hub's files of these names have them, the tensors, and the tokenizer,
    which is read when it is asked for: a model computes without one. `side_files`: what lies beside config and weights,
    by name, to write a copy of the model."""

    path: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    source: Source
    tokenizer: Callable[[], Tokenizer]
    side_files: Callable[[], dict[str, bytes | str]]


def open_files(path: Path) -> ModelFiles:
    """Open a model's directory or GGUF file; headers are checked, no tensor is read.

    Raises:
        CheckpointError: it is neither, or malformed.
        ConfigError: it is quantised in a way that is not supported.
    """
    if os.path.isfile(path):
        from runner.checkpoint.gguf import GGUF  # with NumPy, a third of the imports of a short answer

        gguf = GGUF.open(path)
        return ModelFiles(path, gguf.config, gguf.generation_config, gguf, gguf.tokenizer, gguf.side_files)
    found = Checkpoint.open(path)
    config: Mapping[str, Any] = found.config
    source: Source = found
    if any(config.get(name) for name in ("quantization_config", "compression_config")):
        from runner.checkpoint.quantized import as_mlx

        config, source = as_mlx(found.config, found)
    return ModelFiles(
        path,
        config,
        found.generation_config,
        source,
        lambda: Tokenizer.from_directory(path),
        lambda: side_files(path),
    )
