"""Variables of the environment that stand for options: RUNNER_TOP_P for --top-p.

A variable counts where the command line says nothing, and an empty one not at all. Only those that an option declares
are read: CI systems set others that begin with RUNNER_ (RUNNER_OS, RUNNER_TEMP, ...), which are none of our business.
"""

from __future__ import annotations

import os
import re
from typing import Any

from typer.core import TyperOption

PREFIX = "RUNNER_"


def variable(option: str) -> dict[str, Any]:
    """Keywords of `typer.Option` that let RUNNER_OPTION set `--option`; help pages, long as they are, leave it out."""
    return {"envvar": PREFIX + option.removeprefix("--").replace("-", "_").upper(), "show_envvar": False}


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
        source = context.get_parameter_source(option.name)
        if source is None or source.name != "ENVIRONMENT":
            continue
        # By its name, the option's or the parameter's, or by its value in quotes.
        names = "|".join(re.escape(name) for name in (option.name, *option.opts))
        named = re.search(rf"(?<![\w-])({names})(?![\w-])", message) or repr(os.environ[str(option.envvar)]) in message
        if option is parameter or (parameter is None and named):
            found.append(str(option.envvar))
    return f"{message} (set by {' and '.join(found)})" if found else message
