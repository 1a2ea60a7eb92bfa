"""The seam between the command line and the engine: commands load models here, and import the engine only then."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runner.cli import terminal
from runner.errors import RunnerWarning, UsageError

if TYPE_CHECKING:
    from runner.answer import Chunk, Timings
    from runner.engine.part import Part
    from runner.language_model import LanguageModel


UNTOLD = "balanced"
"""The preset for a model whose files say nothing of sampling."""


def open_model(
    model: str,
    dtype: str | None,
    adapters: Sequence[str] | None = None,
    context: int | None = None,
    *,
    mtp: bool = False,
    activations: str = "exact",
) -> LanguageModel:
    """Load `model` as `runner.load` does, with a progress bar if stderr is a terminal.

    Raises:
        BackendError: MLX cannot run here; checked before anything is read.
        RunnerError: see `runner.load`.
    """
    from runner.ops import backend

    backend.require()
    import runner
    from runner.config.rope import LONGEST

    if context is not None and context > LONGEST:
        raise UsageError(f"--context must be at most {LONGEST}, not {context}")
    # The same sentences as warnings would come with this file's name and line.
    part = leading(model=model, dtype=dtype, activations=activations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunnerWarning)
        lm = runner.load(
            model, dtype=dtype, adapters=adapters or (), context_length=context, mtp=mtp, progress=sys.stderr.isatty(),
            activations=activations, part=part,
        )  # fmt: skip
    for note in lm.notes:
        terminal.note_once(note, "yellow")  # however many models a command loads
    if lm.device.notice is not None:
        terminal.note_once(f"{lm.device.notice} ('runner doctor' says more)", "yellow")
    return lm


def leading(**what: Any) -> Part | None:
    """This process's part of the model that `what` describes, if `runner launch` has started it; else None.

    Raises:
        BackendError: another rank has not come, or has other versions.
        UsageError: the run has a model already.
    """
    if not shared_out():
        return None
    from runner.cli import rank  # only for those who are one of several

    return rank.lead(what)


def shared_out() -> bool:
    """Whether `runner launch` shares the model of this command out over several processes."""
    return "RUNNER_RANKS" in os.environ


def sampling_of(lm: LanguageModel, given: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return the keywords `given` for an answer, with the preset `UNTOLD` where nothing says how, and a note on it.

    A model whose files say nothing would be decoded greedily, and small ones then repeat themselves for ever. A
    temperature that was asked for, or a preset, which has one, decides instead.
    """
    if lm.defaults.says_sampling or "temperature" in given:
        return dict(given), None
    from runner import resources

    note = f"(the model's files say nothing of sampling: --preset {UNTOLD}; --temp 0 takes the likeliest tokens)"
    return {**resources.read("sampling", UNTOLD), **given}, note


def length_note(lm: LanguageModel, last: Chunk, max_tokens: int | None) -> str:
    """What ended an answer whose `finish_reason` is "length": the option, the model's own limit, or the context."""
    if max_tokens is not None:
        return "--max-tokens reached"
    timings, own = last.timings, lm.defaults
    used = 0 if timings is None else timings.cached_tokens + timings.prompt_tokens + timings.generation_tokens
    if used < lm.context_length and (own.max_new_tokens or own.max_length):
        name = "max_length" if own.max_new_tokens is None else "max_new_tokens"
        return f"{name} of the model's generation_config.json reached: --max-tokens overrides it"
    return f"the context window of {lm.context_length} tokens is full"


def timing_lines(timings: Timings) -> tuple[str, str, str]:
    """Format timings in mlx-lm's three lines, word for word, for comparison with it; GB is 10**9 bytes there too."""
    return (
        f"Prompt: {timings.prompt_tokens} tokens, {timings.prompt_tps:.3f} tokens-per-sec",
        f"Generation: {timings.generation_tokens} tokens, {timings.generation_tps:.3f} tokens-per-sec",
        f"Peak memory: {timings.peak_memory / 1e9:.3f} GB",
    )


def print_timings(timings: Timings | None) -> None:
    """Print the lines of `timing_lines` on stderr; nothing for None, and no memory where it is a server's."""
    if timings is not None:
        terminal.say("\n".join(timing_lines(timings)[: 3 if timings.peak_memory else 2]))


def timings_json(timings: Timings) -> dict[str, Any]:
    """Timings as a JSON object, in tokens, seconds, tokens per second and bytes."""
    return {
        "prompt_tokens": timings.prompt_tokens,
        "cached_tokens": timings.cached_tokens,
        "prompt_seconds": timings.prompt_seconds,
        "prompt_tps": timings.prompt_tps,
        "generation_tokens": timings.generation_tokens,
        "generation_seconds": timings.generation_seconds,
        "generation_tps": timings.generation_tps,
        "peak_memory": timings.peak_memory,
    }
