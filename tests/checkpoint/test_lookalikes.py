"""Files that are not what their names say: placeholders of copies, other formats, text; and files cut while read."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import mlx.core as mx
import pytest
import safetensors
from model_dirs import model_dir, refusal, tensor_file
from places import TESTS

import runner
from runner.checkpoint.directory import Checkpoint
from runner.checkpoint.model_files import open_files
from runner.checkpoint.safetensors_header import judge
from runner.convert.convert import convert
from runner.errors import CheckpointError, RunnerError

LLAMA = TESTS / "fixtures" / "llama" / "llama-gqa"
HASH = "0123456789abcdef" * 4


def archive() -> bytes:
    """A zip as torch.save writes it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("model/data.pkl", pickle.dumps({}))
    return file.getvalue()


PLACEHOLDERS: dict[str, tuple[bytes, str]] = {
    "link to a blob": (f"../../blobs/{HASH}".encode(), "symbolic link"),
    "link with a line end": (f"../../blobs/{HASH}\r\n".encode(), "symbolic link"),
    "link of Windows": (f"..\\..\\blobs\\{HASH}".encode(), "symbolic link"),
    "absolute link": (f"/home/me/hub/models--a--b/blobs/{HASH[:40]}".encode(), "symbolic link"),
    "link beside it": (b"./weights.safetensors", "symbolic link"),
    "git-lfs": (f"version https://git-lfs.github.com/spec/v1\noid sha256:{HASH}\nsize 9\n".encode(), "git lfs pull"),
    "git-annex": (f"/annex/objects/SHA256E-s9--{HASH}.safetensors\n".encode(), "git annex get"),
    "locked git-annex": (f"../.git/annex/objects/a/b/SHA256E-s9--{HASH}".encode(), "git annex get"),
    "xet": (f"# xet version 0\nfilesize = 9\nhash = '{HASH}'\n".encode(), "Xet pointer"),
}


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", PLACEHOLDERS)
def test_placeholders_of_every_file_are_named_with_the_fix(kind: str, file: str, tmp_path: Path) -> None:
    content, expected = PLACEHOLDERS[kind]
    shutil.copytree(LLAMA, tmp_path / "m")
    (tmp_path / "m" / file).write_bytes(content)
    with pytest.raises(RunnerError) as caught:
        runner.load(tmp_path / "m")
    message = str(caught.value)
    assert expected in message and file in message and "\n" not in message


def test_a_shard_that_is_a_placeholder(tmp_path: Path) -> None:
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    files = {"one.safetensors": tensor_file(["a"]), "two.safetensors": f"../../blobs/{HASH}".encode()}
    message = refusal(model_dir(tmp_path, files | {"model.safetensors.index.json": {"weight_map": weight_map}}))
    assert "two.safetensors" in message and f"'../../blobs/{HASH}'" in message and "cp -L" in message


def test_a_locked_file_of_git_annex_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(f".git/annex/objects/xx/SHA256E-s9--{HASH}")
    assert "git annex get" in refusal(tmp_path)


FOREIGN: dict[str, tuple[bytes, str]] = {
    "zip": (archive(), "zip archive"),
    "pickle": (pickle.dumps({"a": [1, 2]}, protocol=2), "a pickle"),
    "newer pickle": (pickle.dumps({"a": [1, 2]}, protocol=5), "a pickle"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(100), ".gguf"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + bytes(50), "gzip"),
    "web page": (b"<!DOCTYPE html>\n<html><head></head></html>", "web page"),
    "web page after lines": (b"\n\n  <HTML><body>Not found</body></HTML>", "web page"),
    "error in JSON": (b'{"error":"Repository not found"}', 'holds text, \'{"error":'),
    "error in words": (b"Entry not found", "holds text, 'Entry not found'"),
    "long text": (b"word " * 1000, "holds text"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_formats_under_a_safetensors_name(kind: str, tmp_path: Path) -> None:
    content, expected = FOREIGN[kind]
    message = refusal(model_dir(tmp_path, {"model.safetensors": content}))
    assert expected in message and "model.safetensors" in message and len(message) < 400 + len(str(tmp_path))


def test_every_length_of_a_cut_file_is_refused(tmp_path: Path) -> None:
    data = tensor_file(["a", "b"], 7)
    for size in range(len(data)):
        message = refusal(model_dir(tmp_path, {"model.safetensors": data[:size]}))
        assert "model.safetensors" in message


def test_a_panic_of_the_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As pyo3 raises it."""

    def panics(*args: object, **named: object) -> None:
        raise PanicException("range end index 9 out of range")

    monkeypatch.setattr(safetensors, "safe_open", panics)
    path = model_dir(tmp_path, {"model.safetensors": tensor_file(["a"])}) / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a valid safetensors file: range end index"):
        judge(path)


@pytest.mark.parametrize("job", ["load", "convert"])
def test_a_file_cut_while_it_is_read(job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    shutil.copytree(LLAMA, path)
    read = Checkpoint.read

    def cutting(self: Checkpoint, name: str) -> mx.array:
        array = read(self, name)  # checked, and not yet read
        os.truncate(path / "model.safetensors", 100)
        return array

    monkeypatch.setattr(Checkpoint, "read", cutting)
    with pytest.raises(CheckpointError, match=r"tensor '.*weight'.*cut short"):
        if job == "load":
            runner.load(path)
        else:
            convert(open_files(path), tmp_path / "out", dtype="float16")
