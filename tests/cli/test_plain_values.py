"""Values of options: what is taken as it looks is what typer, by pydantic, makes of it."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
import typer
from typer.main import get_command

from runner.cli.app import run
from runner.cli.plain_values import in_words, without_pydantic

VALUES = ["0", "-1", "7", "007", "1.5", "2.0", "-0.25", "1e3", ".5", "5.", "nan", " 3", "1_000", "", "x", "٣", "9" * 16]


def made(annotation: Any, value: str | None, *, quick: bool) -> Any:
    """What a command is given where `value` is typed, or the message."""
    found: list[Any] = []

    def command(option: Any = None) -> None:
        found.append(option)

    command.__annotations__["option"] = annotation
    application = typer.Typer(add_completion=False, rich_markup_mode=None)
    application.command()(command)
    program = get_command(application)
    if quick:
        without_pydantic(program.params)
    try:
        with program.make_context("it", [] if value is None else ["--option", value]) as context:
            program.invoke(context)
    except typer.BadParameter as error:
        return error.message
    return repr(found)


@pytest.mark.parametrize(
    "annotation",
    [
        Annotated[str | None, typer.Option()],
        Annotated[int | None, typer.Option()],
        Annotated[int | None, typer.Option(min=1, max=7)],
        Annotated[float | None, typer.Option(min=0.0)],
        Annotated[list[str] | None, typer.Option()],
        Annotated[str | None, typer.Option(parser=lambda text: text.upper())],
    ],
    ids=["text", "whole", "range", "number", "several", "parsed"],
)
def test_values_are_those_of_pydantic(annotation: Any) -> None:
    for value in (None, *VALUES):
        assert made(annotation, value, quick=True) == in_words(made(annotation, value, quick=False), value), value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-n", "many"], "'--max-tokens' / '-n': 'many' is not a whole number (see"),
        (["-n", "0"], "'-n': it must be at least 1, not '0' (see"),
        (["--temp", "hot"], "'--temp': 'hot' is not a number (see"),
        (["--thinking", "no"], "'--thinking': 'no' is not one of 'show', 'hide', 'off' (see"),
    ],
)
def test_what_is_refused_is_named_as_it_was_typed(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "model", "text", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_what_a_variable_says_is_refused_in_the_same_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RUNNER_WRAP", "maybe")
    assert run(["generate", "model", "text"]) == 2
    assert "'--wrap': 'maybe' is neither yes nor no (set by RUNNER_WRAP)" in capsys.readouterr().err
