"""The files besides a model's config and weights that a copy of the model needs: those this package reads."""

from __future__ import annotations

import os
from pathlib import Path

from runner.local_files import checked_path, read_file

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
    "processor_config.json",  # may hold the chat template
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
    return {name: read_file(checked_path(directory, path), MAX_BYTES) for name, path in paths.items()}
