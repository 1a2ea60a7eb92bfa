"""`runner pull` and `runner list`: fetch models from the Hugging Face hub, and list those in its cache here."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from runner.cli import terminal
from runner.cli.options import AsJson

HubId = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id: org/name or org/name@revision.")]


def pull(model: HubId) -> None:
    """Download a model from the hub into the cache. Prints its directory."""
    from runner.checkpoint import hub

    terminal.Output().line(str(hub.pull(model, progress=sys.stderr.isatty())))


def list_models(*, as_json: AsJson = False) -> None:
    """List the models in the cache."""
    from runner.checkpoint import hub

    models = hub.list_cached()
    output = terminal.Output()
    if as_json:
        rows = [{"id": m.id, "revision": m.revision, "bytes": m.nbytes, "path": str(m.path)} for m in models]
        output.line(json.dumps(rows, indent=2))
        return
    if not models:
        terminal.note("no models in the cache: fetch one with 'runner pull org/name'")
        return
    from runner.cli import tables

    table = tables.columns("model", "revision", ">size")
    for m in models:
        table.add_row(tables.cell(m.id), tables.cell(m.revision[:12], "dim"), tables.cell(tables.size(m.nbytes)))
    tables.show(table)
