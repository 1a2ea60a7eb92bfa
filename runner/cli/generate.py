"""`runner generate`: one prompt, one answer, streamed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runner.cli import engine, terminal
from runner.cli.options import OUTPUT, Adapter, DType, LengthOptions, Model, SamplingOptions, System, Verbose
from runner.errors import UsageError

if TYPE_CHECKING:
    from runner.answer import Chunk
    from runner.language_model import LanguageModel

Prompt = Annotated[
    str | None,
    typer.Argument(
        metavar="PROMPT", help="The text; - or nothing reads it from stdin. Text piped in beside it is put after it."
    ),
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--raw",
        help="Ask through the model's chat template, or let it continue the text as it is. "
        "Default: --chat where the model has a template, else --raw.",
    ),
]
Logprobs = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, help="With --json: the N likeliest tokens at each step.", rich_help_panel=OUTPUT),
]
JsonLines = Annotated[
    bool,
    typer.Option(
        "--json",
        help="One JSON object a token; the last one has finish_reason and timings.",
        rich_help_panel=OUTPUT,
    ),
]


def generate(
    model: Model,
    prompt: Prompt = None,
    *,
    chat: Chat = None,
    system: System = None,
    dtype: DType = None,
    adapter: Adapter = None,
    sampling: SamplingOptions,
    length: LengthOptions,
    as_json: JsonLines = False,
    logprobs: Logprobs = None,
    verbose: Verbose = False,
) -> None:
    """Write text from a prompt, as it comes."""
    if chat is False and system is not None:
        raise UsageError("--system needs the chat template: leave out --raw")
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs is part of the JSON: add --json")
    text = terminal.prompt_text(prompt)
    keywords = {**sampling.keywords(logprobs), **length.keywords()}
    lm = engine.open_model(model, dtype, adapter)
    status = terminal.Status()
    output = terminal.Output()
    last: Chunk | None = None
    try:
        for last in answer(lm, text, chat, system, on_prefill=status.prefill, **keywords):
            status.clear()
            if as_json:
                output.line(json.dumps(chunk_json(last), allow_nan=False))
            else:
                output.write(last.text)
    finally:
        status.clear()
    output.end_line()
    if last is not None and last.finish_reason == "length" and length.max_tokens is None:
        terminal.note(f"(the context window of {lm.context_length} tokens is full)")
    if verbose and last is not None:
        engine.print_timings(last.timings)


def answer(lm: LanguageModel, text: str, chat: bool | None, system: str | None, **keywords: Any) -> Iterator[Chunk]:
    """The stream of the answer: through the chat template, or as raw continuation."""
    templated = lm.tokenizer.has_chat_template
    if chat is None and system is not None and not templated:
        raise UsageError("--system needs a chat template, and this model has none")
    if chat or (chat is None and templated):
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": terminal.checked_utf8(system, "--system")})
        return lm.chat_stream(messages, **keywords)
    return lm.stream(text, **keywords)


def chunk_json(chunk: Chunk) -> dict[str, Any]:
    """One line of `--json`. A probability of 0 has no finite logarithm, and JSON no infinity: null."""
    line: dict[str, Any] = {"text": chunk.text, "token": chunk.token, "logprob": finite(chunk.logprob)}
    if chunk.top_logprobs is not None:
        line["top_logprobs"] = [{"token": token, "logprob": finite(value)} for token, value in chunk.top_logprobs]
    if chunk.finish_reason is not None:
        line["finish_reason"] = chunk.finish_reason
    if chunk.timings is not None:
        line["timings"] = engine.timings_json(chunk.timings)
    return line


def finite(value: float | None) -> float | None:
    """`value`, or None where JSON cannot say it."""
    return value if value is not None and math.isfinite(value) else None
