"""`runner pull`, `list`, `alias` and `rm`: models are fetched, shown, named and deleted."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from runner.cli import completion, terminal
from runner.cli.options import AsJson
from runner.cli.settings import default_model
from runner.errors import RunnerError, UsageError

HubId = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A hub id, org/name[@revision][:Q4_K_M], an address of the hub, or a name.",
        autocompletion=completion.models,
    ),
]
Alias = Annotated[str | None, typer.Argument(metavar="NAME", help="The name to give; without it, all are listed.")]
Named = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="What it stands for: a path, a hub id or a name; without: show it.",
        autocompletion=completion.models,
    ),
]
Removed = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...", help="Aliases, or names, ids or paths of models.", autocompletion=completion.models
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def pull(model: HubId) -> None:
    """Download a model from the hub into the cache. Prints its directory."""
    from runner.checkpoint import kept, names

    path = names.pull(model, progress=sys.stderr.isatty())
    terminal.Output().line(str(path))
    name = names.shortest(names.stored_models()).get(kept.place(path))
    if name is not None:
        terminal.note(f"(its name here: {name})")


def list_models(*, as_json: AsJson = False) -> None:
    """List the models on this machine and the names they go by."""
    from runner.checkpoint import kept, names

    models = names.stored_models()
    short = names.shortest(models)
    aliases = kept.read_names().aliases
    places = {name: names.path_of(target) for name, target in aliases.items()}
    rows = [(m, [short[m.path], *(name for name, path in places.items() if path == m.path)]) for m in models]
    # Aliases of what no program's cache has: models in directories of the user's, and what is not here.
    others: dict[str, list[str]] = {}
    for name, target in aliases.items():
        if not any(places[name] == m.path for m in models):
            others.setdefault(target, []).append(name)
    default = default_path()
    found = [listed(called, m.id, m.path, m.nbytes, m.revision, m.kept is not None) for m, called in rows]
    for target, called in others.items():
        path = places[called[0]]
        found.append(listed(called, target, path, names.size_of(path)))
    for row in found:
        row["default"] = default is not None and row["path"] == str(default)
    output = terminal.Output()
    if as_json:
        output.line(json.dumps(found, indent=2))
        return
    if not found:
        terminal.note("no models here: fetch one with 'runner pull org/name'")
        return
    from runner.cli import tables

    table = tables.columns("name", "model", "revision", ">size")
    for row in found:
        shown = ", ".join([row["name"], *row["aliases"]]) + (" (default)" if row["default"] else "")
        size = "not here" if row["bytes"] is None else tables.size(row["bytes"])
        revision = tables.cell((row["revision"] or "")[:12], "dim")
        table.add_row(tables.cell(shown), tables.cell(row["id"]), revision, tables.cell(size))
    tables.show(table)


def listed(
    called: Sequence[str],
    id: str,
    path: Path | None,
    nbytes: int | None,
    revision: str | None = None,
    ours: bool = False,
) -> dict[str, Any]:
    """A row of the list: of a model that is `called` so; without its size it is not on this machine."""
    return {
        "name": called[0],
        "aliases": list(called[1:]),
        "id": id,
        "revision": revision,
        "bytes": nbytes,
        "path": None if path is None else str(path),
        "stored_by_runner": ours,
    }


def default_path() -> Path | None:
    """Where the default model is; None where there is none, or it is not here, or is no model (said on stderr)."""
    from runner.checkpoint import names

    try:
        default = default_model()
        return None if default is None else names.path_of(names.checked_target(default.checked()))
    except RunnerError as error:
        terminal.note(str(error), "yellow")
        return None


def alias(name: Alias = None, model: Named = None) -> None:
    """Give a model a name of your own."""
    from runner.checkpoint import kept, names

    known = kept.read_names().aliases
    output = terminal.Output()
    if name is None or model is None:
        if name is not None and name not in known:
            raise UsageError(f"{name!r} is no alias: 'runner alias {name} MODEL' makes it one")
        for each in known if name is None else [name]:
            output.line(f"{each} = {known[each]}")
        if not known:
            terminal.note("no aliases: 'runner alias NAME MODEL' gives a model a name")
        return
    kept.check_alias(name)
    target = names.checked_target(model)
    kept.set_alias(name, target)
    if known.get(name, target) != target:
        terminal.note(f"({name} was {known[name]} until now)")
    output.line(f"{name} = {target}")


def rm(models: Removed, *, yes: Yes = False) -> None:
    """Delete models that runner stored, or take back aliases."""
    from runner.checkpoint import kept, names
    from runner.checkpoint.removing import remove
    from runner.cli import tables

    known = kept.read_names().aliases
    # All are looked up before any is touched.
    chosen = {m: None if m in known and not is_stored(m) else names.removable(m) for m in dict.fromkeys(models)}
    stored = {each.path: each for found in chosen.values() if found is not None for each in found}
    for found in stored.values():
        place = "" if found.id == str(found.path) else f" in {found.path}"
        if not yes and not confirmed(f"delete {found.id} ({tables.size(found.nbytes)}{place})?"):
            raise typer.Exit(1)
    for name, model in chosen.items():
        if model is None:
            kept.drop_alias(name)
            terminal.note(f"{name} is no name for {known[name]} any more")
    for found in stored.values():
        assert found.kept is not None, "`removable` gives none that others stored"
        rest = remove(found.path, found.kept)
        terminal.note(f"deleted {found.id}, {tables.size(found.nbytes)}")
        if rest and found.path.is_dir():  # what is beside a GGUF file is of other models
            terminal.note(f"{found.path} stays: {rest[0]} in it is not runner's", "yellow")


def is_stored(path: str) -> bool:
    """Whether a path is a model's that runner stored: only this comes before an alias that has the same name."""
    from runner.checkpoint import kept

    return kept.place(path) in kept.read_names().stored


def confirmed(question: str) -> bool:
    """Ask on the terminal; anything but y or yes is no.

    Raises:
        UsageError: stdin or stderr is no terminal.
    """
    if sys.stdin is None or not sys.stdin.isatty() or not sys.stderr.isatty():
        raise UsageError(f"{question} Nobody can answer, as this is no terminal: --yes does it without asking")
    print(f"{terminal.visible(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().casefold() in ("y", "yes")
