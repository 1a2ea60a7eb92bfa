"""`runner inspect`: shows what a checkpoint holds, from its JSON files and tensor headers alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runner.cli import terminal
from runner.cli.folding import Row, fold
from runner.cli.options import AsJson, Model, NamedModel, named_model

if TYPE_CHECKING:
    from rich.table import Table

    from runner.inspect_model import ModelReport

All = Annotated[bool, typer.Option("--all", help="List every layer by itself, instead of folding equal ones.")]
LONGEST_VALUE = 100  # characters of a config value before it is cut (never in --json)
MOST_UNUSED = 20  # names of unused tensors before the rest is counted (never in --json)


def inspect(model: Model = None, *, named: NamedModel = None, unfold: All = False, as_json: AsJson = False) -> None:
    """Show a model's config, tokenizer, sampling defaults and tensors, without reading the tensors' data."""
    from runner.checkpoint.model_files import name_of
    from runner.inspect_model import inspect as inspect_model

    report = inspect_model(named_model(model, named))
    if as_json:
        terminal.Output().line(json.dumps(as_dict(report), indent=2, default=str))
        return
    from runner.cli import tables

    title = tables.cell(name_of(report.path) or str(report.path), "cyan")
    sampling = {**report.sampling, "eos_token_ids": sorted(report.eos_token_ids)}
    tables.show(
        title,
        *([tables.cell(str(report.path), "dim")] if str(report.path) != report.path.name else []),
        *tables.section("config", pairs(report.config)),
        *tables.section("tokenizer", pairs(report.tokenizer)),
        *tables.section("generation defaults", pairs(sampling)),
        *tables.section("tensors", tree(report, unfold)),
        *tables.section("totals", pairs(totals(report))),
    )
    for note in report.notes:
        terminal.note(note, "yellow")


def pairs(values: dict[str, Any]) -> Table:
    """Lay out names and values; nested objects as compact JSON, long values cut."""
    from runner.cli import tables

    table = tables.columns("", "")
    for name, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        if len(text) > LONGEST_VALUE:
            text = text[: LONGEST_VALUE - 1] + "…"
        table.add_row(tables.cell(str(name), "dim"), tables.cell(text))
    return table


def totals(report: ModelReport) -> dict[str, str]:
    """Rows of the totals: parameters, size, bits per weight, and tensors that are not used."""
    from runner.cli import tables

    rows = {
        "parameters": tables.count(report.parameters),
        "size": tables.size(report.nbytes),
        "bits per weight": f"{report.bits_per_weight:.2f}",
    }
    if report.ignored:
        rows["not used"] = unused(report.ignored)
    return rows


def unused(names: Sequence[str]) -> str:
    """Names with `*` for the numbers of layers and experts, each with how many tensors it stands for."""
    counts = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names)
    shown = [name if count == 1 else f"{name} ({count} tensors)" for name, count in counts.most_common(MOST_UNUSED)]
    more = [f"and {len(counts) - MOST_UNUSED} more"] if len(counts) > MOST_UNUSED else []
    return ", ".join(shown + more)


def tree(report: ModelReport, unfold: bool) -> Table:
    """Table of fields with tensors, shape, dtype and size; a run of equal layers is one block under its range."""
    from runner.cli import tables

    table = tables.columns("field", "tensor", "shape", "dtype", ">size", gap=2)
    for row in fold(report.entries, unfold=unfold):
        add_row(table, row)
    return table


def add_row(table: Table, row: Row) -> None:
    """Append one row to the table: the heading of a run of layers, or a field."""
    from runner.cli import tables

    field = "  " * row.depth + row.field
    if row.entry is None:
        alike = tables.cell(f"{row.repeats} alike", "dim")
        table.add_row(tables.cell(field, "bold"), tables.cell(row.tensors, "dim"), alike, "", "")
        return
    shape = " × ".join(map(str, row.entry.shape)) or "scalar"
    table.add_row(
        tables.cell(field),
        tables.cell(row.tensors, "dim"),
        tables.cell(shape),
        tables.cell(row.entry.dtype),
        tables.cell(tables.size(row.entry.nbytes * row.repeats)),
    )


def as_dict(report: ModelReport) -> dict[str, Any]:
    """The whole report as a JSON object, with nothing folded or cut."""
    return {
        "path": str(report.path),
        "model_type": report.model_type,
        "config": report.config,
        "tokenizer": report.tokenizer,
        "sampling": report.sampling,
        "eos_token_ids": sorted(report.eos_token_ids),
        "entries": [
            {
                "field": entry.field,
                "tensors": list(entry.tensors),
                "shape": list(entry.shape),
                "dtype": entry.dtype,
                "bytes": entry.nbytes,
            }
            for entry in report.entries
        ],
        "ignored": list(report.ignored),
        "parameters": report.parameters,
        "bytes": report.nbytes,
        "bits_per_weight": report.bits_per_weight,
        "notes": list(report.notes),
    }
