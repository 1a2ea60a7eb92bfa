"""`runner serve`: models behind HTTP, for the clients that people and agents already use."""

from __future__ import annotations

import functools
import logging
import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from runner.cli import completion, engine, terminal
from runner.cli.options import Activations, DType, named_model
from runner.cli.serve_config import Config
from runner.cli.serve_options import AnswerOptions, ModelOptions, WhereOptions, WhoOptions, pair
from runner.errors import RunnerWarning, UsageError

if TYPE_CHECKING:
    from runner.server.limits import Options
    from runner.server.local import LocalModels

NEEDS = ("starlette", "uvicorn", "msgspec", "prometheus_client")


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
    where: WhereOptions,
    who: WhoOptions,
    models: ModelOptions,
    answers: AnswerOptions,
    dtype: DType = None,
    activations: Activations = "exact",
    config: Config = None,
) -> None:
    """Serve models over HTTP by the APIs of OpenAI, Anthropic and Ollama."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"runner serve needs {', '.join(missing).replace('_', '-')}: pip install 'mlx-runner[serve]' brings it"
        )
    names = list(dict.fromkeys(model or ())) or [named_model(None, None)]
    models.check(names)
    if engine.shared_out():
        models.check_shared(names, answers)
    aliases = models.aliases(names)
    options = options_of(where, who, answers)
    from runner.server.process import listening, serve_on
    from runner.server.serving import Serving

    made = listening(options)  # a port that is taken is said before minutes of loading
    local = local_models(models, names, dtype, activations)
    shown, words = add_models(local, names, models)
    others = {**words, **{alias: shown[name] for alias, name in aliases.items()}}
    others = {other: model for other, model in others.items() if other not in local.served}
    log_to_stderr(options.log_level)
    pull = local.pull if models.allow_pull else None
    serving = Serving(list(local.served.values()), options, others, pull)
    first = shown[names[0]]
    code = serve_on(made, serving, lambda address, _end: welcome(address, first, options.api_key is not None))
    if code:
        raise typer.Exit(code)


def local_models(models: ModelOptions, names: Sequence[str], dtype: str | None, activations: str) -> LocalModels:
    """What is to hold the models; only the draft model is loaded yet."""
    from runner.config.rope import LONGEST
    from runner.ops import backend

    backend.require()
    if models.context is not None and models.context > LONGEST:
        raise UsageError(f"--context must be at most {LONGEST}, not {models.context}")
    from runner.server.local import LocalModels
    from runner.server.pool import Pool

    keep = math.inf if models.keep_alive is None else models.keep_alive
    pool = Pool(models.memory, keep=keep, cache_dir=models.cache_dir, cache_size=models.cache_size)
    draft = None if models.draft is None else engine.open_model(models.draft, dtype, activations=activations)
    lead = functools.partial(engine.leading, model=names[0], dtype=dtype, activations=activations)
    return LocalModels(
        pool, dtype=dtype, activations=activations, context=models.context, draft=draft,
        lead=lead if engine.shared_out() else None,
    )  # fmt: skip


def add_models(local: LocalModels, names: Sequence[str], models: ModelOptions) -> tuple[dict[str, str], dict[str, str]]:
    """Add the models of the command line, and load the first one and those that are pinned.

    Returns the name that clients are shown for each (a path is not for their eyes), and what else they may say for it:
    the words of the command line, and the models' own names.

    Raises:
        RunnerError: a model is missing, unknown or inconsistent, or there is not memory enough for it.
    """
    from runner.checkpoint.model_files import name_of
    from runner.checkpoint.names import resolve

    warnings.simplefilter("ignore", RunnerWarning)  # the same sentences are notes here
    local.progress = sys.stderr.isatty()
    paths = {name: resolve(name, progress=local.progress) for name in names}
    own = {name: name_of(path) for name, path in paths.items()}
    shown = {name: own[name] if os.sep in name and Path(name).exists() else name for name in names}
    adapters = adapters_of(models, names, own, local.progress)
    pinned = models.pin or ()
    slots = {
        name: local.add(shown[name], path, pinned=name in pinned, adapters=adapters[name])
        for name, path in paths.items()
    }
    for note in local.notes:
        terminal.note(note, "yellow")
    for name in dict.fromkeys([*pinned, names[0]]):
        local.pool.load(slots[name])
    local.progress = False
    others = {other: shown[name] for name in reversed(names) for other in (own[name], name)}
    return shown, others


def adapters_of(
    models: ModelOptions, names: Sequence[str], own: Mapping[str, str], progress: bool
) -> dict[str, dict[str, Path]]:
    """For each model the directories of its adapters, by the names that they are served under.

    Raises:
        UsageError: an adapter's name is taken, or its config does not say which of several models it is for.
    """
    from runner.adapters.files import CONFIG
    from runner.checkpoint.hub import resolve_adapter
    from runner.local_files import path_in, quoted, read_json

    found: dict[str, dict[str, Path]] = {name: {} for name in names}
    for each in models.adapter or ():
        called, spec = pair(each, "--adapter", "NAME=PATH")
        path = resolve_adapter(spec, progress=progress)
        bases = list(names)
        if len(bases) > 1:
            config = read_json(path_in(path, CONFIG))
            base = str(config.get("base_model_name_or_path") or config.get("model") or "")
            bases = [name for name in names if base and base.rpartition("/")[2] in (own[name], name.rpartition("/")[2])]
            if len(bases) != 1:
                raise UsageError(
                    f"--adapter {each}: its config names {quoted(base)} as its base, which is "
                    f"{'several' if bases else 'none'} of the models that are served ({', '.join(names)})"
                )
        taken = [*names, *own.values(), *(other for one in found.values() for other in one)]
        if called in taken or path in found[bases[0]].values():
            raise UsageError(f"--adapter {each}: {called!r} is taken, or the adapter has another name already")
        found[bases[0]][called] = path
    return found


def log_to_stderr(level: str) -> None:
    """Have the server's log on stderr, and of uvicorn's only errors."""
    from runner.server.log import LOG

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for logger in (logging.getLogger(LOG), logging.getLogger("uvicorn.error")):
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper() if logger.name == LOG else "ERROR")


def options_of(where: WhereOptions, who: WhoOptions, answers: AnswerOptions) -> Options:
    """How to serve; raises UsageError and UserFileError."""
    from runner.server.limits import Options

    options = Options(
        host=where.host,
        port=where.port,
        uds=where.uds,
        root_path=where.root,
        api_key=who.key(),
        allow_hosts=tuple(who.allow_host or ()),
        allow_origins=tuple(origin.rstrip("/") for origin in who.allow_origin or ()),
        max_queue=answers.max_queue,
        unknown_fields=answers.unknown_fields,
        on_engine_failure=answers.on_engine_failure,
        shutdown_timeout=answers.shutdown_timeout,
        log_level=answers.log_level,
    )
    if not options.loopback and options.api_key is None and not who.no_auth:
        raise UsageError(
            f"--host {where.host} lets other machines in: set a key (--api-key-file or RUNNER_API_KEY), "
            "or say --no-auth"
        )
    return options


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
