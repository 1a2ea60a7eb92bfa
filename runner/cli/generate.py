"""`runner generate`: one prompt, one answer, streamed."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from runner.cli import engine, prompt_file, terminal
from runner.cli.asking import AskingOptions
from runner.cli.constraint_options import ConstraintOptions
from runner.cli.history import History, Resume, keep_last_chat, model_of_last, resumed
from runner.cli.options import (
    MANY,
    OUTPUT,
    Activations,
    Adapter,
    DType,
    GivenPrompt,
    GuessOptions,
    LengthOptions,
    Model,
    NamedModel,
    SamplingOptions,
    Thinking,
    Verbose,
    Wrap,
    model_and_text,
    named_model,
)
from runner.cli.thinking import AnswerOutput
from runner.errors import UsageError

if TYPE_CHECKING:
    from runner.answer import Chunk

Prompt = Annotated[
    str | None,
    typer.Argument(
        metavar="PROMPT", help="The text; without it, or with -, stdin is read. Piped text is appended to it."
    ),
]
Logprobs = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, help="With --json: the N most likely tokens per step.", rich_help_panel=OUTPUT),
]
JsonLines = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON object per token; the last has finish_reason and timings.",
        rich_help_panel=OUTPUT,
    ),
]
File = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Answer the prompts of a file of JSON lines, many at once: texts, or objects with prompt or messages.",
        show_default=False,
        rich_help_panel=MANY,
    ),
]
To = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="FILE",
        help="Write the answers there, a JSON line each, and go on behind those that it has; default: to stdout.",
        show_default=False,
        rich_help_panel=MANY,
    ),
]


def generate(
    model: Model = None,
    prompt: Prompt = None,
    *,
    named: NamedModel = None,
    given: GivenPrompt = None,
    asking: AskingOptions,
    resume: Resume = False,
    history: History = True,
    dtype: DType = None,
    activations: Activations = "exact",
    adapter: Adapter = None,
    sampling: SamplingOptions,
    length: LengthOptions,
    form: ConstraintOptions,
    guesses: GuessOptions,
    as_json: JsonLines = False,
    logprobs: Logprobs = None,
    thinking: Thinking = None,
    wrap: Wrap = True,
    verbose: Verbose = False,
    file: File = None,
    to: To = None,
) -> None:
    """Generate text from a prompt and print it as it comes."""
    needing = {"thinking": thinking, "continue": resume or None}
    asking.check(**needing)
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs is printed in the JSON output only: add --json")
    if file is not None:
        alone = {"-c": resume, "--json": as_json, "--logprobs": logprobs is not None, "-p": given is not None}
        for option in (name for name, value in alone.items() if value):
            raise UsageError(f"{option} is for one prompt: leave it out with --file")
        if prompt is not None:
            raise UsageError("the prompts are those of --file: name the model alone")
    elif to is not None:
        raise UsageError("--output is for the answers to --file: add it")
    last_chat = resumed(resume, history)
    named = model_of_last((model, prompt), named, last_chat)
    constraint = form.constraint()
    guesses.check()
    if file is not None:
        asked, answers = prompt_file.read(file), prompt_file.Answers(to)
        answers.open(asked)
        lm = engine.open_model(
            named_model(model, named), dtype, adapter, length.context, mtp=guesses.mtp, activations=activations
        )
        keywords = {
            **sampling.keywords(None),
            **length.keywords(),
            **guesses.keywords(dtype, activations),
            "constraint": constraint,
        }
        keywords, untold = engine.sampling_of(lm, keywords)
        if untold is not None:
            terminal.note(untold)
        told = engine.print_timings if verbose else lambda timings: None
        prompt_file.answer_all(lm, asked, answers, asking, thinking, keywords, told)
        return
    model, prompt = model_and_text((model, prompt), named, given, option="-p")
    if prompt is None and not terminal.stdin_is_piped():
        no_prompt(model)
    text = terminal.prompt_text(prompt)
    keywords = {**sampling.keywords(logprobs), **length.keywords(), "constraint": constraint}
    lm = engine.open_model(model, dtype, adapter, length.context, mtp=guesses.mtp, activations=activations)
    keywords |= guesses.keywords(dtype, activations)
    status = terminal.Status()
    output = terminal.Output(wrap=wrap and not as_json)
    shown = AnswerOutput(output, status, thinking)
    last: Chunk | None = None
    said = ""
    keywords, untold = engine.sampling_of(lm, keywords)
    try:
        messages = asking.messages(lm, text, last_chat.messages if last_chat is not None else [], **needing)
        chunks = asking.stream(lm, text, messages, thinking, on_prefill=status.prefill, **keywords)
        if untold is not None:
            terminal.note(untold)
        for last in chunks:
            said += last.text
            if as_json:
                status.clear()
                output.line(json.dumps(chunk_json(last, reasoning=thinking != "hide"), allow_nan=False))
            else:
                shown.write(last)
    finally:
        status.clear()
        output.flush()
    shown.end()
    if said and messages is not None and history and (resume or sys.stdout.isatty()):
        keep_last_chat(model, [*messages, {"role": "assistant", "content": said}], noted=resume)
    if shown.unanswered:
        terminal.note("(only reasoning and no answer: --thinking show prints it, a larger --max-tokens leaves it room)")
    if last is not None and last.finish_reason == "length" and length.max_tokens is None:
        terminal.note(f"({engine.length_note(lm, last, length.max_tokens)})")
    if verbose and last is not None:
        engine.print_timings(last.timings)


def no_prompt(model: str) -> NoReturn:
    """Say that nothing is asked of `model`; a word that is no model, and may be the prompt, is named as that first.

    Raises:
        HubError: `model` is nothing that is known.
        UsageError: it is, or may be.
    """
    from runner.checkpoint.names import checked_target

    checked_target(model)
    raise UsageError(f"the prompt is empty: {model!r} is the model; pass the prompt as an argument, or pipe it in")


def chunk_json(chunk: Chunk, *, reasoning: bool = True) -> dict[str, Any]:
    """Make the object of one `--json` line. The logarithm of probability 0 is null, as JSON has no infinity.

    Text that is `reasoning` is added where there is some.
    """
    line: dict[str, Any] = {"text": chunk.text, "token": chunk.token, "logprob": finite(chunk.logprob)}
    if reasoning and chunk.reasoning:
        line["reasoning"] = chunk.reasoning
    if chunk.top_logprobs is not None:
        line["top_logprobs"] = [{"token": token, "logprob": finite(value)} for token, value in chunk.top_logprobs]
    if chunk.finish_reason is not None:
        line["finish_reason"] = chunk.finish_reason
    if chunk.timings is not None:
        line["timings"] = engine.timings_json(chunk.timings)
    return line


def finite(value: float | None) -> float | None:
    """Return `value`, or None if it is infinite or NaN, which JSON cannot express."""
    return value if value is not None and math.isfinite(value) else None
