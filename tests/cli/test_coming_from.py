"""The table of docs/usage/coming_from.md: what is typed here runs, and what it says comes back."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import own
from places import ROOT, TESTS

from runner.cli import history

PAGE = (ROOT / "docs" / "usage" / "coming_from.md").read_text(encoding="utf-8")
FIXTURE = TESTS / "fixtures" / "llama" / "llama-gqa"
HUB = "runner pull "  # asks the hub, which no test does; tests/checkpoint/test_hub.py has one of its own
SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"


def rows() -> list[list[str]]:
    """The cells of the table, blanks included."""
    lines = PAGE.partition("## Side by side\n")[2].partition("\n## ")[0].splitlines()
    return [re.split(r" *\| *", line)[1:-1] for line in lines if line.startswith("|")][2:]


ROWS = {cells[0]: (re.findall(r"`([^`]+)`", cells[4]), re.findall(r"`([^`]+)`", cells[5])) for cells in rows()}


def test_the_table_is_whole() -> None:
    assert len(ROWS) == len(rows()) >= 20
    assert all(len(cells) == 6 and cells[4] and cells[5] for cells in rows())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with `runner`, a model that `smollm2` stands for and that can think, notes, and a last chat."""
    home = tmp_path_factory.mktemp("home")
    program = home / "runner"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m runner "$@"\n')
    program.chmod(0o755)
    model = home / "models" / "SmolLM2"
    shutil.copytree(FIXTURE, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    with (model / "chat_template.jinja").open("a") as file:
        file.write(SWITCH)
    (home / "notes.txt").write_text("The ferry leaves at nine.\n")
    assert shell(home, f"runner alias smollm2 '{model}'").returncode == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(home / "data"))
        history.keep_last_chat("smollm2", [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}])
    return home


def shell(home: Path, line: str) -> subprocess.CompletedProcess[str]:
    places = {"XDG_DATA_HOME": str(home / "data"), "XDG_CONFIG_HOME": str(home / "config"), "HF_HUB_OFFLINE": "1"}
    own_path = {"PATH": f"{home}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(home / "hub")}
    return subprocess.run(
        ["bash", "-c", line],
        cwd=home,
        env={**os.environ, **places, **own_path, "RUNNER_MAX_TOKENS": "6"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("wanted", [name for name, (typed, _) in ROWS.items() if not typed[0].startswith(HUB)])
def test_what_is_typed_here_runs(place: Path, wanted: str) -> None:
    typed, said = ROWS[wanted]
    if typed[0].startswith("runner ") or typed[0].startswith("RUNNER_"):
        (line,) = typed
    else:  # a line for a chat, after one answer
        lines = ["Hi", *typed, "Hi"] if typed[0] != "/bye" else [*typed, "Hi"]
        (place / "typed.txt").write_text("".join(f"{each}\n" for each in lines))
        line = "runner run smollm2 < typed.txt"
    if "rm mine" in line:
        shell(place, "runner alias mine smollm2")
    done = shell(place, line)
    assert done.returncode == 0, done.stderr
    output = done.stdout + own(done.stderr)
    for word in said:
        assert word in ("> ", "\\", "mine") or word in output, f"{word!r} not in {output!r}"
    if wanted == "leave":
        assert done.stdout == ""
    elif wanted != "chat":
        assert output.strip()


def test_the_same_answer_each_time_is_that(place: Path) -> None:
    """And the other claims of the last column that one run cannot show."""
    for wanted in ("always get the likeliest", "repeat a drawn answer"):
        (line,) = ROWS[wanted][0]
        assert shell(place, line).stdout == shell(place, line).stdout != ""
    raw, asked = (shell(place, f'runner generate smollm2 "Once" {way} --temp 0').stdout for way in ("--raw", "--chat"))
    assert raw != asked
    shell(place, "runner alias mine smollm2")
    assert (
        shell(place, "runner generate mine Hi --temp 0").stdout == shell(place, "runner run smollm2 Hi --temp 0").stdout
    )
    assert "mine = " not in shell(place, "runner rm mine && runner alias").stdout
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(place / "data"))
        before = history.read_last_chat().messages
        assert shell(place, ROWS["go on with the last chat"][0][0]).returncode == 0
        after = history.read_last_chat().messages
    assert after[: len(before)] == before and after[-2]["content"] == "And?"
