"""`runner bench`: how fast a model reads prompts and generates on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from runner.cli.options import DType
from runner.errors import UsageError

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A directory, a hub id, or a published shape by name (Llama-3.2-1B), filled with random weights.",
    ),
]
TESTS = "Tests (several values: 0,1024,4096)"
Prompts = Annotated[
    str, typer.Option("-p", metavar="N", help="Read prompts of N tokens; 0: none.", rich_help_panel=TESTS)
]
Generated = Annotated[str, typer.Option("-n", metavar="N", help="Generate N tokens; 0: none.", rich_help_panel=TESTS)]
Depths = Annotated[
    str, typer.Option("-d", metavar="N", help="With N tokens in the cache before.", rich_help_panel=TESTS)
]
Batches = Annotated[str, typer.Option("-b", metavar="N", help="With N sequences in one batch.", rich_help_panel=TESTS)]
Repetitions = Annotated[int, typer.Option("-r", metavar="N", min=1, help="Repetitions, after a warm-up.")]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Of the random ids, and of random weights.")]
Quantize = Annotated[
    str | None,
    typer.Option(metavar="FORM", help="Pack a shape's matrices: 2 to 8 bits, mxfp4, mxfp8 or nvfp4."),
]
GroupSize = Annotated[int | None, typer.Option(metavar="N", help="Of --quantize with bits: 32, 64 (default) or 128.")]
Output = Annotated[Literal["md", "json", "csv"], typer.Option("-o", "--output", metavar="md|json|csv", help="Form.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw t/s against depth or batch, as .png or .svg.")]


def bench(
    model: Model,
    *,
    prompts: Prompts = "512",
    generated: Generated = "128",
    depths: Depths = "0",
    batches: Batches = "1",
    repetitions: Repetitions = 5,
    seed: Seed = 0,
    quantize: Quantize = None,
    group_size: GroupSize = None,
    dtype: DType = None,
    output: Output = "md",
    plot: Plot = None,
) -> None:
    """Measure tokens per second. Names are llama-bench's: pp512 reads a prompt, tg128 generates."""
    from runner.ops import backend

    backend.require()
    from runner.bench import cases, open_subject, report, run
    from runner.bench.bandwidth import read_bandwidth

    wanted = cases(
        numbers("-p", prompts), numbers("-n", generated), depths=numbers("-d", depths), batches=numbers("-b", batches)
    )
    axis = None if plot is None else report.check_plot(plot, wanted)
    if group_size is not None and group_size not in (32, 64, 128):
        raise UsageError(f"--group-size must be 32, 64 or 128, not {group_size}")
    bandwidth = read_bandwidth()
    subject = open_subject(model, quantize=quantize, group_size=group_size, dtype=dtype, seed=seed)
    results = list(run(subject, wanted, repetitions=repetitions, seed=seed))
    write = {"md": report.markdown, "json": report.as_json, "csv": report.as_csv}[output]
    sys.stdout.write(write(report.rows(subject, results, bandwidth)))
    if output == "md":
        sys.stdout.write(f"\nThis machine reads {bandwidth / 1e9:.1f} GB/s; size and GB count in powers of ten.\n")
    if plot is not None and axis is not None:
        report.plot(plot, axis, subject, results)


def numbers(option: str, text: str) -> list[int]:
    """`"0,1024"` as `[0, 1024]`.

    Raises:
        UsageError: something in it is no whole number.
    """
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} takes whole numbers with commas between them, not {text!r}") from error
