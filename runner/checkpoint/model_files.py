"""A model's files in any supported format (directory or GGUF), as one object for `load`, `inspect` and the engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoint.directory import Checkpoint
from runner.checkpoint.side_files import side_files
from runner.families import FAMILIES
from runner.text.tokenizer import Tokenizer
from runner.weights.tags import Source


@dataclass(frozen=True)
class ModelFiles:
    """The opened files of a model.

    Attributes:
        path: the model directory or GGUF file.
        config: contents of `config.json`, or their equivalent from GGUF metadata.
        generation_config: contents of `generation_config.json`, or their equivalent.
        source: the tensors, under transformers' names.
        tokenizer: reads the tokenizer; a function, since a model can compute without one.
        side_files: reads the files besides config and weights, by name, for writing a copy of the model.
        check_unchanged: raises `CheckpointError` where a file of tensors changed since it was opened.
        notes: sentences for the user about what had to be guessed.
        unread: names of tensors of a multimodal model's other parts.
    """

    path: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    source: Source
    tokenizer: Callable[[], Tokenizer]
    side_files: Callable[[], dict[str, bytes | str]]
    check_unchanged: Callable[[], None]
    notes: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


def name_of(path: Path) -> str:
    """What to call the model at `path`: its directory or file, or its repository where that is a snapshot of the hub's.

    In the hub's cache, that is `models--ORG--NAME/snapshots/COMMIT`, whose own name says nothing.
    """
    place = path.absolute() if path.name not in ("", "..") else path.resolve()
    repository = place.parent.parent.name
    if place.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return place.name


def open_files(path: Path) -> ModelFiles:
    """Open a model directory or GGUF file; headers are checked, and no weight matrix is read.

    Raises:
        CheckpointError: `path` is neither, or is malformed.
        ConfigError: the quantization method or one of its options is not supported.
        TokenizerError: the vocabulary of a GGUF file is malformed or not supported.
        WeightsError: the tensors do not fit the quantization that the config describes.
    """
    if os.path.isfile(path):
        from runner.checkpoint.gguf import GGUF  # imported late: with NumPy, a third of a short run's import time

        gguf = GGUF.open(path)
        notes = gguf.vocabulary.notes
        unchanged = gguf.container.check_unchanged
        return ModelFiles(
            path, gguf.config, gguf.generation_config, gguf, gguf.tokenizer, gguf.side_files, unchanged, notes
        )
    found = Checkpoint.open(path)
    config: Mapping[str, Any] = found.config
    source: Source = found
    unread: tuple[str, ...] = ()
    if str(config.get("model_type")) not in FAMILIES:
        from runner.checkpoint.wrapped import is_wrapper, unwrap

        if is_wrapper(config):
            config, source, unread = unwrap(config, source)
    # mlx-lm writes its own block twice, and what that says needs no translation.
    blocks = [config.get(name) for name in ("quantization_config", "compression_config")]
    named = any(block and block != config.get("quantization") for block in blocks)
    # Float8 weights need their scales even if config.json does not speak of them (modelopt has a file of its own).
    if named or any(info.dtype.startswith("F8_") for info in found.headers.values()):
        from runner.checkpoint.quantized import as_mlx

        config, source = as_mlx(config, source)
    return ModelFiles(
        path,
        config,
        found.generation_config,
        source,
        lambda: Tokenizer.from_directory(path),
        lambda: side_files(path),
        found.check_unchanged,
        unread=unread,
    )
