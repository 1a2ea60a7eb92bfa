"""What `runner inspect` prints: names below their layers, in a width that terminals have; unused tensors in short."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from places import ROOT, TESTS

from runner.cli.app import run as cli
from runner.cli.folding import fold
from runner.cli.inspect import MOST_UNUSED, spans, unused
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


@pytest.mark.parametrize(
    ("name", "lines", "layer"),
    [
        (
            "gemma3n_text-base",
            [
                ["0, 2", "rows of 2 heads of 8 + 8, the last 8 tokens", "128 B"],
                ["1", "rows of 2 heads of 8 + 8", "64 B"],
                ["3", "the rows of layer 2"],
                ["4", "the rows of layer 1"],
                ["all", "a context of 128 tokens", "9.2 kB"],  # 2 * 8 tokens * 64 B + 128 tokens * 64 B
            ],
            {"kind": "Shared", "layer": 1},
        ),
        (
            "qwen3_5_text-base",
            [
                ["0-1", "conv 3 × 96, delta 4 × 16 × 8 float32", "5.2 kB"],  # 2 * (3 * 96 * 2 B + 4 * 16 * 8 * 4 B)
                ["2", "rows of 2 heads of 16 + 16", "128 B"],
                ["all", "a context of 128 tokens", "21.6 kB"],
            ],
            {"kind": "Rows", "heads": 2, "key_size": 16, "value_size": 16},
        ),
    ],
)
def test_what_layers_remember_is_shown(
    name: str, lines: list[list[str]], layer: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(TESTS / "fixtures" / "families" / name, tmp_path / "model")
    shutil.copy(TESTS / "fixtures" / "llama" / "llama-gqa" / "tokenizer.json", model)
    assert cli(["inspect", str(model)]) == 0
    section = capsys.readouterr().out.split("\nmemory of a sequence, in 16 bits\n")[1].splitlines()
    assert [re.split(r"\s{2,}", line.strip()) for line in section[1:]] == lines
    assert cli(["inspect", str(model), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert layer.items() <= report["memory"][-1][0].items() and report["context_length"] == 128


def test_layers_of_a_kind_are_one_line_wherever_they_are() -> None:
    assert spans([0, 1, 2, 4, 7, 8]) == "0-2, 4, 7-8"
    assert spans([i for i in range(48) if i % 4 != 3]) == "0-2, 4-6, 8-10, … (36)"


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
