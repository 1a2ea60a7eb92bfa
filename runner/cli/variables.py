"""Variables of the environment that stand for options: RUNNER_TOP_P for --top-p.

A variable counts where the command line says nothing, and an empty one not at all. Only those that an option declares
are read: CI systems set others that begin with RUNNER_ (RUNNER_OS, RUNNER_TEMP, ...), which are none of our business.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from typing import Any

from typer.core import TyperOption

PREFIX = "RUNNER_"


def variable(option: str) -> dict[str, Any]:
    """Keywords of `typer.Option` that let RUNNER_OPTION set `--option`; help pages, long as they are, leave it out."""
    return {"envvar": PREFIX + option.removeprefix("--").replace("-", "_").upper(), "show_envvar": False}


def let_preset_win(context: Any, names: Collection[str]) -> None:
    """Drop values of the options `names` that variables gave, where the command line names a preset, which has its own.

    Else `--preset greedy` would not be greedy for someone whose profile sets RUNNER_TEMPERATURE.
    """
    if _source(context, "preset") != "COMMANDLINE":
        return
    for name in names:
        if _source(context, name) == "ENVIRONMENT":
            context.params[name] = None


def typed(context: Any, names: Collection[str]) -> str | None:
    """The first of the options `names`, by parameter, that the command line has, as it is written there; None: none."""
    for option in context.command.params:
        if option.name in names and _source(context, option.name) == "COMMANDLINE":
            return str(option.opts[0])
    return None


def _source(context: Any, name: str) -> str | None:
    """Where the value of an option is from, in click's words; None if the command has no such option."""
    source = context.get_parameter_source(name)
    return None if source is None else str(source.name)


def blamed(context: Any, message: str, parameter: Any = None) -> str:
    """Return `message`, and behind it the variables that gave the options in it their values.

    Args:
        context: typer's context of the command whose error this is.
        parameter: the option that the error is about, where that is known; None: those that the message names.
    """
    found = []
    for option in context.command.params:
        if not isinstance(option, TyperOption) or option.envvar is None:
            continue
        if _source(context, option.name) != "ENVIRONMENT":
            continue
        # By its name, the option's or the parameter's, or by its value in quotes.
        names = "|".join(re.escape(name) for name in (option.name, *option.opts, *option.secondary_opts))
        named = re.search(rf"(?<![\w-])({names})(?![\w-])", message) or repr(os.environ[str(option.envvar)]) in message
        if option is parameter or (parameter is None and named):
            found.append(str(option.envvar))
    return f"{message} (set by {' and '.join(found)})" if found else message
