"""Reasoning on the command line: dimmed on a terminal, never on a piped stdout, and never in a chat's history."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest
from command_line import own, run
from pseudo_terminal import Terminal
from scripted import scripted, weights

from runner.cli.template_options import parsed

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


SWITCHED = TEMPLATE.replace(
    "[assistant]{% endif %}",
    "[assistant]{% if enable_thinking is defined and not enable_thinking %}"
    "(no reasoning, please, but the answer)<think></think>{% endif %}{% endif %}{{ note }}",
)


@pytest.fixture(scope="module")
def switched(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Thinks, unless its template is told not to: then its prompt is longer, and the answer stands further on."""
    at_once = SWITCHED.replace("enable_thinking is defined and not enable_thinking", "true")
    path = tmp_path_factory.mktemp("switched")
    scripted(path, [(ASK, ANSWER)], template=SWITCHED)
    told = scripted(tmp_path_factory.mktemp("told"), [(ASK, "At once.")], template=at_once)
    both = {name: mx.load(str(model / "model.safetensors")) for name, model in (("thinks", path), ("told", told))}
    positions = [model["wpe.weight"].argmax(axis=1).tolist() for model in both.values()]
    end = positions[0][-1]
    script = [second if second != end else first for first, second in zip(*positions, strict=True)]
    mx.save_safetensors(str(path / "model.safetensors"), weights(script))
    return str(path)


def test_off_is_the_templates_own_switch(switched: str) -> None:
    ask = ["generate", switched, QUESTION, "--temperature", "0", "--thinking"]
    assert run(*ask, "show").stderr == "(thinking)\nEasy.\n"
    for arguments in (["off"], ["show", "--template-arg", "enable_thinking=false"]):
        done = run(*ask, *arguments)
        assert (done.stdout, own(done.stderr)) == ("At once.\n", "")
    with terminal("chat", switched, "--thinking", "off", NO_COLOR="1") as program:
        program.expect("> ")
        program.send(f"{QUESTION}\r")
        assert "thinking" not in program.expect(r"At once\.")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--template-arg", "enable_thinkin=1"], "enable_thinkin: the model's chat template has no such variable"),
        (["--template-arg", "note"], "'note'"),
        (["--template-arg", "note=1", "--template-arg", "note=2"], "'note' twice"),
        (["--template-arg", "messages=[]"], "'messages'"),
        (["--template-arg", "enable_thinking=true", "--thinking", "off"], "leave out --template-arg enable_thinking"),
        (["--template-arg", "note=1", "--raw"], "--template-arg needs the chat template"),
        (["--thinking", "off", "--raw"], "--thinking needs the chat template"),
    ],
)
def test_what_a_template_cannot_obey_is_refused_by_name(switched: str, arguments: list[str], named: str) -> None:
    done = run("generate", switched, QUESTION, *arguments)
    assert (done.returncode, done.stdout) == (2, "") and named in done.stderr


def test_a_template_without_a_switch_is_said_to_have_none(model: str) -> None:
    for command in ("generate", "chat"):
        done = run(command, model, *([QUESTION] if command == "generate" else []), "--thinking", "off")
        assert done.returncode == 2 and "--thinking off" in done.stderr and "no switch" in done.stderr


def test_a_template_with_a_word_for_it_is_quoted(tmp_path: Path) -> None:
    """As Nemotron Nano's, which looks for the word in the messages."""
    path = scripted(
        tmp_path, [(ASK, "x")], template=TEMPLATE + "{% if '/no_think' in messages[0].content %}{% endif %}"
    )
    done = run("generate", str(path), QUESTION, "--thinking", "off")
    assert done.returncode == 2 and "it asks for /no_think in the system message" in done.stderr


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("false", False),
        ("3", 3),
        ('{"a": [1]}', {"a": [1]}),
        ("1 May", "1 May"),
        ("", ""),
        ("NaN", "NaN"),
        ("a=b", "a=b"),
    ],
)
def test_a_template_argument_is_json_or_text(text: str, value: object) -> None:
    assert parsed([f"key={text}"]) == {"key": value}
