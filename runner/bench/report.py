"""Output of benchmark results, row by row: aligned columns, Markdown, JSON or CSV; and a plot."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import importlib.util
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from runner.bench.measure import Case, Result
from runner.bench.models import Subject
from runner.errors import UsageError

MARKDOWN = (
    "model", "size", "params", "quantisation", "backend", "threads", "dtype", "test", "t/s", "peak memory", "GB/s",
    "of read bandwidth",
)  # fmt: skip
FIELDS = (
    "model", "size", "parameters", "quantization", "backend", "threads", "dtype", "test", "kind", "tokens", "depth",
    "batch", "seconds", "tps", "tps_sd", "peak_memory", "peak_rss", "bandwidth", "read_bandwidth",
)  # fmt: skip
"""Names of the values of a row, in order."""
PLOTS = (".png", ".svg")


def row_of(subject: Subject, result: Result, read_bandwidth: float) -> dict[str, Any]:
    """A result as one flat dictionary of `FIELDS`; sizes in bytes, rates per second.

    `threads` is None where MLX decides.
    """
    device = subject.engine.device
    return {
        "model": subject.name,
        "size": subject.size,
        "parameters": subject.parameters,
        "quantization": subject.quantization,
        "backend": device.name,
        "threads": device.threads,
        "dtype": subject.dtype,
        "test": result.case.name,
        **dataclasses.asdict(result.case),
        "seconds": result.seconds,
        "tps": result.tps,
        "tps_sd": result.tps_sd,
        "peak_memory": result.peak_memory,
        "peak_rss": result.peak_rss,
        "bandwidth": result.bandwidth,
        "read_bandwidth": read_bandwidth,
    }


class Format(Protocol):
    """A way to write results as they come: the start, each row, the end, which also comes where a run is cut short."""

    def start(self) -> str: ...
    def row(self, row: Mapping[str, Any]) -> str: ...
    def end(self) -> str: ...


class Columns:
    """What does not change above, and aligned columns of what does."""

    def __init__(self, subject: Subject, cases: Sequence[Case]) -> None:
        self.subject = subject
        self.cases = cases
        self.width = max(len(case.name) for case in cases)
        self.read_bandwidth: float | None = None

    def start(self) -> str:
        """Model and machine, and the header of the columns."""
        subject = self.subject
        size, parameters = f"{_short(subject.size)}B", _short(subject.parameters).replace("G", "B").rstrip()
        return (
            f"{subject.name}: {size}, {parameters} parameters, {subject.quantization}\n"
            f"{subject.engine.device.name}, {subject.dtype}{self._way()}\n\n"
            + self.line("test", "t/s", "peak memory", "GB/s", "of read bandwidth")
        )

    def _way(self) -> str:
        """How steps are decoded, on devices that have two ways."""
        engine = self.subject.engine
        if not engine.device.compiles or all(case.kind == "pp" for case in self.cases):
            return ""
        engine.run(engine.compiled.prepare)
        return f"; decoding by {engine.compiled.way}"

    def line(self, test: str, *values: str) -> str:
        """One line; numbers stand on the right of their columns."""
        widths = (19, 11, 6, 17)
        return "   ".join([f"{test:<{self.width}}", *map(str.rjust, values, widths)]).rstrip() + "\n"

    def row(self, row: Mapping[str, Any]) -> str:
        """The line of a result."""
        self.read_bandwidth = row["read_bandwidth"]
        return self.line(row["test"], *_figures(row))

    def end(self) -> str:
        """What the last column is a share of."""
        return "" if self.read_bandwidth is None else _footer(self.read_bandwidth)


class Markdown:
    """A table in Markdown, as llama-bench writes it; each row has all there is to say."""

    def __init__(self) -> None:
        self.read_bandwidth: float | None = None

    def start(self) -> str:
        """The table's two first lines."""
        return _pipes(list(MARKDOWN)) + _pipes(["---"] * 5 + ["---:"] + ["---"] * 2 + ["---:"] * 4)

    def row(self, row: Mapping[str, Any]) -> str:
        """The line of a result."""
        self.read_bandwidth = row["read_bandwidth"]
        return _pipes(
            [
                row["model"],
                f"{_short(row['size'])}B",
                _short(row["parameters"]).replace("G", "B").rstrip(),
                row["quantization"],
                row["backend"],
                "" if row["threads"] is None else str(row["threads"]),
                row["dtype"],
                row["test"],
                *_figures(row),
            ]
        )

    def end(self) -> str:
        """What the last column is a share of."""
        return "" if self.read_bandwidth is None else _footer(self.read_bandwidth)


class Json:
    """A list in JSON, an object a result."""

    def __init__(self) -> None:
        self.before = "["

    def start(self) -> str:
        """Nothing: an empty list is written as a whole."""
        return ""

    def row(self, row: Mapping[str, Any]) -> str:
        """The object of a result, and what stands between it and the one before."""
        text = json.dumps(row, indent=2).replace("\n", "\n  ")
        before, self.before = self.before, ","
        return f"{before}\n  {text}"

    def end(self) -> str:
        """The list's end."""
        return "[]\n" if self.before == "[" else "\n]\n"


class Csv:
    """CSV with a header; the values of `seconds` are separated by spaces."""

    def start(self) -> str:
        """The names of the fields."""
        return _csv(FIELDS)

    def row(self, row: Mapping[str, Any]) -> str:
        """The line of a result."""
        seconds = " ".join(f"{each:.6f}" for each in row["seconds"])
        return _csv([seconds if name == "seconds" else row[name] for name in FIELDS])

    def end(self) -> str:
        """Nothing."""
        return ""


def format_of(name: str, subject: Subject, cases: Sequence[Case]) -> Format:
    """The format `name`: table, md, json or csv."""
    formats: dict[str, Callable[[], Format]] = {
        "table": lambda: Columns(subject, cases),
        "md": Markdown,
        "json": Json,
        "csv": Csv,
    }
    return formats[name]()


def _figures(row: Mapping[str, Any]) -> list[str]:
    """Speed, memory, and for generation the bandwidth and its share of what the memory can."""
    figures = [f"{row['tps']:.2f} ± {row['tps_sd']:.2f}", f"{_short(row['peak_memory'])}B"]
    if row["bandwidth"] is None:
        return [*figures, "", ""]
    return [*figures, f"{row['bandwidth'] / 1e9:.1f}", f"{row['bandwidth'] / row['read_bandwidth']:.0%}"]


def _footer(read_bandwidth: float) -> str:
    return f"\nThis machine reads {read_bandwidth / 1e9:.1f} GB/s; size and GB count in powers of ten.\n"


def _pipes(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _csv(values: Sequence[Any]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(values)
    return out.getvalue()


def _short(number: float) -> str:
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.{2 if unit == 'G' else 1}f} {unit}"
    return f"{number:.0f} "


def check_plot(path: Path, cases: Sequence[Case]) -> str:
    """Choose the plot's horizontal axis, `depth` or `batch`; called before anything is measured.

    Raises:
        UsageError: `path` ends in neither .png nor .svg, matplotlib is missing, or neither depth nor batch varies.
    """
    if path.suffix not in PLOTS:
        raise UsageError(f"--plot {path}: the file must end in {' or '.join(PLOTS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'mlx-runner[plot]'")
    for axis in ("depth", "batch"):
        if len({getattr(case, axis) for case in cases}) > 1:
            return axis
    raise UsageError("--plot draws t/s against depth or batch: give several, as in -d 0,1024,4096")


def plot(path: Path, axis: str, subject: Subject, results: Sequence[Result]) -> None:
    """Draw one line per kind and length of test, with the standard deviation as error bars."""
    # matplotlib is an optional extra, so it is imported by name; a Figure of its own needs no display.
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    other = "batch" if axis == "depth" else "depth"
    for line in dict.fromkeys((r.case.kind, r.case.tokens, getattr(r.case, other)) for r in results):
        kind, tokens, fixed = line
        points = [r for r in results if (r.case.kind, r.case.tokens, getattr(r.case, other)) == line]
        label = f"{kind}{tokens}" + (f", {other} {fixed}" if fixed not in (0, 1) else "")
        x = [getattr(point.case, axis) for point in points]
        axes.errorbar(x, [p.tps for p in points], yerr=[p.tps_sd for p in points], marker="o", capsize=3, label=label)
    axes.set_xlabel("tokens before" if axis == "depth" else "sequences")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{subject.name}, {subject.quantization}, {subject.engine.device.name}", fontsize=10)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
