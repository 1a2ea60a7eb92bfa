"""What hands remember: short options, other names of commands, spellings of dtypes, and variables for options."""

from __future__ import annotations

import re
from typing import Any

import pytest
from command_line import own, run
from places import ROOT, TESTS
from typer.core import TyperOption
from typer.main import get_command

from runner.cli import app, helptext
from runner.cli.app import build
from runner.cli.chat_commands import ALIASES, LEAVING
from runner.cli.chat_settings import SPELLINGS, WORDS

MODEL = str(TESTS / "fixtures" / "llama" / "llama-gqa")
PAGE = (ROOT / "docs" / "usage" / "coming_from.md").read_text(encoding="utf-8")
RAW = ["abc", "--raw", "--temperature", "0", "--max-tokens", "4"]


def commands() -> dict[str, Any]:
    group: Any = get_command(build())
    return {"runner": group, **group.commands}


def options(command: Any) -> list[TyperOption]:
    return [parameter for parameter in command.params if isinstance(parameter, TyperOption)]


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading of the page."""
    lines = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]


def words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_table_of_short_options_has_all_and_only_those() -> None:
    named = {
        (command, typed)
        for short, _, of, _ in rows("Short options")
        for typed in words(short)
        for command in words(of)
        if of != "all"
    }
    found = {
        (name, spelling)
        for name, command in commands().items()
        for option in options(command)
        for spelling in option.opts
        if (re.fullmatch(r"-\w", spelling) or spelling == "--temp") and spelling != "-h"
    }
    assert named == found


def test_each_short_option_stands_for_the_long_one_beside_it() -> None:
    for short, long, of, _ in rows("Short options"):
        if not words(long) or of == "all":
            continue
        for command in words(of):
            (option,) = (option for option in options(commands()[command]) if words(short)[0] in option.opts)
            assert words(long)[0] in option.opts


def test_the_table_of_variables_has_all_and_only_those() -> None:
    """Each is named after its option; those of `bench`'s and `perplexity`'s are among them."""
    found = {
        (str(option.envvar), max(option.opts, key=len))
        for command in commands().values()
        for option in options(command)
        if option.envvar
    }
    assert found == {(words(variable)[0], words(option)[0]) for variable, option in rows("Variables")}
    assert all(variable == f"RUNNER_{option[2:].upper().replace('-', '_')}" for variable, option in found)


def test_the_table_of_a_chats_words_has_all_and_each_means_what_it_says() -> None:
    named = {
        typed: same
        for cells in rows("In a chat")
        for typed, same in zip(words(cells[0]), words(cells[1]), strict=False)
    }
    settings = {typed.split()[1]: same for typed, same in named.items() if typed.startswith("/set ")}
    assert {name: same for name, same in named.items() if name in ALIASES} == ALIASES
    assert all(named[word] == "/quit" for word in LEAVING)
    assert {word: settings[word] for word in WORDS} == {word: f"/set {same}" for word, same in WORDS.items()}
    spelled = {**settings, "num_predict": named["/set parameter num_predict 50"]}
    assert all(spelled[name].split()[1] == same for name, same in SPELLINGS.items())


def test_short_names_mean_what_the_long_ones_mean() -> None:
    wanted = run("generate", MODEL, *RAW)
    assert wanted.returncode == 0 and len(wanted.stdout) > 1
    for arguments in (
        ["generate", "-m", MODEL, "-p", "abc", "--raw", "--temp", "0", "-n", "4", "--dtype", "fp32"],
        ["generate", "-m", MODEL, *RAW],
        ["generate", MODEL, "-p", *RAW, "--dtype", "F32"],
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (0, wanted.stdout), done.stderr
    asked = ["abc", "--temp", "0", "-n", "4"]
    assert run("generate", MODEL, *asked, "-s", "be brief").stdout == (
        run("generate", MODEL, *asked, "--system", "be brief").stdout
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate"], "no model"),
        (["inspect"], "no model"),
        (["inspect", "-m", MODEL, "other"], "'other'"),
        (["generate", MODEL, "abc", "-p", "def"], "'abc'"),
        (["generate", "-m", MODEL, "abc", "def"], "'def'"),
        (["perplexity", "-m", MODEL], "no text"),
        (["help", "nope"], "'nope'"),
        (["help", "chat", "now"], "'now'"),
        (["generate", MODEL, "abc", "--dtype", "fp17"], "'fp17'"),
    ],
)
def test_what_says_nothing_or_too_much_is_refused(arguments: list[str], named: str) -> None:
    done = run(*arguments)
    said = own(done.stderr)
    assert (done.returncode, done.stdout) == (2, "") and said.startswith("error: ") and named in said, said


def test_other_names_of_commands_are_on_the_page_and_mean_the_same() -> None:
    for other, name in helptext.ALIASES.items():
        assert f"`runner {other}` is `runner {name}`" in " ".join(PAGE.split())
        assert f"{name}, {other}" in run("--help").stdout
    assert run("show", MODEL).stdout == run("inspect", MODEL).stdout != ""
    assert run("ls", "--json").stdout == run("list", "--json").stdout != ""


def test_run_is_chat_and_help_is_help() -> None:
    assert run("run", MODEL, "--temp", "0", "-n", "3", stdin="abc\n").stdout == (
        run("chat", MODEL, "--temp", "0", "-n", "3", stdin="abc\n").stdout
    )
    for asked, given in (
        (["help"], ["--help"]),
        (["help", "help"], ["--help"]),
        (["help", "bench"], ["bench", "--help"]),
    ):
        assert run(*asked).stdout == run(*given).stdout != ""
    assert run("-V").stdout == run("--version").stdout


def test_a_variable_is_an_option_that_the_command_line_overrides() -> None:
    def answer(*arguments: str, **environment: str) -> str:
        return run("generate", MODEL, "abc", "--raw", *arguments, **environment).stdout

    wanted = answer("--temp", "0", "-n", "4")
    assert answer(RUNNER_TEMPERATURE="0", RUNNER_MAX_TOKENS="4") == wanted
    assert answer("-n", "4", RUNNER_TEMPERATURE="0", RUNNER_MAX_TOKENS="2", RUNNER_SEED="") == wanted
    greedy = answer("--preset", "greedy", "-n", "4", RUNNER_TEMPERATURE="3", RUNNER_SEED="1")
    assert greedy == wanted != answer("-n", "4", RUNNER_PRESET="greedy", RUNNER_TEMPERATURE="3", RUNNER_SEED="1")
    ci = {"RUNNER_OS": "Linux", "RUNNER_TEMP": "/tmp", "RUNNER_TOOL_CACHE": "/opt", "RUNNER_DEBUG": "1"}
    assert answer("--temp", "0", "-n", "4", **ci) == wanted


@pytest.mark.parametrize(
    ("name", "value"),
    [("TOP_P", "7"), ("TOP_K", "few"), ("DTYPE", "int3"), ("VERBOSE", "maybe"), ("PRESET", "nope"), ("CONTEXT", "2")],
)
def test_a_bad_value_is_refused_by_the_variables_name(name: str, value: str) -> None:
    done = run("generate", MODEL, "abc", **{f"RUNNER_{name}": value})
    assert (done.returncode, done.stdout) == (2, "")
    assert f"(set by RUNNER_{name})" in done.stderr and own(done.stderr).count("\n") == 1
    assert "set by" not in run("generate", MODEL, "abc", "--top-p", "7", **{f"RUNNER_{name}": ""}).stderr


def test_the_list_of_commands_cuts_no_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["--help"]) == 0
    assert "..." not in capsys.readouterr().out.split("Commands:")[1]
