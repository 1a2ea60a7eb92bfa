"""`runner generate`: one prompt, one answer, streamed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runner.cli import engine, terminal
from runner.cli.options import (
    OUTPUT,
    Adapter,
    DType,
    LengthOptions,
    Model,
    NamedModel,
    SamplingOptions,
    System,
    Thinking,
    Verbose,
    model_and_text,
)
from runner.cli.thinking import AnswerOutput
from runner.errors import UsageError

if TYPE_CHECKING:
    from runner.answer import Chunk
    from runner.language_model import LanguageModel

Prompt = Annotated[
    str | None,
    typer.Argument(
        metavar="PROMPT", help="The text; without it, or with -, stdin is read. Piped text is appended to it."
    ),
]
GivenPrompt = Annotated[
    str | None, typer.Option("--prompt", "-p", metavar="PROMPT", help="The same as PROMPT, by option.")
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--raw",
        help="Ask through the model's chat template, or let the model continue the text as it is. "
        "Default: --chat if the model has a template, else --raw with a note.",
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


def generate(
    model: Model = None,
    prompt: Prompt = None,
    *,
    named: NamedModel = None,
    given: GivenPrompt = None,
    chat: Chat = None,
    system: System = None,
    dtype: DType = None,
    adapter: Adapter = None,
    sampling: SamplingOptions,
    length: LengthOptions,
    as_json: JsonLines = False,
    logprobs: Logprobs = None,
    thinking: Thinking = None,
    verbose: Verbose = False,
) -> None:
    """Generate text from a prompt and print it as it comes."""
    if chat is False and system is not None:
        raise UsageError("--system needs the chat template: leave out --raw")
    if chat is False and thinking is not None:
        raise UsageError("--thinking needs the chat template, as raw text has no reasoning apart: leave out --raw")
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs is printed in the JSON output only: add --json")
    model, prompt = model_and_text((model, prompt), named, given, option="-p")
    text = terminal.prompt_text(prompt)
    keywords = {**sampling.keywords(logprobs), **length.keywords()}
    lm = engine.open_model(model, dtype, adapter, length.context)
    if thinking is not None and not lm.tokenizer.has_chat_template:
        raise UsageError("--thinking needs a chat template, and this model has none: leave it out")
    status = terminal.Status()
    output = terminal.Output()
    shown = AnswerOutput(output, status, thinking)
    last: Chunk | None = None
    keywords, untold = engine.sampling_of(lm, keywords)
    try:
        chunks = answer(lm, text, chat, system, on_prefill=status.prefill, **keywords)
        if untold is not None:
            terminal.note(untold)
        for last in chunks:
            if as_json:
                status.clear()
                output.line(json.dumps(chunk_json(last, reasoning=thinking != "hide"), allow_nan=False))
            else:
                shown.write(last)
    finally:
        status.clear()
    shown.end()
    if shown.unanswered:
        terminal.note("(only reasoning and no answer: --thinking show prints it, a larger --max-tokens leaves it room)")
    if last is not None and last.finish_reason == "length" and length.max_tokens is None:
        terminal.note(f"({engine.length_note(lm, last, length.max_tokens)})")
    if verbose and last is not None:
        engine.print_timings(last.timings)


def answer(lm: LanguageModel, text: str, chat: bool | None, system: str | None, **keywords: Any) -> Iterator[Chunk]:
    """Stream the answer, through the chat template or as a raw continuation; `chat` None: as the model allows.

    Where the model has no template and neither way was asked for, a note on stderr says that the text is continued.
    """
    templated = lm.tokenizer.has_chat_template
    if chat is None and system is not None and not templated:
        raise UsageError("--system needs a chat template, and this model has none")
    if chat or (chat is None and templated):
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": terminal.checked_utf8(system, "--system")})
        return lm.chat_stream(messages, **keywords)
    if chat is None:
        terminal.note("(no chat template: the text is continued as it is; --raw asks for that)")
    return lm.stream(text, **keywords)


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
