"""The options of `runner serve`, by what they decide."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from runner.cli import completion
from runner.errors import UsageError, UserFileError
from runner.server.durations import seconds_of

KEY = "RUNNER_API_KEY"
MAX_KEY = 4096

WHERE = "Where it listens"
WHO = "Who may ask"
WHAT = "Which models, and their memory"
HOW = "How it answers"


def size(text: str) -> int:
    """Bytes of a size such as 6GB, 512MB or a number; raises typer's BadParameter."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", str(text).strip().lower())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no size, such as 6GB or 512MiB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " "))


def duration(text: str) -> float:
    """Seconds of a duration such as 5m; raises typer's BadParameter."""
    try:
        return seconds_of(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class WhereOptions:
    """Options for the address."""

    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.", rich_help_panel=WHERE)] = (
        "127.0.0.1"
    )
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port; 0 takes a free one.", rich_help_panel=WHERE)
    ] = 8080
    uds: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Listen on a Unix socket, for this account alone.", rich_help_panel=WHERE),
    ] = None
    root_path: Annotated[
        str, typer.Option(metavar="/PATH", help="Prefix of all paths, behind a proxy.", rich_help_panel=WHERE)
    ] = ""

    @property
    def root(self) -> str:
        """The prefix without a slash at its end; raises UsageError where it has none at its beginning."""
        root = self.root_path.rstrip("/")
        if root and not root.startswith("/"):
            raise UsageError(f"--root-path must begin with a slash, not {self.root_path!r}")
        return root


@dataclass(frozen=True, kw_only=True)
class WhoOptions:
    """Options for who is let in."""

    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"Ask clients for the key in this file (or in {KEY}); a key is never an argument.",
            rich_help_panel=WHO,
        ),
    ] = None
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Listen beyond this machine without a key.", rich_help_panel=WHO)
    ] = False
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Answer requests addressed to this name, too; may be repeated.",
            rich_help_panel=WHO,
        ),
    ] = None
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", help="Answer requests of this site's pages, too; may be repeated.", rich_help_panel=WHO
        ),
    ] = None

    def key(self) -> str | None:
        """The key that clients must show; raises as `api_key`, and UsageError where none was to be asked for."""
        key = api_key(self.api_key_file)
        if self.no_auth and key is not None:
            raise UsageError("--no-auth and a key were given: leave one out")
        return key


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options for the models that are served."""

    alias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=MODEL", help="Call a model by another name, too; may be repeated.", rich_help_panel=WHAT
        ),
    ] = None
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Serve a LoRA adapter on its base under a name of its own; may be repeated.",
            rich_help_panel=WHAT,
        ),
    ] = None
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            autocompletion=completion.models,
            help="Guess tokens by a smaller model with the same vocabulary; answers stay the same.",
            rich_help_panel=WHAT,
        ),
    ] = None
    allow_pull: Annotated[
        bool,
        typer.Option(
            "--allow-pull",
            help="Let clients have models fetched from the hub, by Ollama's /api/pull.",
            rich_help_panel=WHAT,
        ),
    ] = False
    pin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Load this one of several models at the start, and never unload it; may be repeated.",
            rich_help_panel=WHAT,
        ),
    ] = None
    keep_alive: Annotated[
        float | None,
        typer.Option(
            metavar="DURATION",
            parser=duration,
            help="Unload a model that nobody has used for so long, as 5m. Default: only where others need its memory.",
            rich_help_panel=WHAT,
        ),
    ] = None
    memory: Annotated[
        int | None,
        typer.Option(
            metavar="SIZE",
            parser=size,
            help="Let weights, answers and kept prompts take so much, as 6GB. Default: what this machine allows.",
            rich_help_panel=WHAT,
        ),
    ] = None
    context: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Hold N tokens, prompt and answer together.", rich_help_panel=WHAT),
    ] = None
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep what was computed for prompts here, for those that begin alike after a restart.",
            rich_help_panel=WHAT,
        ),
    ] = None
    cache_size: Annotated[
        int | None,
        typer.Option(
            metavar="SIZE",
            parser=size,
            help="Let the files there take so much; those used longest ago go first. Default: 8GiB.",
            rich_help_panel=WHAT,
        ),
    ] = None

    def check(self, names: Sequence[str]) -> None:
        """Refuse what does not go together, before a model is loaded in vain; raises UsageError."""
        if self.cache_size is not None and self.cache_dir is None:
            raise UsageError("--cache-size is of no use without --cache-dir")
        for name in self.pin or ():
            if name not in names:
                raise UsageError(f"--pin {name}: none of the models that are served ({', '.join(names)})")

    def check_shared(self, names: Sequence[str], answers: AnswerOptions) -> None:
        """Refuse what cannot be done with a model that is shared out over processes; raises UsageError."""
        given = {
            "a second model": len(names) > 1,
            "--adapter": self.adapter,
            "--draft": self.draft is not None,
            "--allow-pull": self.allow_pull,
            "--keep-alive": self.keep_alive is not None,
            "--cache-dir": self.cache_dir is not None,
            "--on-engine-failure restart": answers.on_engine_failure == "restart",
        }
        for name, is_given in given.items():
            if is_given:
                raise UsageError(f"a model that is shared out over processes is served alone: leave out {name}")

    def aliases(self, names: Sequence[str]) -> dict[str, str]:
        """Other names of the models `names`; raises UsageError."""
        result: dict[str, str] = {}
        for each in self.alias or ():
            name, model = pair(each, "--alias", "NAME=MODEL")
            if model not in names:
                raise UsageError(
                    f"--alias {each}: {model!r} is none of the models that are served ({', '.join(names)})"
                )
            if name in result or name in names:
                raise UsageError(f"--alias {each}: {name!r} is taken")
            result[name] = model
        return result


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """Options for how requests are answered, and how the process behaves."""

    max_queue: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Refuse more than N answers at a time, with 429.", rich_help_panel=HOW),
    ] = 256
    unknown_fields: Annotated[
        Literal["refuse", "warn"],
        typer.Option(
            metavar="refuse|warn",
            help="Refuse a request with a field that is not known, or leave the field out and say so.",
            rich_help_panel=HOW,
        ),
    ] = "refuse"
    on_engine_failure: Annotated[
        Literal["exit", "restart"],
        typer.Option(
            metavar="exit|restart",
            help="After an error in the engine exit with 1, for whatever supervises, or begin anew in this process.",
            rich_help_panel=HOW,
        ),
    ] = "exit"
    shutdown_timeout: Annotated[
        float,
        typer.Option(metavar="S", min=1, help="After SIGTERM let answers go on for S seconds.", rich_help_panel=HOW),
    ] = 30.0
    log_level: Annotated[
        Literal["error", "warning", "info", "debug"],
        typer.Option(
            metavar="LEVEL",
            help="error, warning, info (a line for each request) or debug (with the texts of requests).",
            rich_help_panel=HOW,
        ),
    ] = "info"


def pair(text: str, option: str, form: str) -> tuple[str, str]:
    """The two sides of NAME=VALUE; raises UsageError."""
    name, sign, value = text.partition("=")
    if not sign or not name or not value:
        raise UsageError(f"{option} takes {form}, not {text!r}")
    return name, value


def api_key(path: Path | None) -> str | None:
    """The key of a server, from a file or the environment; None: there is none.

    Raises:
        UserFileError: the file cannot be read, or holds no key.
    """
    if path is None:
        key, where = os.environ.get(KEY), KEY
        if not key:
            return None
    else:
        where = f"--api-key-file {path}"
        try:
            with path.open(encoding="utf-8") as file:
                key = file.read(MAX_KEY + 1).strip()
        except (OSError, ValueError) as error:
            raise UserFileError(f"{where}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not key or len(key) > MAX_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise UserFileError(f"{where}: a key is one line of letters, digits and signs, without spaces")
    return key
