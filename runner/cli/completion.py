"""What Tab completes in a shell, beside the names of commands and options, which typer knows.

`runner --install-completion` sets the shell up; from then on Tab runs `runner` with `VARIABLE` set.
"""

from __future__ import annotations

VARIABLE = "_RUNNER_COMPLETE"
FORMS = ("2", "3", "4", "5", "6", "8", "mxfp4", "mxfp8", "nvfp4")
"""The names in `runner.convert.quantize.QUANTIZATIONS`, whose import would keep a Tab key waiting."""


def models(incomplete: str) -> list[str]:
    """Names of models that begin with `incomplete`: aliases, what is stored here, and hub ids behind a slash.

    Where there is none, the shell completes paths.
    """
    from runner.checkpoint.kept import read_names
    from runner.checkpoint.names import shortest, stored_models
    from runner.errors import RunnerError

    try:
        stored = stored_models()
        names = {*read_names().aliases, *shortest(stored).values()}
    except (RunnerError, OSError):  # a Tab key has no place for messages
        return []
    if "/" in incomplete:
        names |= {model.id for model in stored}
    return sorted(name for name in names if name.startswith(incomplete))


def presets(incomplete: str) -> list[str]:
    """Names of presets for sampling that begin with `incomplete`."""
    from runner import resources

    return [name for name in resources.names("sampling") if name.startswith(incomplete)]


def models_and_shapes(incomplete: str) -> list[str]:
    """Names of models, then those of published shapes, that begin with `incomplete`."""
    from runner import resources

    return [*models(incomplete), *(name for name in resources.names("shapes") if name.startswith(incomplete))]


def forms(incomplete: str) -> list[str]:
    """Values of `--quantize` that begin with `incomplete`."""
    return [name for name in FORMS if name.startswith(incomplete)]
