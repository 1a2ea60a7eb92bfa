"""scripts/bench/bench_openvino: its arguments, and its table, with a process that stands in for OpenVINO's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT, TESTS

from runner.ops.device import current

SCRIPT = str(ROOT / "scripts" / "bench" / "bench_openvino")
PACKED = str(TESTS / "fixtures" / "llama" / "llama-mlx-4bit")
STAND_IN = """#!{python}
import sys
assert sys.argv[2:] == ["openvino", {exported!r}], sys.argv
print('{{"version": "of a stand-in"}}', flush=True)
for line in sys.stdin:
    print('{{"seconds": 0.5}}', flush=True)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "RUNNER_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--openvino", "x", "--exported", "y"], "required: --model"),
        (["--model", PACKED, "--openvino", "x", "--exported", "y", "--rounds", "0"], "at least 1, not 0"),
        (["--model", PACKED, "--openvino", "x", "--exported", "y", "--prompt", "few"], "invalid positive value"),
        (["--model", PACKED, "--openvino", "x", "--exported", PACKED], "holds no openvino_model.xml"),
    ],
)
def test_what_it_refuses(arguments: list[str], said: str) -> None:
    found = run(*arguments)
    assert found.returncode != 0 and said in found.stderr


@pytest.mark.skipif(current().int8 is None, reason="activations of 8 bits are the CPU kernels'")
def test_engines_side_by_side(tmp_path: Path) -> None:
    exported, python = tmp_path / "exported", tmp_path / "python"
    exported.mkdir()
    (exported / "openvino_model.xml").touch()
    python.write_text(STAND_IN.format(python=sys.executable, exported=str(exported)))
    python.chmod(0o755)
    options = [
        "--openvino",
        str(python),
        "--exported",
        str(exported),
        "--rounds",
        "1",
        "--prompt",
        "32",
        "--depth",
        "8",
    ]
    found = run("--model", PACKED, *options)
    assert found.returncode == 0, found.stderr
    assert "OpenVINO: of a stand-in" in found.stdout
    lines = [line.split("|")[1:-1] for line in found.stdout.splitlines() if line.startswith("|")]
    names, _, theirs, exact, int8 = [[cell.strip() for cell in line] for line in lines]
    assert names == ["engine", "pp32", "", "tg64 @ d8", ""]
    assert theirs == ["OpenVINO", "64 (64 to 64)", "", "128 (128 to 128)", ""]
    for name, row in (("runner, exact", exact), ("runner, int8", int8)):
        assert row[0] == name
        for rate, ratio, of in zip(row[1::2], row[2::2], (64, 128), strict=True):
            median = int(re.fullmatch(r"(\d+) \(\1 to \1\)", rate)[1])  # type: ignore[index]
            assert float(ratio.removesuffix("×")) == pytest.approx(median / of, abs=0.02, rel=0.02)
