"""`runner chat` and Ctrl-C on a real terminal (a pseudo-terminal)."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT, TESTS
from pseudo_terminal import Terminal

MODEL = str(TESTS / "fixtures" / "llama" / "llama-gqa")


@pytest.fixture
def chat() -> Iterator[Terminal]:
    terminal = Terminal("chat", MODEL, "--temperature", "0", "--max-tokens", "6", NO_COLOR="1")
    try:
        terminal.expect("/help lists the commands")
        terminal.expect("> ")
        yield terminal
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


def test_a_conversation_is_saved_loaded_and_reset(chat: Terminal, tmp_path: Path) -> None:
    chat.send("hello\r")
    chat.expect("--max-tokens reached")
    chat.expect("> ")
    saved = tmp_path / "talk.json"
    chat.send(f"/save {saved}\r")
    chat.expect(r"\(2 messages in")
    messages = json.loads(saved.read_text())
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[0]["content"] == "hello" and messages[1]["content"]
    chat.send("/reset\r")
    chat.expect("forgotten")
    chat.send("/system be brief\r")
    chat.expect("system message: be brief")
    chat.send(f"/load {saved}\r")
    chat.expect(r"\(2 messages\)")
    chat.send("/system\r")
    chat.expect("system message: none")
    chat.send("/quit\r")
    assert chat.close() == 0


def test_several_lines_and_unknown_commands(chat: Terminal, tmp_path: Path) -> None:
    chat.send('"""one\r')
    chat.expect("… ")
    chat.send('two"""\r')
    chat.expect("--max-tokens reached")
    chat.expect("> ")
    chat.send("three\\\r")
    chat.expect("… ")
    chat.send("four\r")
    chat.expect("--max-tokens reached")
    chat.expect("> ")
    chat.send("/frob\r")
    chat.expect("unknown command /frob")
    saved = tmp_path / "talk.json"
    chat.send(f"/save {saved}\r")
    chat.expect(r"\(4 messages in")
    questions = [message["content"] for message in json.loads(saved.read_text()) if message["role"] == "user"]
    assert questions == ["one\ntwo", "three\nfour"]
    chat.expect("> ")  # an end of file typed before the prompt is the terminal's, not the program's
    chat.send("\x04")
    assert chat.close() == 0


def test_ctrl_c_at_the_prompt_needs_a_second_one(chat: Terminal) -> None:
    chat.interrupt()
    chat.expect("Ctrl-C again")
    chat.expect("> ")
    chat.interrupt()
    assert chat.close() == 130


def long_model(directory: Path) -> str:
    """A fixture whose answer would take minutes, as no token ends it: Ctrl-C comes in the middle."""
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        (directory / name).write_bytes((Path(MODEL) / name).read_bytes())
    tokenizer = json.loads((Path(MODEL) / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "eos_token": None}))
    config = json.loads((Path(MODEL) / "config.json").read_text())
    config |= {"max_position_embeddings": 1 << 20, "eos_token_id": None}
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


BIAS = ("--temperature", "0.8", "--seed", "3")


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    terminal = Terminal("chat", long_model(tmp_path), *BIAS, NO_COLOR="1")
    try:
        terminal.expect("> ")
        terminal.send("hello\r")
        terminal.expect(r"hello\r\n")
        terminal.expect(r"\x1b\[\?2004l")  # the line editor has left
        terminal.expect(r"[^\s\x1b]")
        terminal.interrupt()
        terminal.expect(r"\(stopped\)")
        terminal.expect("> ")
        terminal.send("/quit\r")
        assert terminal.close() == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


def test_ctrl_c_ends_generate_with_130(tmp_path: Path) -> None:
    terminal = Terminal("generate", long_model(tmp_path), "abc", "--raw", *BIAS, NO_COLOR="1")
    try:
        terminal.expect(r"\S")
        terminal.interrupt()
        assert terminal.close() == 130
        assert "Traceback" not in terminal.seen
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


@pytest.mark.parametrize(("variable", "value", "coloured"), [("NO_COLOR", "", True), ("NO_COLOR", "1", False)])
def test_colour_only_where_it_is_wanted(variable: str, value: str, coloured: bool) -> None:
    terminal = Terminal("chat", "/nowhere", **{variable: value})
    try:
        text = terminal.expect("nowhere")
        assert ("\x1b[" in text) is coloured
        assert terminal.close() == 1
    finally:
        os.close(terminal.master)


LIBEDIT = '''"""Importing this module enables command line editing using libedit readline."""
import os
import time


def parse_and_bind(line: str) -> None:
    with open(os.environ["BINDINGS"], "a") as file:
        file.write(line + "\\n")


def add_history(line): ...
def set_completer(function): ...
def set_completer_delims(text): ...
'''


@pytest.fixture
def libedit(tmp_path: Path) -> Iterator[Terminal]:
    """A chat on a Python whose line editor is libedit, as macOS's and uv's are; a stub that says so edits nothing."""
    (tmp_path / "readline.py").write_text(LIBEDIT)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    options = ("--temperature", "0", "--max-tokens", "6")
    terminal = Terminal("chat", MODEL, *options, PYTHONPATH=path, BINDINGS=str(tmp_path / "bindings"), NO_COLOR="1")
    try:
        terminal.expect("> ")
        yield terminal
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


def test_a_bracketed_paste_is_one_message(chat: Terminal, tmp_path: Path) -> None:
    """As terminals send it where readline has asked for that: nothing is sent before Enter."""
    chat.send("\x1b[200~/one word\rtwo\r\x1b[201~")
    time.sleep(0.3)
    chat.send("three\r")
    chat.expect("--max-tokens reached")
    chat.expect("> ")
    saved = tmp_path / "talk.json"
    chat.send(f"/save {saved}\r")
    chat.expect(r"\(2 messages in")
    assert json.loads(saved.read_text())[0]["content"] == "/one word\ntwo\nthree"


def test_libedit_is_told_in_its_own_words(libedit: Terminal, tmp_path: Path) -> None:
    assert (tmp_path / "bindings").read_text() == "bind ^I rl_complete\n"


@pytest.mark.parametrize(
    ("paste", "message"),
    [
        ("one\rtwo\r\r  three", "one\ntwo\n\n  three"),  # its last line waits in the terminal
        ("one\rtwo\r", "one\ntwo"),
        ("/one two\rthree\\\r", "/one two\nthree\\"),  # no command, and the backslash is the text's own
    ],
)
def test_pasted_lines_are_one_message_without_bracketed_paste(
    libedit: Terminal, tmp_path: Path, paste: str, message: str
) -> None:
    libedit.send(paste)
    time.sleep(0.5)
    libedit.send("\r")
    libedit.expect("--max-tokens reached")
    libedit.expect("> ")
    libedit.send("typed\r")  # a line of its own is a message as before
    libedit.expect("--max-tokens reached")
    saved = tmp_path / "talk.json"
    libedit.send(f"/save {saved}\r")
    libedit.expect(r"\(4 messages in")
    assert [each["content"] for each in json.loads(saved.read_text())[::2]] == [message, "typed"]
