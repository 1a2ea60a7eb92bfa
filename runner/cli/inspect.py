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
from runner.cli.sharing_options import SharingOptions

if TYPE_CHECKING:
    from rich.table import Table

    from runner.config.memory import Memory
    from runner.inspect_model import ModelReport
    from runner.ranks.settings import Settings

All = Annotated[bool, typer.Option("--all", help="List every layer by itself, instead of folding equal ones.")]
Ranks = Annotated[
    int | None,
    typer.Option(metavar="N", min=2, help="Show what each of N processes of 'runner launch' would hold and send."),
]
LONGEST_VALUE = 100  # characters of a config value before it is cut (never in --json)
MOST_SPANS = 3  # spans of layers in a line of the memory
HALF = 2  # bytes of a number in 16 bits
MOST_UNUSED = 20  # names of unused tensors before the rest is counted (never in --json)


def inspect(
    model: Model = None,
    *,
    named: NamedModel = None,
    unfold: All = False,
    ranks: Ranks = None,
    sharing: SharingOptions,
    as_json: AsJson = False,
) -> None:
    """Show a model's config, tokenizer, sampling defaults, tensors and memory."""
    from runner.checkpoint.model_files import name_of
    from runner.inspect_model import inspect as inspect_model

    if ranks is not None:
        show_ranks(named_model(model, named), sharing.settings(ranks), as_json)
        return
    sharing.refuse("--ranks")
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
        *tables.section("memory of a sequence, in 16 bits", memory(report, unfold)),
    )
    for note in report.notes:
        terminal.note(note, "yellow")


def show_ranks(model: str, settings: Settings, as_json: bool) -> None:
    """Print what each process of a run would hold and send."""
    from runner.cli import tables
    from runner.inspect_model import inspect_ranks

    reports = inspect_ranks(model, settings)
    if as_json:
        rows = [{**vars(report), "layers": list(report.layers)} for report in reports]
        terminal.Output().line(json.dumps({"mode": settings.mode, "ranks": rows}, indent=2))
        return
    table = tables.columns(
        ">rank", "layers", ">weights", ">keys and values a token", ">sends a token", ">and a drawn one", gap=2
    )
    for report in reports:
        sizes = (
            tables.cell(tables.size(each)) for each in (report.nbytes, report.per_token, report.sends, report.draws)
        )
        table.add_row(tables.cell(str(report.rank)), tables.cell(spans(report.layers)), *sizes)
    tables.show(*tables.section(f"{settings.size} processes, {settings.mode}", table))
    for note in reports[0].notes:
        terminal.note(f"every rank has all of what has {note}", "yellow")
    for report in reports:
        if report.twins:
            text = f"rank {report.rank} holds {tables.size(report.twins)} more if the head, which is stored beside the "
            terminal.note(f"{text}table that it should be, is another matrix: only reading both tells", "yellow")


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


def memory(report: ModelReport, unfold: bool) -> Table:
    """Table of what layers remember between tokens: bytes for each token, and bytes whatever the length.

    Layers that remember the same are one row, wherever they are. The last row is the whole context.
    """
    from runner.cli import tables
    from runner.config.memory import needed

    layers: dict[str, list[int]] = {}
    for index, memories in enumerate(report.memory):
        layers.setdefault(f"{index if unfold else ''} {memories}", []).append(index)
    table = tables.columns("layers", "what they remember", ">a token", ">at once", gap=2)
    for indices in layers.values():
        memories = report.memory[indices[0]]
        once = len(indices) * needed(memories, 0, HALF)
        row = len(indices) * needed(memories, 1, HALF) - once
        what = ", ".join(map(remembered, memories)) or "nothing"
        sizes = (tables.cell(tables.size(each) if each else "") for each in (row, once))
        table.add_row(tables.cell(spans(indices)), tables.cell(what), *sizes)
    whole = needed((each for layer in report.memory for each in layer), report.context_length, HALF)
    context = tables.cell(f"a context of {report.context_length} tokens", "dim")
    table.add_row(tables.cell("all", "dim"), context, "", tables.cell(tables.size(whole)))
    return table


def remembered(memory: Memory) -> str:
    """What a layer remembers, in words: heads and sizes of its rows, shapes of its state."""
    from runner.config.memory import Rows, Shared

    if isinstance(memory, Shared):
        return f"the rows of layer {memory.layer}"
    if isinstance(memory, Rows):
        heads = "a row" if memory.heads == 1 else f"rows of {memory.heads} heads"
        reach = f", the last {memory.window} tokens" if memory.window is not None else ""
        reach += f", the last {memory.chunk} tokens at most" if memory.chunk is not None else ""
        return f"{heads} of {memory.key_size} + {memory.value_size}{reach}"
    arrays = (
        f"{name} {' × '.join(map(str, shape))}" + (f" {memory.dtypes[name]}" if name in memory.dtypes else "")
        for name, shape in memory.shapes.items()
    )
    return ", ".join(arrays)


def spans(indices: Sequence[int]) -> str:
    """Rising numbers as `0-2, 4-6, 8`; of more than a few spans the first, and how many numbers there are."""
    found: list[list[int]] = []
    for index in indices:
        if found and index == found[-1][-1] + 1:
            found[-1].append(index)
        else:
            found.append([index])
    shown = [f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in found]
    if len(shown) > MOST_SPANS:
        return f"{', '.join(shown[:MOST_SPANS])}, … ({len(indices)})"
    return ", ".join(shown)


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
        "memory": [[{"kind": type(each).__name__, **vars(each)} for each in layer] for layer in report.memory],
        "context_length": report.context_length,
        "notes": list(report.notes),
    }
