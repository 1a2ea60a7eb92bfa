"""`runner bench`: measures how fast a model prefills and generates on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from runner.cli import completion
from runner.cli.options import DType, NamedModel, named_model
from runner.errors import UsageError

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A directory, a GGUF file, a name, a hub id, or a published shape (shape:Llama-3.2-1B), run with "
        "random weights. Default: what RUNNER_MODEL or the config file says.",
        show_default=False,
        autocompletion=completion.models_and_shapes,
    ),
]
TESTS = "Tests (several values as in 0,1024,4096)"
Prompts = Annotated[
    str, typer.Option("-p", metavar="N", help="Prefill prompts of N tokens; 0: no such test.", rich_help_panel=TESTS)
]
Generated = Annotated[
    str, typer.Option("-n", metavar="N", help="Generate N tokens; 0: no such test.", rich_help_panel=TESTS)
]
Depths = Annotated[
    str, typer.Option("-d", metavar="N", help="Start with N tokens in the KV cache.", rich_help_panel=TESTS)
]
Batches = Annotated[str, typer.Option("-b", metavar="N", help="Answer N requests at once.", rich_help_panel=TESTS)]
Repetitions = Annotated[int, typer.Option("-r", metavar="N", min=1, help="Repeat each test N times, after a warm-up.")]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the random token ids and weights.")]
Quantize = Annotated[
    str | None,
    typer.Option(
        metavar="FORM",
        help="Quantize a shape: 2, 3, 4, 5, 6 or 8 bits, mxfp4, mxfp8 or nvfp4.",
        autocompletion=completion.forms,
    ),
]
GroupSize = Annotated[
    int | None, typer.Option(metavar="N", help="Weights per scale, for --quantize with bits: 32, 64 (default) or 128.")
]
Output = Annotated[
    Literal["table", "md", "json", "csv"],
    typer.Option("-o", "--output", metavar="FORM", help="Output: table, md (Markdown), json or csv."),
]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Plot t/s against depth or batch, as .png or .svg.")]


def bench(
    model: Model = None,
    *,
    named: NamedModel = None,
    prompts: Prompts = "512",
    generated: Generated = "128",
    depths: Depths = "0",
    batches: Batches = "1",
    repetitions: Repetitions = 5,
    seed: Seed = 0,
    quantize: Quantize = None,
    group_size: GroupSize = None,
    dtype: DType = None,
    output: Output = "table",
    plot: Plot = None,
) -> None:
    """Measure tokens per second. Tests are named as in llama-bench: pp512 prefills, tg128 generates."""
    from runner.ops import backend

    model = named_model(model, named)
    backend.require()
    from runner.bench import cases, open_subject, report, run
    from runner.bench.bandwidth import read_bandwidth

    # Everything that can be refused is checked before anything is loaded or measured.
    wanted = cases(
        numbers("-p", prompts), numbers("-n", generated), depths=numbers("-d", depths), batches=numbers("-b", batches)
    )
    axis = None if plot is None else report.check_plot(plot, wanted)
    if group_size is not None and group_size not in (32, 64, 128):
        raise UsageError(f"--group-size must be 32, 64 or 128, not {group_size}")
    subject = open_subject(model, quantize=quantize, group_size=group_size, dtype=dtype, seed=seed)
    measured = run(subject, wanted, repetitions=repetitions, seed=seed)
    written = report.format_of(output, subject, wanted)
    results = []
    try:
        say(written.start())
        bandwidth = read_bandwidth()
        for result in measured:
            results.append(result)
            say(written.row(report.row_of(subject, result, bandwidth)))
    finally:
        say(written.end())  # after Ctrl-C too: the rows that are there are whole
    if plot is not None and axis is not None:
        report.plot(plot, axis, subject, results)


def say(text: str) -> None:
    """Write to stdout now: a test can take minutes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def numbers(option: str, text: str) -> list[int]:
    """Parse `"0,1024"` to `[0, 1024]`.

    Raises:
        UsageError: `text` is not whole numbers separated by commas; the message names `option`.
    """
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} takes whole numbers separated by commas, as in 0,1024, not {text!r}") from error
