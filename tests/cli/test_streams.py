"""Standard streams that are closed at the start, full, or gone: exit codes, and no file takes their numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import own
from places import TESTS

MODEL = str(TESTS / "fixtures" / "llama" / "llama-gqa")
ASK = f"generate {MODEL} abc --raw --temp 0 -n 4"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m runner LINE` as a shell does, redirections included."""
    done = subprocess.run(
        ["bash", "-c", f"exec {sys.executable} -m runner {line}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )
    return subprocess.CompletedProcess(line, done.returncode, done.stdout, own(done.stderr))


@pytest.fixture(scope="module")
def answer() -> str:
    done = shell(f"{ASK} </dev/null")
    assert (done.returncode, done.stderr) == (0, "") and len(done.stdout) > 1
    return done.stdout


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-", "2>/dev/full"])
def test_an_answer_needs_stdout_alone(answer: str, closed: str) -> None:
    """Without the numbers 0 or 2 taken, MLX said that it could not open the checkpoint."""
    done = shell(f"{ASK} {closed}")
    assert (done.returncode, done.stdout, done.stderr) == (0, answer, "")


def test_notes_that_nobody_reads_do_not_end_an_answer() -> None:
    done = shell(f"generate {MODEL} abc --raw -n 4 --seed 1 2>/dev/full </dev/null")
    assert done.returncode == 0 and done.stdout.strip()


@pytest.mark.parametrize("command", [ASK, "--version", "--help", "list", f"inspect {MODEL}", f"chat {MODEL}"])
def test_a_closed_stdout_is_refused(command: str) -> None:
    done = shell(f"{command} >&-")
    assert (done.returncode, done.stderr) == (1, "error: standard output is closed\n")


def test_all_three_closed_is_an_exit_code() -> None:
    assert shell(f"{ASK} <&- >&- 2>&-").returncode == 1


def test_a_full_disk_is_one_line() -> None:
    for command in ("--version", f"{ASK} </dev/null"):
        done = shell(f"{command} >/dev/full")
        assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full"])
def test_the_code_tells_where_the_message_cannot(closed: str) -> None:
    assert shell(f"nope {closed}").returncode == 2
    assert shell(f"inspect /nowhere {closed}").returncode == 1


def test_a_closed_stdin_has_no_text(answer: str) -> None:
    done = shell(f"generate {MODEL} - <&-")
    assert done.returncode == 2 and "closed" in done.stderr and done.stdout == ""
    done = shell(f"generate {MODEL} <&-")
    assert done.returncode == 2 and "the prompt is empty" in done.stderr
    done = shell(f"chat {MODEL} --temp 0 <&-")  # as at the end of input
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_file_is_written_to_by_messages(tmp_path: Path) -> None:
    """A converted model has no line of stderr in it, though its files are opened while 2 is free."""
    plain, closed = tmp_path / "plain", tmp_path / "closed"
    home = str(tmp_path / "data")
    assert shell(f"convert {MODEL} {plain} </dev/null", XDG_DATA_HOME=home).returncode == 0
    assert shell(f"convert {MODEL} {closed} <&- 2>&-", XDG_DATA_HOME=home).returncode == 0
    for path in plain.iterdir():
        assert path.read_bytes() == (closed / path.name).read_bytes()
