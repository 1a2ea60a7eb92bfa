"""`runner serve --config`: options from a TOML file, under the names that they have on the command line."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

import typer

from runner.errors import UserFileError
from runner.local_files import quoted

MAX_CONFIG = 1 << 20


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Let the file at `path` give the values of options that the command line leaves out.

    Raises:
        UserFileError: it cannot be read, or has a key that is no option.
    """
    if path is None:
        return None
    import tomllib

    try:
        with path.open("rb") as file:
            settings = tomllib.loads(file.read(MAX_CONFIG).decode("utf-8"))
    except OSError as error:
        raise UserFileError(f"--config {path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserFileError(f"--config {path}: not valid TOML: {error}") from error
    known = {_key(parameter): parameter.name for parameter in context.command.params}
    known = {key: name for key, name in known.items() if key not in ("config", "help")}
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            told = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(sorted(known))}"
            raise UserFileError(f"--config {path}: {quoted(key)} is no option: {told}")
        if isinstance(value, dict):
            raise UserFileError(f"--config {path}: {key} must be a value or a list, not a table")
    values: dict[str, Any] = {str(known[key]): _texts(value) for key, value in settings.items()}
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _key(parameter: Any) -> str:
    """An option's name in the file: that of the command line without its dashes."""
    longest: str = max(parameter.opts, key=len)
    return longest.removeprefix("--").replace("_", "-")


def _texts(value: Any) -> Any:
    """A value of the file as the command line would have it."""
    if isinstance(value, list):
        return [_texts(each) for each in value]
    return value if isinstance(value, bool) else str(value)


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        is_eager=True,
        callback=read_config,
        help="Read options from a TOML file, under the same names; the command line overrides it.",
    ),
]
