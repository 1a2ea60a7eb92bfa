"""What Tab completes in a shell: typer's scripts, and the names that only this program knows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run
from places import TESTS

from runner.cli.completion import FORMS
from runner.convert.quantize import QUANTIZATIONS

MODEL = str(TESTS / "fixtures" / "llama" / "llama-gqa")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place of one's own, with two aliases and a `runner` to run."""
    place = tmp_path_factory.mktemp("home")
    program = place / "runner"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m runner "$@"\n')
    program.chmod(0o755)
    for alias in ("mine", "my-other"):
        done = run("alias", alias, MODEL, XDG_DATA_HOME=str(place / "data"))
        assert done.returncode == 0, done.stderr
    return place


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["gen"], ["generate"]),
        (["chat", "m"], ["mine", "my-other"]),
        (["run", "-m", "my-"], ["my-other"]),
        (["inspect", "nothing-like-it"], []),
        (["generate", "--preset", "cr"], ["creative"]),
        (["generate", "--dtype", "bf"], ["bf16", "bfloat16"]),
        (["generate", "mine", "--thinking", ""], ["hide", "off", "show"]),
        (["bench", "--quan"], ["--quantize"]),
        (["bench", "mi"], ["mine"]),
        (["bench", "Qwen3.5"], ["Qwen3.5-0.8B"]),
        (["convert", "mine", "out", "--quantize", "mx"], ["mxfp4", "mxfp8"]),
        (["convert", "my-"], ["my-other"]),
        (["rm", "mine", "my-"], ["my-other"]),
        (["alias", "new", "mi"], ["mine"]),
    ],
)
def test_bash_completes(home: Path, words: list[str], wanted: list[str]) -> None:
    """By the very script that --install-completion installs."""
    line = " ".join(f"'{word}'" for word in ["runner", *words])
    script = (
        f'PATH="{home}:$PATH"; export XDG_DATA_HOME="{home}/data"\n'
        'eval "$(_RUNNER_COMPLETE=source_bash runner)"\n'
        f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _runner_completion runner\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert (sorted(done.stdout.split()), done.stderr) == (wanted, "")


def test_the_forms_are_those_of_quantize() -> None:
    assert list(FORMS) == list(QUANTIZATIONS)


def test_other_shells_have_scripts() -> None:
    for shell, word in (("zsh", "compdef"), ("fish", "complete --command runner")):
        done = run(_RUNNER_COMPLETE=f"source_{shell}")
        assert done.returncode == 0 and word in done.stdout
    assert run(_RUNNER_COMPLETE="nonsense").returncode == 1


def test_installing_says_where(tmp_path: Path) -> None:
    command = f"{sys.executable} -m runner --install-completion; exit $?"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False, env={"HOME": str(tmp_path)}
    )
    assert done.returncode == 0 and str(tmp_path) in done.stdout, done.stderr
    assert "_RUNNER_COMPLETE=complete_bash" in (tmp_path / ".bash_completions" / "runner.sh").read_text()
