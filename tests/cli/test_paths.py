"""Paths that users type, and what cannot be written to them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import run

from runner.cli.constraint_options import _text
from runner.cli.conversation import Conversation, path_of
from runner.errors import UsageError


def test_a_user_that_there_is_not_and_a_name_that_no_file_has() -> None:
    assert path_of("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    assert path_of("~/x") == Path.home() / "x"
    with pytest.raises(UsageError, match="no file can be called"):
        path_of("a\0b")


def test_half_a_character_leaves_nothing_behind(tmp_path: Path) -> None:
    chat = Conversation()
    chat.replace([{"role": "user", "content": "\ud800"}])
    with pytest.raises(UsageError, match="half of a character"):
        chat.save(str(tmp_path / "chat.json"))
    assert not list(tmp_path.iterdir())


def test_a_pipe_is_no_file_of_a_grammar(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (str(tmp_path / "pipe"), "~nobody-of-this-name/x"):
        with pytest.raises(UsageError, match=r"no regular file|no file that can be read"):
            _text("--grammar", name, ":")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--plot", "x.png"), "--plot is for a model that is measured here"),
        (("-p", "7"), "-p is for a model"),
        (("-p", "512"), "-p is for a model"),  # what is measured where nothing is said
        (("--dtype", "float32"), "--dtype is for a model"),
        (("a", "-m", "b"), "two models are named"),
        (("--goodput", "ttft:nan"), "--goodput takes"),
        (("--goodput", "ttft:-5"), "--goodput takes"),
    ],
)
def test_a_server_is_not_measured_by_what_it_does_not_hear_of(options: tuple[str, ...], words: str) -> None:
    done = run("bench", "--url", "http://127.0.0.1:9", *options)
    assert done.returncode == 2 and words in done.stderr
