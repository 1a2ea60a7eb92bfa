"""What `runner inspect` prints: names below their layers, in a width that terminals have; unused tensors in short."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from places import ROOT, TESTS

from runner.cli.folding import fold
from runner.cli.inspect import MOST_UNUSED, unused
from runner.inspect_model import Entry

sys.path.insert(0, str(ROOT / "scripts" / "docs"))
from terminal_session import Session


@pytest.mark.parametrize(("name", "lines"), [("gemma3_text-base", True), ("deepseek_v2-lite-yarn", False)])
def test_a_terminal_of_100_columns_holds_a_tree(name: str, lines: bool, tmp_path: Path) -> None:
    """A line for each row; experts' names may take a second one, in their own column."""
    environment = {**os.environ, "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    model = shutil.copytree(TESTS / "fixtures" / "families" / name, tmp_path / "model")
    shutil.copy(TESTS / "fixtures" / "llama" / "llama-gqa" / "tokenizer.json", model)
    code, text = Session(f"{sys.executable} -m runner inspect {model}", tmp_path, environment).run([])
    assert code == 0, text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    tree = plain.split("\ntensors\n")[1].split("\ntotals\n")[0].strip("\n").splitlines()
    assert max(map(len, tree)) <= 100
    assert not lines or all(line.split()[-1] in ("B", "kB", "MB", "GB", "size", "alike") for line in tree)


def test_tensors_are_named_below_their_layers() -> None:
    def entry(index: int, name: str, *tensors: str) -> Entry:
        return Entry(f"layers.{index}.{name}", tensors, (2, 2), "F32", 16)

    entries = [
        entry(i, "mlp", f"model.layers.{i}.mlp.gate.weight", f"model.layers.{i}.mlp.up.weight") for i in range(3)
    ]
    rows = list(fold(entries))
    assert [(row.field, row.tensors) for row in rows] == [
        ("layers.0-2", "model.layers.0-2"),
        ("mlp", "mlp.{gate,up}.weight"),
    ]
    strange = [*entries, *(entry(i, "x", f"other.{i}.x") for i in range(3))]
    rows = list(fold(sorted(strange, key=lambda each: each.field)))
    assert [(row.field, row.tensors) for row in rows] == [
        ("layers.0-2", ""),
        ("mlp", "model.layers.0-2.mlp.{gate,up}.weight"),
        ("x", "other.0-2.x"),
    ]


def test_unused_tensors_of_layers_are_one_name() -> None:
    names = [f"model.layers.{i}.q_proj.input_scale" for i in range(32)]
    assert unused(names) == "model.layers.*.q_proj.input_scale (32 tensors)"
    experts = [f"layers.{i}.experts.{j}.k_scale" for i in range(2) for j in range(4)]
    assert unused([*experts, "a.2.b", "c"]) == "layers.*.experts.*.k_scale (8 tensors), a.*.b, c"


def test_of_many_unused_tensors_a_few_are_named() -> None:
    text = unused([f"x{i}" for i in range(1000)])
    assert text.count("x") == MOST_UNUSED and text.endswith(f"and {1000 - MOST_UNUSED} more")
