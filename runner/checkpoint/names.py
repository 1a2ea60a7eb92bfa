"""What the name of a model stands for: a path, an alias, a model stored on this machine, or a hub id, in this order.

A stored model goes by the last part of its hub id or path, in any case of letters, or by the first words of it
(`smollm2` for `SmolLM2-135M-Instruct`) where these are no other's. Aliases and stored models have no slash in their
names, hub ids have one: what a name means changes with the models here, what a hub id means does not.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.checkpoint import hub, hub_ids
from runner.checkpoint.gguf_choice import choose_gguf
from runner.checkpoint.kept import BEGUN, Kept, place, read_names
from runner.errors import HubError, UsageError
from runner.local_files import is_gguf, quoted
from runner.reprs import similar

_WORD_END = re.compile(r"(?=[-_])")


@dataclass(frozen=True)
class StoredModel:
    """A model on this machine, in the hub's cache or written by `convert`.

    Attributes:
        id: its hub id, or its absolute path.
        name: the last part of the id; "" for a hub's snapshot in whose place the branch has a later one.
        reference: what `resolve` finds this one by, whatever else is here: the id, or `id@commit`.
        path: directory, or GGUF file; as `kept.place` gives it.
        revision: commit on the hub, None for a path.
        nbytes: size of its files on disk, in bytes.
        kept: its files, where this program stored it; None where another program did.
    """

    id: str
    name: str
    reference: str
    path: Path
    revision: str | None
    nbytes: int
    kept: Kept | None


def resolve(model: str, *, revision: str | None = None, progress: bool = True) -> Path:
    """Find the model of a name on this machine, or fetch it from the hub, and return its path.

    Args:
        model: a path, an alias, the name of a stored model or a hub id, tried in this order.
        revision: branch, tag or commit; means the same as `@revision` in a hub id. Default: `main`.
        progress: show a progress bar on stderr while downloading.

    Raises:
        HubError: `model` is none of these, or the hub lacks it, refuses access, or cannot be reached.
        UsageError: several stored models go by the name, a file is no model, or a revision was given for a path.
        UserFileError: the table of aliases is damaged.
    """
    refuse_missing(model)
    return hub.resolve(meaning(model), revision=revision, progress=progress)


def pull(model: str, *, progress: bool = True) -> Path:
    """Fetch the model of a name or hub id, or bring it up to date with its branch, and return its path.

    Raises:
        HubError: as in `resolve`.
        UsageError: `model` is or stands for a path; or several stored models go by the name.
        UserFileError: the table of aliases is damaged.
    """
    known = os.path.exists(os.path.expanduser(model))
    target = model if known else meaning(model)
    if known or os.path.isabs(target) or looks_like_path(model):
        what = f"{quoted(model)} is a path" if target == model else f"{quoted(model)} stands for {target}, a path"
        there = ", and it is on this machine already" if known or os.path.exists(target) else ""
        raise UsageError(f"{what}{there}: 'runner pull' takes a hub id such as org/name")
    return hub.pull(target, progress=progress)


def looks_like_path(model: str) -> bool:
    """Whether a text can only be meant as a path, whatever exists."""
    beginning = model.startswith(("/", "./", "../", "~")) or model in (".", "..")
    of_a_repository = hub_ids.is_address(model) or ":" in model
    return beginning or (model.endswith(".gguf") and not of_a_repository)


def refuse_missing(model: str) -> None:
    """Refuse what can only be meant as a path where nothing is there; names what comes near beside it."""
    path = Path(os.path.expanduser(model))
    if not looks_like_path(model) or path.exists():
        return
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(path.name, [name for name in beside if name.endswith(".gguf") or (path.parent / name).is_dir()])
    hint = f": did you mean {path.with_name(near)}?" if near else ""
    raise HubError(f"{model}: no such file or directory{hint}")


def names_model(text: str) -> bool:
    """Whether a text names a model, be it one that is missing or one of several: and so is no prompt."""
    path = os.path.expanduser(text)
    if os.path.exists(path):
        return os.path.isdir(path) or text.endswith(".gguf") or is_gguf(Path(path))
    if not text or any(character.isspace() for character in text):
        return False
    if "/" in text:
        return looks_like_path(text) or _is_id(text)
    return looks_like_path(text) or text in read_names().aliases or bool(called(text, stored_models()))


def _is_id(text: str) -> bool:
    """Whether a text is written as a model of the hub."""
    try:
        hub_ids.parse(text)
    except HubError:
        return False
    return True


def meaning(model: str) -> str:
    """The hub id or absolute path that a name stands for; a path, and what is written as a hub id, is itself.

    Raises:
        HubError: nothing is called so (the message names what comes near), or what an alias stands for is gone.
        UsageError: several stored models are called so.
        UserFileError: the table of aliases is damaged.
    """
    if not model or "/" in model or looks_like_path(model) or os.path.exists(model):
        return model
    aliases = read_names().aliases
    if model in aliases:
        target = aliases[model]
        if os.path.isabs(target) and not os.path.exists(target):
            raise HubError(
                f"{quoted(model)} stands for {target}, which is gone: "
                f"name another with 'runner alias {model} MODEL', or drop it with 'runner rm {model}'"
            )
        return target
    stored = stored_models()
    found = called(model, stored)
    if len(found) == 1:
        return found[0].reference
    if found:
        raise UsageError(
            f"{quoted(model)} could be {either([one.id for one in found])}: "
            "write more of the name, or the whole of it, or name one with 'runner alias'"
        )
    near = near_name(model)
    hint = f"did you mean {near}?" if near else "'runner list' shows what is here, 'runner pull org/name' fetches"
    raise HubError(f"no model is called {quoted(model)}: {hint}")


def near_name(typed: str) -> str | None:
    """The alias, stored model's name or model of this directory that comes nearest to what was typed, or None."""
    stored = stored_models()
    here = [
        entry.name for entry in Path().iterdir() if entry.name.endswith(".gguf") or (entry / "config.json").exists()
    ]
    return nearest(typed, [*read_names().aliases, *shortest(stored).values(), *(one.name for one in stored), *here])


def nearest(typed: str, names: Sequence[str]) -> str | None:
    """The one of `names` that comes nearest to what was typed, None where none comes near; cases are one."""
    folded = {name.casefold(): name for name in reversed(names) if name}
    found = similar(typed.casefold(), folded, 0.7)
    return None if found is None else folded[found]


def either(names: Sequence[str]) -> str:
    """Join names as in `a, b or c`."""
    *others, last = sorted(names)
    return f"{', '.join(others)} or {last}" if others else last


# --- what is stored ---------------------------------------------------------------------------------------------------


def stored_models() -> list[StoredModel]:
    """The models in the hub's cache and those that `convert` wrote, sorted by id and revision."""
    kept = read_names().stored
    found = []
    cached = hub.list_cached()
    ids = [str(dataclasses.replace(model.hub_id, revision=hub_ids.MAIN)) for model in cached]
    for model, id in zip(cached, ids, strict=True):
        name = id.partition("/")[2] if model.current or ids.count(id) == 1 else ""
        exact = id if model.current else str(model.hub_id)
        path, commit = place(model.path), model.hub_id.revision
        found.append(StoredModel(id, name, exact, path, commit, model.nbytes, kept.get(path)))
    for path, known in sorted(kept.items()):
        if known.by == "convert" and path.is_dir():
            found.append(StoredModel(str(path), path.name, str(path), path, None, _size(path, known), known))
    return found


def _size(path: Path, kept: Kept) -> int:
    sizes = (os.path.getsize(path / file) for file in kept.files if os.path.isfile(path / file))
    return sum(sizes)


def size_of(path: Path | None) -> int | None:
    """Bytes of the files in a model's directory, or of its GGUF file; None where it is not here."""
    if path is None or not path.exists():
        return None
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    return sum(file.stat().st_size for file in files)


def called(name: str, models: Sequence[StoredModel]) -> list[StoredModel]:
    """The models that `name` stands for: those of this very name, else those whose name's first words it is."""
    wanted = name.casefold()
    exact = [model for model in models if model.name and model.name.casefold() == wanted]
    return exact or [model for model in models if wanted in beginnings(model.name)]


def beginnings(name: str) -> Iterator[str]:
    """The first words of a model's name, in small letters, the fewest first, and last the whole of it.

    `a-b` of `A-B`, and both with the quantization where a GGUF file has one: `a:q8_0` of `A-B:Q8_0`.
    """
    base, colon, tag = name.casefold().partition(":")
    ends = [found.start() for found in _WORD_END.finditer(base) if found.start()]
    pieces = [base[:end] for end in ends] + [base]
    yield from pieces if name else ()
    if colon:
        yield from (f"{piece}:{tag}" for piece in pieces)


def shortest(models: Sequence[StoredModel]) -> dict[Path, str]:
    """The shortest name of each model, by path, that stands for it and for no other; its id where there is none."""
    aliases = read_names().aliases
    names = {}
    for model in models:
        fitting = (name for name in beginnings(model.name) if name not in aliases and called(name, models) == [model])
        names[model.path] = next(fitting, model.reference)
    return names


# --- what a command line says -----------------------------------------------------------------------------------------


def checked_target(model: str) -> str:
    """What an alias for `model` is to stand for: an absolute path, or a hub id; nothing is fetched.

    Raises:
        HubError: `model` is no path, no name and not written as a hub id.
        UsageError: several stored models go by the name.
    """
    refuse_missing(model)
    path = os.path.expanduser(model)
    if os.path.exists(path):
        # A link stays one, as it may lead elsewhere later; what is above one is not what is written before it.
        return str(place(path)) if ".." in path.split("/") else os.path.abspath(path)
    target = meaning(model)
    return target if os.path.isabs(target) else str(hub_ids.parse(target))


def path_of(target: str) -> Path | None:
    """The `place` of a hub id's or path's model; None for a hub id whose model is not on this machine whole."""
    path = Path(target) if os.path.isabs(target) else hub.find(hub_ids.parse(target))
    return None if path is None else place(path)


def removable(model: str) -> list[StoredModel]:
    """The stored model that a name, id or path means, or what stopped downloads left of it, to be deleted.

    Raises:
        HubError: nothing stored is meant.
        UsageError: another program stored it, or several stored models go by the name.
    """
    target = checked_target(model)
    path = path_of(target)
    found = [one for one in stored_models() if one.path == path]
    if found and found[0].kept is not None:
        return found
    if os.path.isabs(target):
        if not found:
            raise UsageError(f"{target} was not stored by runner, which leaves it alone: delete it yourself")
    elif begun := _begun(hub_ids.parse(target)):
        return begun
    if not found:
        raise HubError(f"{quoted(target)} is not on this machine: 'runner list' shows what is")
    raise UsageError(
        f"{found[0].id} was stored in {found[0].path} by another program, so runner leaves it alone: "
        "`hf cache rm` deletes it"
    )


def _begun(wanted: hub_ids.HubId) -> list[StoredModel]:
    """What stopped downloads left of a model: of one quantization only where one is named."""
    from runner.checkpoint.downloading import PARTIAL, unfinished

    repository = place(hub.cache_directory()) / hub.repository(wanted.repo).name
    begun = {path: kept for path, kept in read_names().begun.items() if repository in path.parents}
    found = {path: kept for path, kept in begun.items() if _is_of(path, kept, wanted)}
    # What is not in the table, an earlier version or one without a home directory left: no more is known of it.
    known = {blob for kept in begun.values() for blob in kept.blobs}
    strays = {path.name.removesuffix(PARTIAL) for path in unfinished(repository)} - known
    if strays and wanted.gguf is None and wanted.revision == hub_ids.MAIN:
        found[repository / "blobs"] = Kept(BEGUN, (), tuple(sorted(strays)), str(wanted))
    models = []
    for path, kept in found.items():
        folder = path.parent if path.name.endswith(".gguf") else path
        files = [folder / file for file in kept.files]
        files += [repository / "blobs" / name for blob in kept.blobs for name in (blob, f"{blob}{PARTIAL}")]
        size = sum(file.stat().st_size for file in {file.resolve() for file in files if file.is_file()})
        models.append(StoredModel(f"what was begun of {kept.of}", "", kept.of, path, None, size, kept))
    return models


def _is_of(path: Path, kept: Kept, wanted: hub_ids.HubId) -> bool:
    """Whether a download that has not ended is of the model `wanted`."""
    snapshot = next(each for each in path.parents if each.name == "snapshots")
    commit, *folders = path.relative_to(snapshot).parts
    if wanted.revision not in (commit, hub_ids.parse(kept.of).revision):
        return False
    if wanted.gguf is None:
        return True
    try:
        choose_gguf(wanted.repo, ["/".join([*folders[:-1], file]) for file in kept.files], wanted.gguf)
    except HubError:
        return wanted.gguf == hub_ids.parse(kept.of).gguf
    return True
