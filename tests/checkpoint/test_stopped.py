"""What stopped downloads leave: whose it is, and that `runner rm` deletes all of it and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, environment_of, fake_hub
from places import ROOT

from runner.checkpoint import kept, names
from runner.checkpoint.removing import remove
from runner.errors import HubError

SMALL = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{ }"}
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
INDEX = {"model.safetensors.index.json": json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}).encode()}
SHARDED = {**SMALL, **INDEX, **{name: name.encode() * 50 for name in SHARDS}}
QUANTIZED = {"m-Q4_K_M.gguf": b"GGUF 4" * 200, "folder/m-Q8_0.gguf": b"GGUF 8" * 200}


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    with fake_hub() as state:
        yield state


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache that `pull` fetches into, for this process too."""
    from huggingface_hub import constants

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf/hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hf/hub"


def pull(fake: FakeHub, tmp_path: Path, model: str) -> int:
    environment = environment_of(tmp_path, fake.endpoint) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"from runner.checkpoint import hub\nhub.pull({model!r}, progress=False)"]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=60).returncode


def removed(model: str) -> list[str]:
    """Delete what a name means; what that was."""
    found = names.removable(model)
    for each in found:
        assert each.kept is not None and each.nbytes > 0 and remove(each.path, each.kept) == []
    return [each.id for each in found]


def left(cache: Path) -> list[str]:
    """The repositories in the cache."""
    return sorted(name for name in os.listdir(cache) if name.startswith("models--"))


@pytest.mark.parametrize("failing", [*SHARDS, "tokenizer.json"])
def test_all_that_has_come_is_deleted(fake: FakeHub, tmp_path: Path, cache: Path, failing: str) -> None:
    """Small files with links, and blobs that are whole but have none yet."""
    fake.add("org/name", SHARDED)
    fake.failing = failing
    assert pull(fake, tmp_path, "org/name") == 1 and names.stored_models() == []
    assert removed("org/name") == ["what was begun of org/name"]
    assert left(cache) == [] and kept.read_names().begun == {}
    with pytest.raises(HubError, match="'org/name' is not on this machine"):
        names.removable("org/name")


def test_what_is_fetched_at_last_is_begun_no_more(fake: FakeHub, tmp_path: Path, cache: Path) -> None:
    fake.add("org/name", SHARDED)
    fake.failing = SHARDS[1]
    assert pull(fake, tmp_path, "org/name") == 1 and len(kept.read_names().begun) == 1
    fake.failing = None
    assert pull(fake, tmp_path, "org/name") == 0 and kept.read_names().begun == {}
    assert removed("org/name") == ["org/name"] and left(cache) == []


def test_an_older_version_that_is_whole_is_not_what_was_begun(fake: FakeHub, tmp_path: Path, cache: Path) -> None:
    fake.add("org/name", SHARDED)
    assert pull(fake, tmp_path, "org/name") == 0
    fake.add("org/name", SHARDED | {SHARDS[1]: b"newer" * 200}, "b" * 40)
    fake.failing = SHARDS[1]
    assert pull(fake, tmp_path, "org/name") == 1
    assert removed("org/name") == ["org/name"]
    assert removed(f"org/name@{'b' * 40}") == ["what was begun of org/name"] and left(cache) == []


def test_one_quantization_is_not_what_was_begun_of_another(fake: FakeHub, tmp_path: Path, cache: Path) -> None:
    fake.add("org/m", QUANTIZED)
    fake.failing = "folder/m-Q8_0.gguf"
    assert pull(fake, tmp_path, "org/m:Q8_0") == 1
    (partial,) = cache.rglob("*.incomplete")
    partial.write_bytes(b"GGUF 8")
    for other in ("org/m:Q4_K_M", "org/m:m-Q4_K_M.gguf", "org/m@v1"):
        with pytest.raises(HubError, match="is not on this machine"):
            names.removable(other)
    assert pull(fake, tmp_path, "org/m:Q4_K_M") == 0
    assert removed("org/m:Q4_K_M") == ["org/m:Q4_K_M"] and partial.exists()
    for same in ("org/m:q8_0", "org/m:folder/m-Q8_0.gguf", "org/m"):
        assert [one.id for one in names.removable(same)] == ["what was begun of org/m:Q8_0"]
    assert removed("org/m:q8_0") == ["what was begun of org/m:Q8_0"] and left(cache) == []


def test_what_another_process_downloads_is_left(fake: FakeHub, tmp_path: Path, cache: Path) -> None:
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    fake.add("org/name", SHARDED)
    fake.failing = SHARDS[1]
    assert pull(fake, tmp_path, "org/name") == 1
    before = sorted(cache.rglob("*"))
    (found,) = names.removable("org/name")
    assert found.kept is not None
    lock = cache / ".locks/models--org--name" / f"{found.kept.blobs[1]}.lock"
    with WeakFileLock(str(lock)), pytest.raises(HubError, match="org/name is being downloaded by another process"):
        remove(found.path, found.kept)
    assert sorted(cache.rglob("*")) == before
    assert removed("org/name") and left(cache) == []


def test_what_another_program_fetched_before_is_not_what_was_begun(fake: FakeHub, tmp_path: Path, cache: Path) -> None:
    from hub_cache import cached

    fake.add("org/name", SHARDED)
    theirs = cached(cache, "org/name", {"config.json": SMALL["config.json"]})
    fake.failing = SHARDS[1]
    assert pull(fake, tmp_path, "org/name") == 1
    assert removed("org/name") and os.listdir(theirs) == ["config.json"]
