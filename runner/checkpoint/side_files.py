"""What lies beside a model's config and weights: the files this package reads, and no others, to be copied."""

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
"""A directory may hold code and pickles as well: those stay behind."""

TEMPLATES = "additional_chat_templates"
MAX_TEMPLATES = 100
MAX_BYTES = 256 << 20


def side_files(directory: Path) -> dict[str, bytes | str]:
    """Contents of the files of `NAMES` and of the chat templates in their folder, by name.

    Raises:
        CheckpointError: one links out of the directory, is no regular file, or is larger than any such file is.
    """
    paths = {name: directory / name for name in NAMES if os.path.lexists(directory / name)}
    templates = sorted((directory / TEMPLATES).glob("*.jinja"))[:MAX_TEMPLATES]
    paths |= {f"{TEMPLATES}/{path.name}": path for path in templates}
    return {name: _bounded(checked_path(directory, path)) for name, path in paths.items()}


def _bounded(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_BYTES} bytes, the most such a file may have")
    return data
