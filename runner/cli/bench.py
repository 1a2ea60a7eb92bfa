"""`runner bench`: measures how fast a model prefills and generates on this machine."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from runner.cli import completion, engine
from runner.cli.options import Activations, DType, NamedModel, named_model
from runner.cli.variables import typed
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


HERE = frozenset(
    [
        "prompts",
        "generated",
        "depths",
        "batches",
        "repetitions",
        "quantize",
        "group_size",
        "dtype",
        "activations",
        "plot",
    ],
)
"""Options for a model that this process measures."""

SERVER = "A server (--url)"


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options for a server under load, in vLLM's words. None: not given."""

    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Measure the server at this address instead, by completions of MODEL, or of its first one. A key "
            "comes from RUNNER_API_KEY.",
            rich_help_panel=SERVER,
        ),
    ] = None
    num_prompts: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Ask N times; default: 64.", rich_help_panel=SERVER)
    ] = None
    max_concurrency: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Keep N requests open at once; default: all.", rich_help_panel=SERVER),
    ] = None
    request_rate: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Ask X times a second, with exponential gaps (Poisson).", rich_help_panel=SERVER
        ),
    ] = None
    random_input_len: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens of a prompt; default: 256.", rich_help_panel=SERVER)
    ] = None
    random_output_len: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens of an answer; default: 64.", rich_help_panel=SERVER)
    ] = None
    text_prompts: Annotated[
        bool | None,
        typer.Option(
            "--text-prompts",
            help="Send words instead of token ids, about one a token: for servers without /tokenize.",
            rich_help_panel=SERVER,
        ),
    ] = None
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:MS",
            help="Count the requests that keep within so many ms: ttft, tpot or e2el; may be repeated.",
            rich_help_panel=SERVER,
        ),
    ] = None

    def check(self) -> None:
        """Refuse the others without a server; raises UsageError."""
        for name, value in vars(self).items():
            if name != "url" and value is not None and self.url is None:
                raise UsageError(f"--{name.replace('_', '-')} needs a server: --url http://127.0.0.1:8080")

    def goals(self) -> dict[str, float]:
        """The goals by their names; raises UsageError."""
        found: dict[str, float] = {}
        for each in self.goodput or ():
            name, _, limit = each.partition(":")
            try:
                found[name] = float(limit)
            except ValueError:
                name = ""
            if not 0 < found.get(name, 0) < float("inf"):  # NaN neither
                name = ""
            if name not in ("ttft", "tpot", "e2el"):
                raise UsageError(f"--goodput takes ttft:MS, tpot:MS or e2el:MS, not {each!r}")
        return found


def bench(
    context: typer.Context,
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
    activations: Activations = "exact",
    output: Output = "table",
    plot: Plot = None,
    load: LoadOptions,
) -> None:
    """Measure tokens per second. Tests are named as in llama-bench: pp512 prefills, tg128 generates."""
    load.check()
    if load.url is not None:
        if model is not None and named is not None:
            raise UsageError(f"two models are named, {model!r} and -m {named!r}: leave one out")
        if (option := typed(context, HERE)) is not None:
            raise UsageError(f"{option} is for a model that is measured here, and not for a server (--url)")
        ask(load, model if named is None else named, seed, output)
        return
    from runner.ops import backend

    model = named_model(model, named)
    backend.require()
    from runner.bench import report
    from runner.bench.bandwidth import read_bandwidth
    from runner.bench.measure import cases, run
    from runner.bench.models import open_subject

    # Everything that can be refused is checked before anything is loaded or measured.
    wanted = cases(
        numbers("-p", prompts), numbers("-n", generated), depths=numbers("-d", depths), batches=numbers("-b", batches)
    )
    axis = None if plot is None else report.check_plot(plot, wanted)
    if group_size is not None and group_size not in (32, 64, 128):
        raise UsageError(f"--group-size must be 32, 64 or 128, not {group_size}")
    part = engine.leading(
        subject=model, quantize=quantize, group_size=group_size, dtype=dtype, activations=activations, seed=seed
    )
    subject = open_subject(
        model, quantize=quantize, group_size=group_size, dtype=dtype, activations=activations, seed=seed, part=part
    )
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


def ask(options: LoadOptions, model: str | None, seed: int, output: str) -> None:
    """Measure a server."""
    import asyncio

    from runner.bench.serving import Load, measure, table

    if output not in ("table", "json"):
        raise UsageError(f"-o {output}: what is measured of a server comes as table or json")
    if options.request_rate is not None and not 0 < options.request_rate < 1e6:
        raise UsageError(f"--request-rate must be above 0, not {options.request_rate}")
    load = Load(
        str(options.url),
        model,
        options.num_prompts or 64,
        options.max_concurrency,
        options.request_rate,
        options.random_input_len or 256,
        options.random_output_len or 64,
        seed,
        os.environ.get("RUNNER_API_KEY"),
        options.goals(),
        bool(options.text_prompts),
    )
    result = asyncio.run(measure(load))
    say(json.dumps(result, indent=2) + "\n" if output == "json" else table(result))
    if not result["completed"]:
        raise typer.Exit(1)


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
