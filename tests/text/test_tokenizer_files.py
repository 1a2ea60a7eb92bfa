"""The files of a tokenizer come from strangers: none is read through a link that leads out of the model's directory."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from places import TESTS

from runner.errors import CheckpointError, TokenizerError
from runner.text.tokenizer import Tokenizer

DATA = TESTS / "data" / "tokenizers"
SECRET = "HF_TOKEN=hf_secret"


def linked(directory: Path, name: str, target: Path | str) -> Path:
    """Put a link to `target` in the place of the file `name` of a tokenizer's directory."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    return directory


@pytest.mark.parametrize(
    ("kind", "name"),
    [("chatml", "chat_template.jinja"), ("chatml", "additional_chat_templates/x.jinja"),
     ("chatml", "tokenizer_config.json"), ("chatml", "tokenizer.json"), ("llama", "tokenizer.model"),
     ("llama", "special_tokens_map.json"), ("llama", "added_tokens.json"), ("none", "tekken.json"),
     ("none", "vocab.json"), ("none", "merges.txt")],
)  # fmt: skip
def test_links_out_of_the_directory_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    """Each target is a file that the reader would accept, so only the link itself can be the reason."""
    directory = tmp_path / "model"
    if kind == "none":
        directory.mkdir()
        (directory / "merges.txt").write_text("")
        (directory / "vocab.json").write_text("{}")
        secret = tmp_path / "secret"
        secret.write_text("{}")
    else:
        shutil.copytree(DATA / kind, directory)
        found = directory / name
        secret = tmp_path / "secret"
        secret.write_bytes(found.read_bytes() if found.is_file() else SECRET.encode())
    with pytest.raises(CheckpointError, match=r"outside the model's directory"):
        Tokenizer.from_directory(linked(directory, name, secret))


def test_a_linked_folder_of_templates_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(DATA / "chatml", directory)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jinja").write_text(SECRET)
    with pytest.raises(CheckpointError, match=r"outside the model's directory"):
        Tokenizer.from_directory(linked(directory, "additional_chat_templates", tmp_path / "elsewhere"))


def test_a_process_file_never_becomes_a_template(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(DATA / "chatml", directory)
    with pytest.raises(CheckpointError):
        Tokenizer.from_directory(linked(directory, "chat_template.jinja", "/proc/self/environ"))


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "tokenizer.json"])
def test_pipes_and_dangling_links_are_refused_without_waiting(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "model"
    shutil.copytree(DATA / "chatml", directory)
    with pytest.raises(CheckpointError, match="does not exist"):
        Tokenizer.from_directory(linked(directory, name, "gone"))
    (directory / name).unlink()
    os.mkfifo(directory / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        Tokenizer.from_directory(directory)


@pytest.mark.parametrize("kind", ["chatml", "llama"])
def test_links_inside_the_hub_cache_are_followed(tmp_path: Path, kind: str) -> None:
    """A snapshot of the hub's cache is nothing but links into the blobs beside it."""
    repo = tmp_path / "models--org--name"
    snapshot, blobs = repo / "snapshots" / ("0" * 40), repo / "blobs"
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    blobs.mkdir()
    files = [path for path in (DATA / kind).iterdir() if path.is_file()]
    for number, path in enumerate(files):
        shutil.copy(path, blobs / f"hash{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash{number}")
    (blobs / "template").write_text("{{ messages[0].content }}")
    (snapshot / "additional_chat_templates" / "plain.jinja").symlink_to("../../../blobs/template")
    tokenizer = Tokenizer.from_directory(snapshot)
    assert "plain" in tokenizer.chat_templates
    assert tokenizer.encode("hello") == Tokenizer.from_directory(DATA / kind).encode("hello")


def test_files_that_are_no_text_are_named(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(DATA / "chatml", directory)
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja"):
        Tokenizer.from_directory(directory)
    (directory / "chat_template.jinja").unlink()
    (directory / "tokenizer_config.json").write_text(json.dumps([1]))
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json holds a list"):
        Tokenizer.from_directory(directory)
