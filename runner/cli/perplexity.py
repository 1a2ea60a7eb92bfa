"""`runner perplexity`: measures how well a model predicts a text, and how far its predictions are from another's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runner.cli import engine, terminal
from runner.cli.options import Activations, Adapter, AsJson, DType, Model, NamedModel, model_and_text
from runner.errors import UsageError

if TYPE_CHECKING:
    from runner.language_model import LanguageModel
    from runner.perplexity import Comparison, Estimate, Perplexity

Text = Annotated[str | None, typer.Argument(metavar="FILE", help="A text file in UTF-8.")]
GivenText = Annotated[str | None, typer.Option("--file", "-f", metavar="FILE", help="The same as FILE, by option.")]
Against = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Compare with the predictions of this model, such as the unquantized original."),
]
Chunk = Annotated[int, typer.Option(metavar="N", min=4, help="Tokens per chunk; its second half is scored.")]
Chunks = Annotated[int | None, typer.Option(metavar="N", min=1, help="Stop after N chunks.")]


def perplexity(
    model: Model = None,
    text: Text = None,
    *,
    named: NamedModel = None,
    file: GivenText = None,
    against: Against = None,
    chunk: Chunk = 512,
    chunks: Chunks = None,
    adapter: Adapter = None,
    dtype: DType = None,
    activations: Activations = "exact",
    as_json: AsJson = False,
) -> None:
    """Measure perplexity on a text, as llama-perplexity does: mean over chunks ± standard error."""
    model, name = model_and_text((model, text), named, file, option="-f")
    if name is None:
        raise UsageError("no text is named: put FILE after the model, or use -f FILE")
    words = read_text(Path(name))
    lm = engine.open_model(model, dtype, adapter, activations=activations)
    base, other = None, "the other"
    if against is not None:
        base = engine.open_model(against, dtype)
    elif activations != "exact":
        # What the rounding costs is what the option is asked about: the same model without it.
        base, other = engine.open_model(model, dtype, adapter), "exact activations"
    found, comparison = judge(lm, words, base=base, chunk=chunk, chunks=chunks)
    output = terminal.Output()
    if as_json:
        output.line(json.dumps(as_dict(found, comparison, chunk), indent=2, allow_nan=False))
        return
    judged = f"{found.tokens} tokens scored, in {found.chunks} chunks of {chunk}"
    rows = [("perplexity", f"{with_error(found.perplexity)}   {judged}")]
    if comparison is not None:
        most = f"max {comparison.kl_max:.6f}, 99.9th percentile {comparison.kl_999:.6f}"
        rows += [
            (f"perplexity of {other}", with_error(comparison.base.perplexity)),
            ("KL divergence", f"{with_error(comparison.kl_divergence, 6)}   {most}"),
            ("same most likely token", f"{with_error(comparison.same_top, 3, 100)} %"),
        ]
    width = max(len(name) for name, _ in rows)
    for name, values in rows:
        output.line(f"{name:<{width}}   {values}")


def read_text(path: Path) -> str:
    """Read a file's text; raises UsageError if it cannot be read or is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as problem:
        raise UsageError(f"{path}: cannot be read: {problem.strerror}") from problem
    except UnicodeDecodeError as problem:
        raise UsageError(f"{path} is not UTF-8 text: see the byte at offset {problem.start}") from problem


def judge(
    lm: LanguageModel,
    text: str,
    *,
    base: LanguageModel | None = None,
    chunk: int = 512,
    chunks: int | None = None,
    title: str = "perplexity",
) -> tuple[Perplexity, Comparison | None]:
    """Measure the perplexity of `lm` on `text` and, with `base`, compare the two; shows progress on stderr.

    Raises:
        UsageError: the two models tokenize the text differently, or see `runner.perplexity.compare`.
    """
    from runner.perplexity import compare, read_ids
    from runner.perplexity import perplexity as measure

    ids, bos = read_ids(lm.tokenizer, text)
    if base is not None and read_ids(base.tokenizer, text) != (ids, bos):
        raise UsageError("the models' tokenizers differ: they encode this text to different tokens")
    status = terminal.Status()

    def running(done: int, total: int, value: float) -> None:
        status.show(f"{title}  chunk {done}/{total}  {value:.4f}")

    try:
        if base is None:
            return measure(lm.engine, ids, bos=bos, chunk=chunk, chunks=chunks, running=running), None
        return compare(lm.engine, base.engine, ids, bos=bos, chunk=chunk, chunks=chunks, running=running)
    finally:
        status.clear()


def with_error(estimate: Estimate, digits: int = 4, scale: float = 1) -> str:
    """Format a value and its standard error, as in `14.2130 ± 0.2100`."""
    return f"{estimate.value * scale:.{digits}f} ± {estimate.error * scale:.{digits}f}"


def as_dict(found: Perplexity, comparison: Comparison | None, chunk: int) -> dict[str, Any]:
    """The object that `--json` prints; an infinite perplexity is null."""
    result: dict[str, Any] = {
        "perplexity": finite(found.perplexity.value),
        "perplexity_error": finite(found.perplexity.error),
        "tokens": found.tokens,
        "chunks": found.chunks,
        "chunk": chunk,
    }
    if comparison is not None:
        result["against"] = {
            "perplexity": finite(comparison.base.perplexity.value),
            "perplexity_error": finite(comparison.base.perplexity.error),
            "kl_divergence": finite(comparison.kl_divergence.value),
            "kl_divergence_error": finite(comparison.kl_divergence.error),
            "kl_divergence_999": finite(comparison.kl_999),
            "kl_divergence_max": finite(comparison.kl_max),
            "same_top": comparison.same_top.value,
            "same_top_error": comparison.same_top.error,
        }
    return result


def finite(value: float) -> float | None:
    """Return `value`, or None if it is infinite or NaN, which JSON cannot express."""
    return value if math.isfinite(value) else None
