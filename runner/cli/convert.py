"""`runner convert`: writes a model as a Hub-style directory, quantized or dequantized on request."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from runner.cli import completion, engine, terminal
from runner.cli.options import Adapter, dtype_name
from runner.cli.perplexity import judge, read_text, with_error

Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A directory, a GGUF file, a name, or a hub id: org/name[@revision][:Q4_K_M].",
        autocompletion=completion.models,
    ),
]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")]
Quantize = Annotated[
    str | None,
    typer.Option(
        metavar="FORM",
        help="Quantize matrices: 2, 3, 4, 5, 6 or 8 bits, mxfp4, mxfp8 or nvfp4.",
        autocompletion=completion.forms,
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(metavar="N", help="Weights per scale, for --quantize with bits: 32, 64 (default) or 128."),
]
RecipeName = Annotated[
    Literal["mixed"] | None,
    typer.Option(
        metavar="mixed",
        help="With --quantize 2 to 5: use 6 bits for the head and, in half of the layers, for the value and down "
        "projections.",
    ),
]
DType = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        parser=dtype_name,
        help="Store numbers as float32, float16 or bfloat16 (fp32, fp16, bf16); dequantizes quantized matrices.",
    ),
]
Eval = Annotated[
    Path | None,
    typer.Option(
        "--eval", metavar="FILE", exists=True, dir_okay=False, readable=True,
        help="Measure perplexity on this text, before and after.",
    ),
]  # fmt: skip


def convert(
    source: Source,
    target: Target,
    *,
    quantize: Quantize = None,
    group_size: GroupSize = None,
    recipe: RecipeName = None,
    dtype: DType = None,
    adapter: Adapter = None,
    judged_by: Eval = None,
) -> None:
    """Write a model as a directory of config, tokenizer and safetensors, quantized on request. Prints the directory."""
    from runner.ops import backend

    backend.require()
    from runner.adapters import open_adapters
    from runner.checkpoint.hub import resolve_adapter
    from runner.checkpoint.kept import keep
    from runner.checkpoint.model_files import open_files
    from runner.checkpoint.names import resolve
    from runner.convert.convert import convert as write
    from runner.convert.convert import merged
    from runner.convert.quantize import quantizer
    from runner.errors import UsageError, UserFileError
    from runner.progress import ProgressBar

    if quantize is None and (group_size is not None or recipe is not None):
        raise UsageError(f"{'--group-size' if recipe is None else '--recipe'} needs --quantize")
    wanted = None if quantize is None else quantizer(quantize, group_size, recipe)
    text = None if judged_by is None else read_text(judged_by)
    visible = sys.stderr.isatty()
    # The options and the text are checked by now: from here on, work takes minutes.
    files = open_files(resolve(source, progress=visible))
    for note in files.notes:
        terminal.note(note, "yellow")
    adapters = open_adapters(adapter or (), lambda spec: resolve_adapter(spec, progress=visible))
    before = None if text is None else perplexity_of(str(files.path), text, "before")
    # Where it will lie: a link to an empty directory stays one, and `none/../out` leads nowhere without `none`.
    written = target.resolve()
    with ended_in_order(), ProgressBar(f"converting {files.path.name}", enabled=visible) as bar:
        report = write(merged(files, adapters), written, quantizer=wanted, dtype=dtype, progress=bar.update)
    try:
        keep(written, "convert", [str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()])
    except UserFileError as problem:  # the model is whole, only not found by its name
        terminal.note(str(problem), "yellow")
    forms = ", ".join(f"{count} {form}" for form, count in report.forms.items())
    terminal.note(f"{report.bits_after:.2f} bits per weight, {report.bits_before:.2f} before ({forms})")
    # Matrices that stay plain are no error, but the size is not what was asked for: name one.
    if report.unpackable:
        more = f" and {len(report.unpackable) - 1} more" if len(report.unpackable) > 1 else ""
        terminal.note(f"not quantized: {report.unpackable[0]}{more}: inputs do not divide into groups", "yellow")
    if text is not None and before is not None:
        after = perplexity_of(str(written), text, "after")
        terminal.note(f"perplexity {after} after, {before} before")
    terminal.Output().line(str(target if target.exists() else written))


@contextlib.contextmanager
def ended_in_order() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end the process by an exception, so that no part of a model stays; `nohup` counts."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    caught = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in caught:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def perplexity_of(model: str, text: str, when: str) -> str:
    """Measure perplexity, as in `14.2130 ± 0.2100`; the model's memory is free again afterwards."""
    from runner.perplexity import CHUNK

    lm = engine.open_model(model, None)
    found, _ = judge(lm, text, chunk=min(CHUNK, lm.context_length), title=f"perplexity {when}")
    return with_error(found.perplexity)
