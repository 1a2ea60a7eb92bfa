"""What the user has set once and for all: the model of commands that name none.

RUNNER_MODEL, or else the line `model = "smollm2"` of `config.toml` in the user's config directory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.cli import terminal
from runner.errors import RunnerError, UserFileError
from runner.local_files import quoted
from runner.user_files import config_directory

VARIABLE = "RUNNER_MODEL"
KEYS = frozenset({"model"})
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class DefaultModel:
    """The model of commands that name none, and where the user has set it (a variable's name, or a file's path)."""

    name: str
    source: str

    def checked(self) -> str:
        """Return the name, after a look whether it is one; nothing is fetched.

        Raises:
            UserFileError: no model goes by it, or several do; the message names where it is set.
        """
        from runner.checkpoint import names

        try:
            names.refuse_missing(self.name)
            names.meaning(self.name)
        except RunnerError as error:
            raise UserFileError(f"{error} (set as the default in {self.source})") from error
        return self.name


def settings_path() -> Path:
    """Where the file lies."""
    return config_directory() / "config.toml"


def default_model() -> DefaultModel | None:
    """The default model; an empty variable or setting is none.

    Raises:
        UserFileError: the file is damaged, or has a key that is not understood and no default.
    """
    if named := os.environ.get(VARIABLE):
        return DefaultModel(named, VARIABLE)
    path = settings_path()
    named = _read(path).get("model") if os.path.lexists(path) else None
    return DefaultModel(named, str(path)) if named else None


def _read(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        with path.open("rb") as file:
            settings = tomllib.loads(file.read(MAX_BYTES).decode("utf-8"))
    except OSError as error:
        raise UserFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise UserFileError(f"{path}: not valid TOML: {error}") from error
    for key in sorted(settings.keys() - KEYS):
        told = f"{path}: {quoted(key)} is not a setting: there is {', '.join(KEYS)}"
        if "model" not in settings:  # most likely it means that
            raise UserFileError(told)
        terminal.note_once(told, "yellow")
    for key in KEYS & settings.keys():
        if not isinstance(settings[key], str):
            raise UserFileError(f"{path}: {key} must be a text in quotes, not {quoted(repr(settings[key]))}")
    return settings
