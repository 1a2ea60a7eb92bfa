"""`scripts/check_mac` as far as it goes here: parts run on tiny models, and one that fails costs its own lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from places import ROOT


def report(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "mac_report.py"), "--small", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def test_parts_that_need_no_metal_run_anywhere() -> None:
    done = report("--parts", "threads,wired,logits")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The same tokens: yes" in done.stdout and "Parts that failed: none" in done.stdout
    wired = done.stdout.split("## wired")[1].split("## logits")[0]
    limits = [line.split("|")[1].strip() for line in wired.splitlines() if line.startswith("| 0.")]
    assert len(limits) == 4 and float(limits[0]) > 0.5 and limits[1] == "0.00"  # raised and put back, twice
    assert done.stdout.count("| 4200 |") == 4
    assert str(Path.home()) not in done.stdout and str(ROOT) not in done.stdout


def test_a_part_that_fails_leaves_the_others(tmp_path: Path) -> None:
    """mlx-lm's interpreter is none: the part says so, and the next one runs."""
    peer = tmp_path / "python"
    peer.write_text("#!/bin/sh\nexit 1\n")
    peer.chmod(0o755)
    done = report("--peer", str(peer), "--parts", "speed,wired")
    assert done.returncode == 1
    assert "**failed (1)**" in done.stdout and "Parts that failed: speed." in done.stdout
    assert "No Metal here" in done.stdout


def test_unknown_parts_are_named() -> None:
    done = report("--parts", "threads,everything")
    assert done.returncode == 2 and "no part is called everything" in done.stderr
