"""System messages, where a chat template has no place for one: refused, never left out without a word."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command_line import own, run
from places import TESTS

GREEDY = ["--temperature", "0", "--max-tokens", "3"]
TURNS = "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}"
DROPS, REFUSES, USUAL = (
    TURNS,
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TURNS,
    "{{ messages[0].content if messages[0].role == 'system' else 'Be kind.' }}" + TURNS,
)
LEFT_OUT = "the model's chat template leaves system messages out: say it in the prompt"


def templated(path: Path, template: str) -> str:
    """A tiny model with this chat template."""
    model = shutil.copytree(TESTS / "fixtures" / "llama" / "llama-gqa", path)
    (model / "chat_template.jinja").write_text(template)
    return str(model)


@pytest.mark.parametrize(
    ("template", "code", "words"), [(DROPS, 2, f"--system: {LEFT_OUT}"), (REFUSES, 1, "no system role")]
)
def test_a_system_message_without_a_place_is_refused(template: str, code: int, words: str, tmp_path: Path) -> None:
    model = templated(tmp_path / "model", template)
    for command in ("generate", "chat"):
        done = run(command, model, "Hi", "-s", "Be brief.", *GREEDY)
        assert (done.returncode, done.stdout) == (code, "") and words in done.stderr
    done = run("generate", model, "Hi", *GREEDY, RUNNER_SYSTEM="Be brief.")
    assert done.returncode == code and words in done.stderr
    assert run("generate", model, "Hi", *GREEDY).returncode == 0


def test_a_chat_refuses_the_message_and_keeps_the_one_that_it_had(tmp_path: Path) -> None:
    done = run("chat", templated(tmp_path / "model", DROPS), *GREEDY, stdin="/system Be brief.\n")
    assert done.returncode == 2 and f"/system: {LEFT_OUT}" in done.stderr and "(system message" not in done.stderr


def test_the_templates_own_message_may_be_said(tmp_path: Path) -> None:
    """What is written is then the same with and without."""
    done = run("generate", templated(tmp_path / "model", USUAL), "Hi", "-s", "Be kind.", *GREEDY)
    assert (done.returncode, own(done.stderr)) == (0, "")
