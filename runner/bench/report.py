"""Output of benchmark results: a Markdown table, JSON, CSV, and a plot."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import importlib.util
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.bench.measure import Case, Result
from runner.bench.models import Subject
from runner.errors import UsageError

COLUMNS = (
    "model", "size", "params", "quantisation", "backend", "threads", "dtype", "test", "t/s", "peak memory", "GB/s",
    "of read bandwidth",
)  # fmt: skip
PLOTS = (".png", ".svg")


def rows(subject: Subject, results: Sequence[Result], bandwidth: float) -> list[dict[str, Any]]:
    """One flat dictionary per result; sizes in bytes, rates per second. `threads` is None where MLX decides."""
    device = subject.engine.device
    return [
        {
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
            "read_bandwidth": bandwidth,
        }
        for result in results
    ]


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """Format the rows as a Markdown table; sizes count in powers of ten."""
    lines = [list(COLUMNS), ["---"] * 5 + ["---:"] + ["---"] * 2 + ["---:"] * 4]
    for row in table:
        share = None if row["bandwidth"] is None else row["bandwidth"] / row["read_bandwidth"]
        lines.append(
            [
                row["model"],
                f"{_short(row['size'])}B",
                _short(row["parameters"]).replace("G", "B").rstrip(),
                row["quantization"],
                row["backend"],
                "" if row["threads"] is None else str(row["threads"]),
                row["dtype"],
                row["test"],
                f"{row['tps']:.2f} ± {row['tps_sd']:.2f}",
                f"{_short(row['peak_memory'])}B",
                "" if row["bandwidth"] is None else f"{row['bandwidth'] / 1e9:.1f}",
                "" if share is None else f"{share:.0%}",
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _short(number: float) -> str:
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.{2 if unit == 'G' else 1}f} {unit}"
    return f"{number:.0f} "


def as_json(table: Sequence[Mapping[str, Any]]) -> str:
    """Format the rows as a JSON list."""
    return json.dumps(list(table), indent=2) + "\n"


def as_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """Format the rows as CSV with a header; the values of `seconds` are separated by spaces."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(table[0]), lineterminator="\n")
    writer.writeheader()
    for row in table:
        writer.writerow({**row, "seconds": " ".join(f"{each:.6f}" for each in row["seconds"])})
    return out.getvalue()


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
