"""Chat templates are found in every file that one is published in, in the order of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from places import TESTS

from runner.errors import CheckpointError, RunnerError, TokenizerError
from runner.text.template_files import bounded_template, read_templates
from runner.text.template_limits import MAX_SOURCE
from runner.text.tokenizer import Tokenizer

DATA = TESTS / "data" / "tokenizers"
NAMED = [{"name": "default", "template": "{{ 1 }}"}, {"name": "rag", "template": "{{ 2 }}"}]
SOURCES = {"default": "{{ 1 }}", "rag": "{{ 2 }}"}


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
@pytest.mark.parametrize(
    ("value", "expected"), [("{{ 1 }}", {"default": "{{ 1 }}"}), (NAMED, SOURCES), (SOURCES, SOURCES)]
)
def test_a_template_in_one_file_alone_is_found(tmp_path: Path, name: str, value: Any, expected: Any) -> None:
    put(tmp_path / name, {"chat_template": value, "processor_class": "X"})
    assert read_templates(tmp_path, {}) == expected


def test_the_first_place_with_a_template_wins(tmp_path: Path) -> None:
    """Taken away one by one, from the first to the last."""
    put(tmp_path / "additional_chat_templates" / "rag.jinja", "R")
    put(tmp_path / "chat_template.jinja", "J")
    put(tmp_path / "processor_config.json", {"chat_template": "P"})
    put(tmp_path / "chat_template.json", {"chat_template": "O"})
    assert read_templates(tmp_path, {"chat_template": "C"}) == {"default": "J", "rag": "R"}
    (tmp_path / "chat_template.jinja").unlink()
    assert read_templates(tmp_path, {"chat_template": "C"}) == {"rag": "R"}
    (tmp_path / "additional_chat_templates" / "rag.jinja").unlink()
    assert read_templates(tmp_path, {"chat_template": "C"}) == {"default": "C"}
    assert read_templates(tmp_path, {"chat_template": None}) == {"default": "P"}
    put(tmp_path / "processor_config.json", {"image_seq_len": 4})
    assert read_templates(tmp_path, {}) == {"default": "O"}
    (tmp_path / "chat_template.json").unlink()
    assert read_templates(tmp_path, {}) == {}


def test_blank_templates_are_none(tmp_path: Path) -> None:
    """A blank template would render every chat as nothing."""
    put(tmp_path / "chat_template.jinja", " \n")
    put(tmp_path / "processor_config.json", {"chat_template": ""})
    put(tmp_path / "chat_template.json", {"chat_template": "{{ 1 }}"})
    assert read_templates(tmp_path, {"chat_template": ""}) == {"default": "{{ 1 }}"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.json", {}, r'chat_template\.json has no key "chat_template"'),
        ("chat_template.json", {"chat_template": 7}, r"chat_template\.json: chat_template must be text"),
        ("chat_template.json", "{", "not valid JSON"),
        ("chat_template.json", "[]", "expected a JSON object"),
        ("processor_config.json", {"chat_template": [{"name": "x"}]}, r"processor_config\.json: chat_template must"),
        ("chat_template.json", {"chat_template": "x" * (MAX_SOURCE + 1)}, "any chat template"),
        ("chat_template.jinja", "x" * (MAX_SOURCE + 1), "any chat template"),
        ("chat_template.jinja", "x" * (4 * MAX_SOURCE + 1), "chat_template.jinja"),
        ("chat_template.json", {"chat_template": dict.fromkeys(map(str, range(101)), "x")}, "101 templates"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, content: Any, message: str) -> None:
    put(tmp_path / name, content)
    with pytest.raises(RunnerError, match=message):
        read_templates(tmp_path, {})


def test_too_many_files_are_refused(tmp_path: Path) -> None:
    for index in range(101):
        put(tmp_path / "additional_chat_templates" / f"{index}.jinja", "x")
    with pytest.raises(TokenizerError, match="101 templates"):
        read_templates(tmp_path, {})


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_links_out_of_the_directory_are_refused(tmp_path: Path, name: str) -> None:
    put(tmp_path / "secret", {"chat_template": "secret"})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside"):
        read_templates(tmp_path / "model", {})


def test_a_tokenizer_reads_them(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(DATA / "chatml", directory)
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    put(directory / "tokenizer_config.json", {**config, "chat_template": None})
    assert not Tokenizer.from_directory(directory).has_chat_template
    put(directory / "chat_template.json", {"chat_template": "{{ bos_token }}{{ messages[0].content }}"})
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<|bos|>hi"


def test_the_longest_template_by_hand() -> None:
    assert len(bounded_template("x" * MAX_SOURCE, "here")) == MAX_SOURCE
    with pytest.raises(TokenizerError, match=f"^here has {MAX_SOURCE + 1} characters"):
        bounded_template("x" * (MAX_SOURCE + 1), "here")
