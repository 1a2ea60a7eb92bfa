"""`runner serve`: a model behind HTTP, for the clients that people and agents already use."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from runner.cli import completion, engine, terminal
from runner.cli.options import DType, named_model
from runner.errors import UsageError, UserFileError
from runner.local_files import quoted

if TYPE_CHECKING:
    from runner.language_model import LanguageModel
    from runner.server.limits import Options

KEY = "RUNNER_API_KEY"
MAX_KEY = 4096
MAX_CONFIG = 1 << 20
NEEDS = ("starlette", "uvicorn", "msgspec", "prometheus_client")

WHERE = "Where it listens"
WHO = "Who may ask"
HOW = "How it answers"


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


def size(text: str) -> int:
    """Bytes of a size such as 6GB, 512MB or a number; raises typer's BadParameter."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", str(text).strip().lower())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no size, such as 6GB or 512MiB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " "))


@dataclass(frozen=True)
class Kept:
    """Where what was computed is kept: bytes of memory in all, and a directory and the bytes of its files."""

    memory: int | None
    directory: Path | None
    size: int | None


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


def serve(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="Models as in the other commands. Default: what RUNNER_MODEL or the config file says.",
            show_default=False,
            autocompletion=completion.models,
        ),
    ] = None,
    *,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on.", rich_help_panel=WHERE)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port; 0 takes a free one.", rich_help_panel=WHERE)
    ] = 8080,
    uds: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Listen on a Unix socket, for this account alone.", rich_help_panel=WHERE),
    ] = None,
    root_path: Annotated[
        str, typer.Option(metavar="/PATH", help="Prefix of all paths, behind a proxy.", rich_help_panel=WHERE)
    ] = "",
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"Ask clients for the key in this file (or in {KEY}); a key is never an argument.",
            rich_help_panel=WHO,
        ),
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Listen beyond this machine without a key.", rich_help_panel=WHO)
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Answer requests addressed to this name, too; may be repeated.",
            rich_help_panel=WHO,
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", help="Answer requests of this site's pages, too; may be repeated.", rich_help_panel=WHO
        ),
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=MODEL", help="Call a model by another name, too; may be repeated.", rich_help_panel=HOW
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Hold N tokens, prompt and answer together.", rich_help_panel=HOW),
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(
            metavar="SIZE",
            parser=size,
            help="Let weights, answers and kept prompts take so much, as 6GB. Default: what this machine allows.",
            rich_help_panel=HOW,
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep what was computed for prompts here, for those that begin alike after a restart.",
            rich_help_panel=HOW,
        ),
    ] = None,
    cache_size: Annotated[
        int | None,
        typer.Option(
            metavar="SIZE",
            parser=size,
            help="Let the files there take so much; those used longest ago go first. Default: 8GiB.",
            rich_help_panel=HOW,
        ),
    ] = None,
    dtype: DType = None,
    max_queue: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Refuse more than N answers at a time, with 429.", rich_help_panel=HOW),
    ] = 256,
    unknown_fields: Annotated[
        Literal["refuse", "warn"],
        typer.Option(
            metavar="refuse|warn",
            help="Refuse a request with a field that is not known, or leave the field out and say so.",
            rich_help_panel=HOW,
        ),
    ] = "refuse",
    on_engine_failure: Annotated[
        Literal["exit", "restart"],
        typer.Option(
            metavar="exit|restart",
            help="After an error in the engine exit with 1, for whatever supervises, or begin anew in this process.",
            rich_help_panel=HOW,
        ),
    ] = "exit",
    shutdown_timeout: Annotated[
        float,
        typer.Option(metavar="S", min=1, help="After SIGTERM let answers go on for S seconds.", rich_help_panel=HOW),
    ] = 30.0,
    log_level: Annotated[
        Literal["error", "warning", "info", "debug"],
        typer.Option(
            metavar="LEVEL",
            help="error, warning, info (a line for each request) or debug (with the texts of requests).",
            rich_help_panel=HOW,
        ),
    ] = "info",
    config: Config = None,
) -> None:
    """Serve models over HTTP: OpenAI's API, with every option obeyed or refused."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"runner serve needs {', '.join(missing).replace('_', '-')}: pip install 'mlx-runner[serve]' brings it"
        )
    from runner.server.limits import Options

    names = list(model or ()) or [named_model(None, None)]
    options = Options(
        host=host,
        port=port,
        uds=uds,
        root_path=_root(root_path),
        api_key=api_key(api_key_file),
        allow_hosts=tuple(allow_host or ()),
        allow_origins=tuple(origin.rstrip("/") for origin in allow_origin or ()),
        max_queue=max_queue,
        unknown_fields=unknown_fields,
        on_engine_failure=on_engine_failure,
        shutdown_timeout=shutdown_timeout,
        log_level=log_level,
    )
    if not options.loopback and options.api_key is None and not no_auth:
        raise UsageError(f"--host {host} lets other machines in: set a key (--api-key-file or {KEY}), or say --no-auth")
    if no_auth and options.api_key is not None:
        raise UsageError("--no-auth and a key were given: leave one out")
    if cache_size is not None and cache_dir is None:
        raise UsageError("--cache-size is of no use without --cache-dir")
    kept = Kept(memory, cache_dir, cache_size)
    run(names, options, _aliases(alias or (), names), dtype, context, kept)


def run(
    names: list[str],
    options: Options,
    aliases: dict[str, str],
    dtype: str | None,
    context: int | None,
    kept: Kept,
) -> None:
    """Load the models and serve them."""
    from runner.server.backend import Engines, LocalBackend
    from runner.server.model import Served
    from runner.server.process import listening, serve_on
    from runner.server.serving import LOG, Serving

    made = listening(options)  # a port that is taken is said before minutes of loading
    loaded: dict[str, LanguageModel] = {}
    for name in dict.fromkeys(names):
        lm = engine.open_model(name, dtype, None, context)
        shown = lm.name if os.sep in name and Path(name).exists() else name
        if shown in loaded:
            raise UsageError(f"two models are called {shown}: name one by another path, or serve it by itself")
        loaded[shown] = lm
        aliases = {other: shown if model == name else model for other, model in aliases.items()}
        aliases |= {other: shown for other in (name, lm.name) if other not in (shown, *aliases)}
    shared = Engines(loaded, kept.memory, kept.directory, kept.size)
    models = [Served(LocalBackend(lm, name, shared)) for name, lm in loaded.items()]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for logger in (logging.getLogger(LOG), logging.getLogger("uvicorn.error")):
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(options.log_level.upper() if logger.name == LOG else "ERROR")
    serving = Serving(models, options, {name: shown for name, shown in aliases.items() if name != shown})
    code = serve_on(made, serving, lambda address, _end: welcome(address, models[0].name, options.api_key is not None))
    if code:
        raise typer.Exit(code)


def welcome(address: str, model: str, keyed: bool) -> None:
    """Say where the server is and how clients are pointed to it."""
    show = ' -H "Authorization: Bearer $RUNNER_API_KEY"' if keyed else ""
    key = "the key" if keyed else "any key"
    local = address.startswith("unix:")
    curl = f"curl --unix-socket {address[5:]} http://localhost" if local else f"curl {address}"
    lines = [f"serving {model} at {address}"]
    if not local:
        lines += [
            f'  openai:      OpenAI(base_url="{address}/v1", api_key="{key}")',
            f"  aider:       OPENAI_API_BASE={address}/v1 OPENAI_API_KEY={key!r} aider --model openai/{model}",
            f"  Open WebUI:  OPENAI_API_BASE_URL={address}/v1 OPENAI_API_KEY={key!r}",
        ]
    ask = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    lines.append(f"  {curl}/v1/chat/completions{show} -d '{ask}'")
    terminal.say("\n".join(lines))


def api_key(path: Path | None) -> str | None:
    """The key that clients must show, from a file or the environment; None: none is asked for.

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


def _root(text: str) -> str:
    root = text.rstrip("/")
    if root and not root.startswith("/"):
        raise UsageError(f"--root-path must begin with a slash, not {text!r}")
    return root


def _aliases(given: Iterable[str], names: list[str]) -> dict[str, str]:
    """Other names of models, by NAME=MODEL."""
    result: dict[str, str] = {}
    for each in given:
        name, sign, model = each.partition("=")
        if not sign or not name or not model:
            raise UsageError(f"--alias takes NAME=MODEL, not {each!r}")
        if model not in names:
            raise UsageError(f"--alias {each}: {model!r} is none of the models that are served ({', '.join(names)})")
        if name in result or name in names:
            raise UsageError(f"--alias {each}: {name!r} is taken")
        result[name] = model
    return result
