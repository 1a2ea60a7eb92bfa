"""The files besides a model's config and weights that a copy of the model needs: those this package reads."""

from __future__ import annotations

import os
from pathlib import Path

from runner.errors import CheckpointError
from runner.local_files import checked_path

NAMES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""File names that are copied. A model directory may also hold code and pickles, which are not."""

TEMPLATES = "additional_chat_templates"
MAX_TEMPLATES = 100
MAX_BYTES = 256 << 20


def side_files(directory: Path) -> dict[str, bytes | str]:
    """Read the files of `NAMES` that exist, and the chat templates in the folder `TEMPLATES`; contents by name.

    Raises:
        CheckpointError: a file links out of the directory, is not a regular file, or is larger than `MAX_BYTES`.
    """
    paths = {name: directory / name for name in NAMES if os.path.lexists(directory / name)}
    templates = sorted((directory / TEMPLATES).glob("*.jinja"))[:MAX_TEMPLATES]
    paths |= {f"{TEMPLATES}/{path.name}": path for path in templates}
    return {name: _bounded(checked_path(directory, path)) for name, path in paths.items()}


def _bounded(path: Path) -> bytes:
    """Contents of a file of at most `MAX_BYTES`."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)  # one more than allowed, to tell a file that is too large
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_BYTES} bytes, the limit for a file that is copied")
    return data
