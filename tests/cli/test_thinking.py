"""Reasoning on the command line: dimmed on a terminal, never on a piped stdout, and never in a chat's history."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import own, run
from pseudo_terminal import Terminal
from scripted import scripted

QUESTION = "Capital?"
ASK = [{"role": "user", "content": QUESTION}]
ANSWER = "<think>\nEasy.\n</think>\n\nParis."
# Like Qwen's: it reads the reasoning of earlier turns and writes it out, here as (...).
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}{# <think></think> #}"
)
AGAIN = [
    *ASK,
    {"role": "assistant", "content": "Paris.", "reasoning_content": "Easy."},
    {"role": "user", "content": "Sure?"},
]
DIM = "\x1b[2m"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Answers the first question; answers the second only if the template got content and reasoning apart."""
    turns = [(ASK, ANSWER), (AGAIN, "<think>Hm.</think>Quite sure.")]
    return str(scripted(tmp_path_factory.mktemp("model"), turns, template=TEMPLATE))


@contextmanager
def terminal(*arguments: str, **environment: str) -> Iterator[Terminal]:
    program = Terminal(*arguments, "--temperature", "0", **environment)
    try:
        yield program
    finally:
        program.process.kill()
        program.process.wait()
        os.close(program.master)


def test_a_pipe_gets_the_answer_alone(model: str) -> None:
    """On the old code stdout was "<think>\\nEasy.\\n</think>\\n\\nParis."."""
    for arguments, beside in (([], ""), (["--thinking", "hide"], ""), (["--thinking", "show"], "(thinking)\nEasy.\n")):
        done = run("generate", model, QUESTION, "--temperature", "0", *arguments)
        assert (done.stdout, own(done.stderr)) == ("Paris.\n", beside)


def test_json_has_a_key_for_it(model: str) -> None:
    def joined(key: str, *arguments: str) -> str:
        done = run("generate", model, QUESTION, "--temperature", "0", "--json", *arguments)
        return "".join(json.loads(line).get(key, "") for line in done.stdout.splitlines())

    assert (joined("text"), joined("reasoning")) == ("Paris.", "Easy.")
    assert joined("reasoning", "--thinking", "hide") == ""


def test_an_answer_that_is_all_reasoning_says_so(model: str) -> None:
    done = run("generate", model, QUESTION, "--temperature", "0", "--max-tokens", "12")
    assert done.stdout == "" and "only reasoning and no answer" in done.stderr


def test_raw_text_has_no_reasoning_apart(model: str) -> None:
    done = run("generate", model, QUESTION, "--raw", "--thinking", "hide")
    assert done.returncode == 2 and "--thinking needs the chat template" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "wanted"),
    [
        ([], {"NO_COLOR": ""}, "Easy.\r\n\r\nParis.\r\n"),
        (["--thinking", "show"], {"NO_COLOR": "1"}, "(thinking)\r\nEasy.\r\n(answer)\r\nParis.\r\n"),
        (["--thinking", "hide"], {"NO_COLOR": "1"}, "Paris.\r\n"),
    ],
)
def test_a_terminal_shows_it_dimmed(model: str, arguments: list[str], environment: dict[str, str], wanted: str) -> None:
    with terminal("generate", model, QUESTION, *arguments, **environment) as program:
        text = program.expect(r"Paris\.\r\n")
        assert program.close() == 0
    assert (f"{DIM}E" in text) is ("show" not in arguments and "hide" not in arguments)
    # Without the colours, and without the status line, which ends by removing itself.
    bare = text.replace(DIM, "").replace("\x1b[0m", "").rpartition("\x1b[K")[2]
    assert bare.endswith(wanted) and ("Easy." in bare) is ("Easy." in wanted)


def test_the_history_of_a_chat_holds_content(model: str, tmp_path: Path) -> None:
    """The second answer comes only if the template got the first answer's text and reasoning each in its place."""
    saved = tmp_path / "chat.json"
    with terminal("chat", model, NO_COLOR="1") as program:
        program.expect("> ")
        program.send(f"{QUESTION}\r")
        program.expect(r"\(thinking\)\s+Easy\.\s+\(answer\)\s+Paris\.")
        program.expect("> ")
        program.send("Sure?\r")
        program.expect(r"\(thinking\)\s+Hm\.\s+\(answer\)\s+Quite sure\.")
        program.expect("> ")
        program.send(f"/save {saved}\r")
        program.expect(r"\(4 messages in")
        program.send("/quit\r")
        assert program.close() == 0
    found = [message["content"] for message in json.loads(saved.read_text())]
    assert found == [QUESTION, "Paris.", "Sure?", "Quite sure."]


def test_a_turn_without_an_answer_is_not_kept(model: str, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    with terminal("chat", model, "--max-tokens", "12", NO_COLOR="1") as program:
        program.expect("> ")
        program.send(f"{QUESTION}\r")
        program.expect("your message was not kept")
        program.expect("> ")
        program.send(f"/save {saved}\r")
        program.expect(r"\(0 messages in")
