"""Signals that end `runner convert`: nothing of its output stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

CODE = """
import os, signal, sys
from pathlib import Path
from runner.checkpoint.writer import new_directory
from runner.cli.convert import ended_in_order

number, ignored = map(int, sys.argv[1:3])
# As `nohup` does, which the tests themselves may run under.
signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
with ended_in_order(), new_directory(Path("out"), {}, {}) as place:
    (place / "model.safetensors").write_bytes(b"weights")
    os.kill(os.getpid(), number)
    for _ in range(1000):
        pass  # Python answers signals between two of its own steps
assert signal.getsignal(number) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_signal_leaves_no_part_of_a_model(tmp_path: Path, number: int, ignored: bool) -> None:
    command = [sys.executable, "-c", CODE, str(int(number)), str(int(ignored))]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == (0 if ignored else 128 + number)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if ignored else [])
