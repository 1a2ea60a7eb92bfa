"""What happens to keys of `config.json` that a family's config does not read: refused, or ignored with a note.

The principle: a key is refused if it could change numbers, which is the case if transformers reads it for this
`model_type`; configs/keys/transformers.json lists those keys. A key that nothing reads changes nothing, and files are
full of them (trainers' remarks, options of other programs): it is ignored, and a note names it. A misspelt key is the
exception: nothing reads it, but its author meant one that matters, and without it the default would be used. It is
refused where the file lacks the key that was meant.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from runner import resources
from runner.config.harmless_keys import HARMLESS
from runner.config.layer_types import FULL
from runner.config.problems import MOST_UNKNOWN, misspelt, short
from runner.local_files import quoted
from runner.reprs import similar

FOREIGN: Mapping[str, str] = {
    "model_file": "it names Python code that replaces the model (mlx-lm), and code from a checkpoint is never run",
    "compression_config": "it says that tensors are compressed, in a way that is not supported",
}
"""Keys that other programs than transformers read, and that change numbers."""

EVERYWHERE = "*"
"""In the table: the keys that transformers reads for every `model_type`."""


def judge(
    values: Mapping[str, Any], known: Collection[str], harmless: Collection[str], model_type: object
) -> tuple[list[str], list[str]]:
    """Judge the keys of `values` that nothing here reads.

    Args:
        values: the object in `config.json`.
        known: the keys that the family's config reads.
        harmless: further keys that do not matter in this family.

    Returns:
        Sentences about the keys that are refused, and names and values of those that are ignored.
    """
    # null and false are how a file says that a feature which this family does not have is off.
    left = [
        name
        for name, value in values.items()
        if name not in known
        and name not in harmless
        and name not in HARMLESS
        and value is not None
        and value is not False
    ]
    problems: list[str] = []
    notes: list[str] = []
    if not left:
        return problems, notes
    if len(left) > MOST_UNKNOWN:
        return [f"{len(left)} keys are not understood, more than any model has: the first is {quoted(left[0])}"], notes
    own, anywhere = read_by_transformers(model_type)
    for name in left:
        said = f"{quoted(name)} = {short(values[name])}"
        # A key that some other model_type has is spelled right (`v_head_dim` beside `head_dim`).
        candidates = [] if name in anywhere else sorted(known)
        meant = misspelt(name, candidates)
        near = meant or similar(name, candidates, 0.8)
        if name in FOREIGN:
            problems.append(f"key {said} is not supported: {FOREIGN[name]}")
        elif name in own and not changes_nothing(name, values[name]):
            problems.append(f"key {said} could change the numbers and is not understood")
        elif meant is not None and meant not in values:
            problems.append(f"key {said} is not understood; did you mean {meant!r}?")
        elif name not in own:
            notes.append(said + (f" (did you mean {near!r}?)" if near else ""))
    return problems, notes


def read_by_transformers(model_type: object) -> tuple[frozenset[str], frozenset[str]]:
    """The keys that transformers reads for a `model_type`, and those that it reads for any of the supported ones.

    For a family of another package, which the table does not have, the two are the same: without a table to go by, a
    key that matters somewhere may matter here.
    """
    table: dict[str, list[str]] = resources.read("keys", "transformers")["keys"]
    anywhere = frozenset(name for keys in table.values() for name in keys)
    if isinstance(model_type, str) and model_type in table:
        return frozenset(table[EVERYWHERE]) | frozenset(table[model_type]), anywhere
    return anywhere, anywhere


def changes_nothing(name: str, value: object) -> bool:
    """Whether a key that this family does not have has the value that says so."""
    if name == "layer_types":
        return isinstance(value, list) and all(item == FULL for item in value)
    return name in ("partial_rotary_factor", "is_causal", "number_of_conv_states") and value == 1
