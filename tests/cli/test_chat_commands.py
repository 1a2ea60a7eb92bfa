"""The commands of a chat and what is kept between chats; from a pipe where no terminal is needed."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from command_line import own, run
from places import TESTS
from pseudo_terminal import Terminal

import runner
from runner.cli import history
from runner.cli.chat_commands import ALIASES, Commands
from runner.cli.chat_input import completed
from runner.cli.chat_model import LocalModel
from runner.cli.chat_settings import ChatSettings
from runner.cli.conversation import Conversation
from runner.cli.terminal import visible
from runner.errors import ContextLengthError, UsageError

MODEL = str(TESTS / "fixtures" / "llama" / "llama-gqa")
GREEDY = ("--temp", "0", "-n", "6")


def chat(*lines: str, options: tuple[str, ...] = GREEDY, code: int = 0) -> tuple[str, str]:
    """Stdout and stderr of a chat whose lines come from a pipe."""
    done = run("chat", MODEL, *options, stdin="".join(f"{line}\n" for line in lines))
    assert done.returncode == code, done.stderr
    return done.stdout, own(done.stderr)


@contextmanager
def terminal(*arguments: str, **environment: str) -> Iterator[Terminal]:
    program = Terminal(*arguments, *GREEDY, NO_COLOR="1", **environment)
    try:
        yield program
    finally:
        program.process.kill()
        program.process.wait()
        os.close(program.master)


SAID = [
    ("/set temperature 0.5", "(temperature 0.5)"),
    ("/set temp 0.7", "(temperature 0.7)"),
    ("/set parameter num_predict 3", "(max_tokens 3)"),
    ("/set repeat_penalty 1.1", "(repetition_penalty 1.1)"),
    ("/set top-k 5", "(top_k 5)"),
    ("/set max_tokens default", "(max_tokens what is left of the context)"),
    ("/set preset creative", "(preset creative)"),
    ("/set preset", "(preset creative)"),
    ("/set top_p 0.5", "(top_p 0.5)"),
    ("/set preset", "(preset none)"),
    ("/set preset default", "(preset balanced)"),  # for models that say nothing of sampling
    ("/set stop \\n", '(stop "\\\\n")'),
    ('/set stop "\\n"', '(stop "\\n")'),
    ("/set seed 7", "(seed 7)"),
    ("/set seed default", "(seed random)"),
    ("/set verbose", "(verbose on)"),
    ("/set verbose off", "(verbose off)"),
    ("/set nowordwrap", "(wrap off)"),
    ("/set nohistory", "(history off)"),
    ("/set thinking hide", "(thinking hide)"),
    ("/set system be brief", "(system message: be brief)"),
]


def test_set_says_what_now_holds() -> None:
    said = chat(*(typed for typed, _ in SAID))[1].splitlines()
    assert [line for line in said if line] == [line for _, line in SAID]


@pytest.fixture(scope="module")
def commands() -> Commands:
    lm = runner.load(MODEL)
    settings = ChatSettings(LocalModel(lm), {}, variables={}, thinking=None, verbose=False, wrap=True, history=False)
    return Commands(Conversation(), settings, lambda text: True, interactive=False)


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("/set tempature 1", "/set tempature: no such setting; there are preset, temperature"),
        ("/set temperature hot", "'hot'"),
        ("/set top_p 7", "top_p"),
        ("/set max_tokens 0", "max_tokens"),
        ("/set preset nope", "'nope'"),
        ("/set wrap maybe", "'maybe'"),
        ("/set thinking loud", "'loud'"),
        ("/set nothink", "--thinking off"),
        ("/set num_ctx 4096", "--context N"),
        ('/set stop "', "stop"),
        ("/show me", "/show me: there are info"),
        ("/regen", "no message"),
        ("/regen now", "takes no text"),
        ("/edit", "needs a terminal"),
        ("/read", "/read notes.txt"),
        ("/read /dev/zero", "/dev/zero is not a regular file"),
        ("/read /nowhere", "/nowhere"),
        ("/frob", "unknown command /frob"),
    ],
)
def test_what_a_command_cannot_do_is_refused_and_changes_nothing(commands: Commands, typed: str, named: str) -> None:
    before = commands.settings.shown()
    with pytest.raises(UsageError) as caught:
        commands.take(typed)
    assert named in str(caught.value)
    assert commands.settings.shown() == before and not commands.read and not commands.conversation.all()


def test_tab_knows_every_command(commands: Commands) -> None:
    assert {line.split()[0] for line in Commands.completions()} == {*commands.table, *ALIASES}


def test_a_path_is_a_message_and_no_command(commands: Commands) -> None:
    assert not commands.take("/etc/hosts has what?") and not commands.take(" /quit") and not commands.take("quit it")


def test_settings_hold_for_the_next_answer() -> None:
    whole = chat("abc")[0]
    assert chat("/set max_tokens 2", "abc")[0] == run("chat", MODEL, "--temp", "0", "-n", "2", stdin="abc\n").stdout
    preset = chat("/set preset creative", "/set seed 3", "abc", options=("-n", "6"))[0]
    assert preset == chat("abc", options=("--preset", "creative", "--seed", "3", "-n", "6"))[0] != whole
    assert chat("/set preset creative", "/set preset greedy", "abc")[0] == whole
    assert "tokens-per-sec" in chat("/set verbose", "abc")[1]


def test_show_says_what_there_is() -> None:
    said = chat("/system be brief", "abc", "/show", "/show settings", "/show template", "/show messages")[1]
    assert "family" in said and "llama" in said and "of them used by 3 messages" in said
    assert "temperature" in said and "what is left" not in said  # -n 6 holds
    assert "<|start_header_id|>" in said and "\nsystem: be brief\nuser: abc\nassistant: " in said
    assert "(no messages)" in chat("/show messages")[1]


def test_regen_replaces_the_answer(tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    out, said = chat("abc", "/regen", f"/save {saved}")
    first, second = out.splitlines()[0], out.splitlines()[-1]
    assert first == second and "the temperature is 0" in said and "(2 messages in" in said
    varied = ("--temp", "3", "-n", "12")
    out, said = chat("abc", "/regen", f"/save {saved}", options=varied)
    assert "the same" not in said and json.loads(saved.read_text())[1]["content"] in out
    assert "the seed is 5" in chat("abc", "/regen", options=("--seed", "5", *varied))[1]


def test_a_file_goes_with_the_next_message_alone(tmp_path: Path) -> None:
    note, saved = tmp_path / "my note.txt", tmp_path / "talk.json"
    note.write_bytes(b"\xef\xbb\xbfline\r\nnext\n\n")
    chat(f"/read {note}", f"/read {note}", "what?", "and?", f"/save {saved}")
    assert [m["content"] for m in json.loads(saved.read_text())[::2]] == [
        "what?\n\nline\r\nnext\n\nline\r\nnext",
        "and?",
    ]
    note.write_bytes(b"caf\xe9")
    assert "not UTF-8" in chat(f"/read {note}", code=2)[1]


@pytest.mark.parametrize("error", [None, ContextLengthError(9, 8)])
def test_a_file_waits_until_a_turn_with_it_is_kept(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """It was forgotten where the answer failed, and the next message went without it."""
    (tmp_path / "note.txt").write_text("line")
    asked: list[str] = []

    def answer(text: str) -> bool:
        asked.append(text)
        if len(asked) == 1 and error is not None:
            raise error
        return len(asked) > 1

    monkeypatch.setattr(commands, "answer", answer)
    commands.take(f"/read {tmp_path / 'note.txt'}")
    with nullcontext() if error is None else pytest.raises(ContextLengthError):
        commands.ask("one")
    assert commands.ask("two") and commands.ask("three")
    assert asked == ["one\n\nline", "two\n\nline", "three"]
    commands.take(f"/read {tmp_path / 'note.txt'}")
    commands.take("/read")
    assert commands.ask("four") and asked[-1] == "four"


def test_other_names_mean_the_same() -> None:
    for leave in ("/quit", "/bye", "/exit", "exit", "quit"):
        assert chat(leave, "abc") == ("", "")
    assert chat(" exit")[0] != ""  # a message, as after a space always
    assert chat("/?")[1] == chat("/help")[1] and chat("/clear")[1] == chat("/reset")[1] == "(forgotten)\n\n"
    help_text = chat("/help")[1]
    known = {line.split()[0] for line in Commands.completions()}
    assert known >= set(ALIASES) and all(name in help_text for name in known)


def test_tab_completes_commands_settings_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Commands.completions()
    assert completed("/re", lines) == ["/regen", "/read", "/reset"] and completed("", lines) == []
    assert completed("/set te", lines) == ["/set temperature "] and completed("/show s", lines) == [
        "/show settings",
        "/show system",
    ]
    for name in ("a note.txt", "a [b].txt", "other"):
        (tmp_path / name).touch()
    (tmp_path / "adir").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert completed("/read ~/a", lines) == ["/read ~/a [b].txt", "/read ~/a note.txt", "/read ~/adir/"]
    assert completed(f"/load {tmp_path}/a [", lines) == [f"/load {tmp_path}/a [b].txt"]
    assert completed("say /read", lines) == [] == completed("/read ~/none", lines)


EDITOR = """#!/bin/sh
sed -i 's/^hello$/bye/' "$1"
printf 'second line\\n\\n' >> "$1"
"""


def test_edit_replaces_the_last_turn(tmp_path: Path) -> None:
    editor, saved = tmp_path / "my editor", tmp_path / "talk.json"
    editor.write_text(EDITOR)
    editor.chmod(0o755)
    with terminal("chat", MODEL, VISUAL="", EDITOR=f"'{editor}'") as program:
        program.expect("> ")
        program.send("hello\r")
        program.expect("--max-tokens reached")
        program.expect("> ")
        program.send("/edit\r")
        program.expect("--max-tokens reached")
        program.expect("> ")
        program.send(f"/save {saved}\r")
        program.expect(r"\(2 messages in")
        assert json.loads(saved.read_text())[0]["content"] == "bye\nsecond line"
    for named, said in (
        ("false", "ended with code 1"),
        ("/nowhere/vi", "cannot start the editor"),
        ("true", "changed"),
    ):
        with terminal("chat", MODEL, VISUAL=named) as program:
            program.expect("> ")
            program.send("/edit\r")
            program.expect(said)


def test_typed_lines_are_there_in_the_next_chat(tmp_path: Path) -> None:
    home = {"XDG_DATA_HOME": str(tmp_path / "data")}
    kept = tmp_path / "data" / "runner" / "chat_history"
    for switch in ("--no-history", "--history"):
        with terminal("chat", MODEL, switch, **home) as program:
            program.expect("> ")
            program.send("hello wörld\r")
            program.expect("--max-tokens reached")
            program.expect("> ")
            assert kept.exists() is (switch == "--history")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600 == stat.S_IMODE((kept.parent / "last_chat.json").stat().st_mode)
    assert kept.read_text() == '"hello wörld"\n'
    with terminal("chat", MODEL, **home) as program:
        program.expect("> ")
        program.send("\x1b[A")  # arrow up
        program.expect("hello wörld")
        program.send("\x15/quit\r")
        assert program.close() == 0


def test_typed_lines_survive_damage_and_do_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    lines = history.TypedLines()
    assert lines.read() == []
    for line in ("one", "one", "two\nlines", " ", "\udce9"):
        lines.add(line)
    with lines.path.open("ab") as file:
        file.write(b'{"a": 1}\n"half\n\xff\n')
    assert history.TypedLines().read() == ["one", "two\nlines", "\udce9"]
    lines.path.write_text("".join(f'"{number}"\n' for number in range(3 * history.LINES)))
    lines.path.chmod(0o644)
    assert lines.read()[0] == str(2 * history.LINES) and len(lines.read()) == history.LINES
    assert stat.S_IMODE(lines.path.stat().st_mode) == 0o600
    monkeypatch.setattr(history, "data_directory", lambda: Path("no/home"))
    history.TypedLines().add("lost")
    assert not Path("no").exists() and history.TypedLines().read() == []
    none = history.TypedLines(kept=False)
    none.add("secret")
    assert none.read() == [] and "secret" not in lines.path.read_text()


def test_the_last_chat_goes_on(tmp_path: Path) -> None:
    """With the model that it was held with, in a chat, and in single questions as llm's -c does."""
    home = {
        "XDG_DATA_HOME": str(tmp_path),
        "RUNNER_TEMPERATURE": "0",
        "RUNNER_MAX_TOKENS": "6",
        "RUNNER_CONTEXT": "400",
    }

    def kept() -> list[str]:
        return [m["content"] for m in json.loads((tmp_path / "runner" / "last_chat.json").read_text())["messages"]]

    refused = run("chat", "-c", **home)
    assert refused.returncode == 2 and "no last chat" in refused.stderr
    with terminal("chat", os.path.relpath(MODEL), "-s", "be brief", **home) as program:
        program.expect("> ")
        program.send("one\r")
        program.expect("--max-tokens reached")
        program.expect("> ")
    assert kept()[:2] == ["be brief", "one"]
    asked = run("generate", "-c", "two", **home)
    assert asked.returncode == 0 and kept()[3:] == ["two", asked.stdout.rstrip("\n")]
    assert run("run", "-c", stdin="three\n", **home).returncode == 0 and kept()[5] == "three"
    before = kept()
    run("generate", MODEL, "four", **home)  # not at a terminal, and not asked for: a script leaves no trace
    assert kept() == before
    assert run("generate", "-c", "-m", MODEL, "five", "-s", "be long", **home).returncode == 0
    assert kept()[0] == "be long" and kept()[-2] == "five"
    forbidden = {**home, "RUNNER_HISTORY": "0"}
    for switch, named, where in (
        ("--raw", "--continue needs", home),
        ("--no-history", "--no-history", home),
        ("--verbose", "(set by RUNNER_HISTORY)", forbidden),
    ):
        done = run("generate", "-c", "six", switch, **where)
        assert done.returncode == 2 and named in done.stderr
    (tmp_path / "runner" / "last_chat.json").write_text('{"model": "m", "messages": [3]}')
    assert "remove the file" in run("chat", "-c", **home).stderr


def test_run_with_a_prompt_answers_it_and_leaves() -> None:
    wanted = chat("abc")[0]
    for command in ("run", "chat"):
        done = run(command, MODEL, "abc", *GREEDY)
        assert (done.returncode, done.stdout) == (0, wanted)
    assert run("run", MODEL, "abc", *GREEDY, stdin="def").stdout == run("generate", MODEL, "abc\n\ndef", *GREEDY).stdout
    whole = run("run", MODEL, "-", *GREEDY, stdin="abc\ndef\n").stdout
    assert whole == run("run", "-m", MODEL, "-p", "abc\ndef", *GREEDY).stdout != chat("abc", "def")[0]
    with terminal("run", MODEL, "abc") as program:
        assert program.close() == 0 and visible(wanted.rstrip("\n")) in program.seen.replace("\r", "")
