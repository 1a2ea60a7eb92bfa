"""What a model's name stands for, the table of names, and what may be deleted."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hub_cache import cached
from places import ROOT

from runner.checkpoint import kept, names
from runner.checkpoint.removing import remove
from runner.errors import CheckpointError, HubError, UsageError, UserFileError
from runner.local_files import path_in

WEIGHTS = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"w" * 1000}
COMMIT, NEWER = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory, a cache and a current directory of the test's own."""
    from huggingface_hub import constants

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def converted(directory: Path, name: str) -> Path:
    """A directory as `convert` leaves it, noted in the table."""
    path = directory / name
    path.mkdir(parents=True)
    for file, data in WEIGHTS.items():
        (path / file).write_bytes(data)
    kept.keep(path, "convert", list(WEIGHTS))
    return path


# --- precedence -------------------------------------------------------------------------------------------------------


def test_a_path_comes_before_an_alias_before_a_stored_model_before_a_hub_id(home: Path) -> None:
    hub = cached(home / "hub", "org/Smol-1B", WEIGHTS)
    mine = converted(home, "mine")
    assert names.resolve("smol") == names.resolve("org/Smol-1B") == hub
    kept.set_alias("smol", str(mine))
    assert names.resolve("smol") == mine and names.resolve("Smol-1B") == hub
    Path("smol").mkdir()
    assert names.resolve("smol") == Path("smol")
    Path("org/Smol-1B").mkdir(parents=True)
    assert names.resolve("org/Smol-1B") == Path("org/Smol-1B")
    with pytest.raises(HubError, match="org/other@main is not in the cache"):
        names.resolve("org/other")


@pytest.mark.parametrize("typed", ["smollm2", "SmolLM2-135m", "smollm2-135M-instruct", "SMOLLM2"])
def test_the_first_words_of_a_name_in_any_case(home: Path, typed: str) -> None:
    path = cached(home / "hub", "Org/SmolLM2-135M-Instruct", WEIGHTS)
    assert names.resolve(typed) == path
    with pytest.raises(HubError, match="no model is called"):
        names.resolve("smol")


def test_a_name_of_two_models_is_refused_and_the_whole_name_is_not(home: Path) -> None:
    small, large = (converted(home, name) for name in ("Llama-1B", "Llama-1B-Instruct"))
    assert names.resolve("llama-1b") == small
    with pytest.raises(UsageError, match=f"'llama' could be {small} or {large}: write more"):
        names.resolve("llama")
    assert names.shortest(names.stored_models()) == {small: "llama-1b", large: "llama-1b-instruct"}
    twin = converted(home / "elsewhere", "Llama-1B")
    with pytest.raises(UsageError, match="could be"):
        names.resolve("Llama-1B")
    assert names.shortest(names.stored_models())[twin] == str(twin)


def test_the_shortest_name_is_never_one_of_an_alias(home: Path) -> None:
    path = converted(home, "Smol-1B-Instruct")
    kept.set_alias("smol", "org/name")
    assert names.shortest(names.stored_models()) == {path: "smol-1b"}


def test_every_shortest_name_leads_back(home: Path) -> None:
    for name in ("a-b-c", "a-b", "a_b", "A-B-C-d", "b", "a.b-c"):
        converted(home, name)
    cached(home / "hub", "org/a-b", WEIGHTS)
    stored = names.stored_models()
    for path, name in names.shortest(stored).items():
        assert names.resolve(name) == path


def test_an_older_snapshot_has_no_name_but_its_commit(home: Path) -> None:
    old = cached(home / "hub", "org/Smol", WEIGHTS)
    new = cached(home / "hub", "org/Smol", WEIGHTS, NEWER)
    stored = names.stored_models()
    assert [(one.name, one.reference) for one in stored] == [("", f"org/Smol@{COMMIT}"), ("Smol", "org/Smol")]
    assert names.resolve("smol") == new and names.resolve(names.shortest(stored)[old]) == old


def test_a_snapshot_that_no_branch_names_goes_by_its_name(home: Path) -> None:
    path = cached(home / "hub", "org/Smol", WEIGHTS)
    (path.parent.parent / "refs/main").unlink()
    assert names.resolve("smol") == path


def test_what_is_not_there_is_named_with_what_comes_near(home: Path) -> None:
    converted(home, "Llama-1B")
    Path("model.gguf").write_bytes(b"GGUF")
    Path("MyModel").mkdir()
    Path("MyModel/config.json").write_text("{}")
    for typed, words in [
        ("mymodel2", "no model is called 'mymodel2': did you mean MyModel?"),
        ("lama", "no model is called 'lama': did you mean llama?"),
        ("zzz", "no model is called 'zzz': 'runner list' shows"),
        ("modell.gguf", "modell.gguf: no such file or directory: did you mean model.gguf?"),
        (f"{home}/lama-1b", f"{home}/lama-1b: no such file or directory: did you mean {home}/Llama-1B?"),
        ("./none/at/all", "./none/at/all: no such file or directory"),
    ]:
        with pytest.raises(HubError) as caught:
            names.resolve(typed)
        assert str(caught.value).startswith(words)


def test_pull_takes_no_path(home: Path) -> None:
    path = converted(home, "mine")
    Path("dir").mkdir()
    for typed, words in [
        ("./dir", "'./dir' is a path, and it is on this machine already"),
        ("dir", "'dir' is a path, and"),
        ("./none", "'./none' is a path: 'runner pull' takes a hub id"),
        ("mine", f"'mine' stands for {path}, a path, and it is"),
    ]:
        with pytest.raises(UsageError) as caught:
            names.pull(typed)
        assert str(caught.value).startswith(words)


# --- aliases ----------------------------------------------------------------------------------------------------------


def test_an_alias_keeps_to_what_it_was_given_for(home: Path) -> None:
    path = converted(home, "Smol-1B")
    assert names.checked_target("smol") == str(path)
    assert names.checked_target("../Smol-1B") == str(path)
    assert names.checked_target("org/name@v1") == "org/name@v1"
    for wrong in ("none", "./none", "a/b/c", "org/name@.."):
        with pytest.raises(HubError):
            names.checked_target(wrong)
    kept.set_alias("x", str(path))
    for file in WEIGHTS:
        (path / file).unlink()
    path.rmdir()
    with pytest.raises(HubError, match=f"'x' stands for {path}, which is gone: .*'runner rm x'"):
        names.resolve("x")


@pytest.mark.parametrize("name", ["", "a/b", ".", "-a", "a b", "a:b", "shape", "x.gguf", "a" * 65, "é", "a\n"])
def test_names_that_cannot_be_aliases(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be an alias"):
        kept.set_alias(name, "org/name")
    assert not kept.table_path().exists()


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_is_the_users_alone_and_whole(home: Path) -> None:
    kept.set_alias("x", "org/name")
    path = home / "data/runner/names.json"
    assert kept.table_path() == path and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir() if entry.suffix == ".tmp"] == []
    assert json.loads(path.read_text()) == {"version": 1, "aliases": {"x": "org/name"}, "stored": {}, "begun": {}}


def test_an_error_leaves_the_table_as_it_was(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.set_alias("x", "org/name")
    before = kept.table_path().read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserFileError, match=r"names\.json: cannot be written: No space left"):
        kept.set_alias("y", "org/name")
    assert kept.table_path().read_bytes() == before
    assert {entry.name for entry in kept.table_path().parent.iterdir()} == {"names.json", ".names.json.lock"}


def test_models_that_are_gone_are_forgotten_and_those_of_an_absent_disk_are_not(home: Path) -> None:
    here, away = converted(home, "one"), converted(home / "disk", "two")
    snapshot = cached(home / "hub", "org/Smol", WEIGHTS)
    kept.keep(snapshot, "hub", list(WEIGHTS))
    shutil.rmtree(here)
    shutil.rmtree(home / "hub/models--org--Smol")
    (home / "disk").rename(home / "unmounted")
    assert kept.read_names().stored == {} and names.stored_models() == []
    kept.set_alias("x", "org/name")
    (home / "unmounted").rename(home / "disk")
    assert set(kept.read_names().stored) == {away} and set(json.loads(kept.table_path().read_text())["stored"]) == {
        str(away)
    }


def test_a_linked_table_stays_a_link(home: Path) -> None:
    kept.table_path().parent.mkdir(parents=True)
    kept.table_path().symlink_to(home / "dotfile.json")
    kept.set_alias("x", "org/name")
    assert kept.table_path().is_symlink() and kept.read_names().aliases == {"x": "org/name"}


def test_processes_that_write_at_once_lose_nothing(home: Path) -> None:
    code = "import sys\nfrom runner.checkpoint import kept\n"
    code += "for n in range(20): kept.set_alias(f'{sys.argv[1]}{n}', 'org/name')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    writers = [subprocess.Popen([sys.executable, "-c", code, name], env=environment) for name in "abc"]
    while any(writer.poll() is None for writer in writers):
        kept.read_names()  # never half a table
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert set(kept.read_names().aliases) == {f"{name}{n}" for name in "abc" for n in range(20)}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"version": 2}',
        '{"version": true}',
        '{"aliases": []}',
        '{"aliases": {"a/b": "x"}}',
        '{"aliases": {"a": 1}}',
        '{"stored": {"/x": {"by": "magic", "files": []}}}',
        '{"stored": {"x": {"by": "convert", "files": []}}}',
        '{"stored": {"/x/snapshots": {"by": "hub", "files": ["y"]}}}',
        '{"stored": {"/x": {"by": "convert", "files": ["../y"]}}}',
        '{"stored": {"/x": {"by": "convert", "files": ["/y"]}}}',
    ],
)
def test_a_damaged_table_is_named_and_left(home: Path, text: str) -> None:
    path = converted(home, "mine")
    kept.table_path().write_text(text)
    for action in (lambda: names.resolve("smol"), lambda: kept.set_alias("x", "org/name")):
        with pytest.raises(UserFileError, match=r"names\.json: ") as caught:
            action()
        assert "\n" not in str(caught.value)
    assert kept.table_path().read_text() == text
    assert names.resolve(str(path)) == path  # what is no name needs no table


def test_without_a_home_nothing_is_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UsageError, match="no home directory"):
        kept.set_alias("x", "org/name")
    assert list(Path().iterdir()) == []


# --- deleting ---------------------------------------------------------------------------------------------------------


def test_a_converted_model_goes_and_what_is_not_of_it_stays(home: Path) -> None:
    path, other = converted(home, "one-1"), converted(home, "two-2")
    (other / "notes.txt").write_text("mine")
    (one,), (two,) = names.removable("one"), names.removable(str(other))
    assert one.kept is not None and two.kept is not None
    assert remove(one.path, one.kept) == [] and not path.exists()
    assert remove(two.path, two.kept) == ["notes.txt"] and os.listdir(other) == ["notes.txt"]
    assert kept.read_names().stored == {}


@pytest.mark.parametrize("way", ["link", "../real", "../link/../real", "{home}/link", "{home}/here/../link"])
def test_a_model_is_the_same_whatever_way_leads_to_it(home: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """The hub's cache, GGUF files in it, directories that `convert` wrote, what an alias stands for."""
    from huggingface_hub import constants

    (home / "real").mkdir()
    (home / "link").symlink_to(home / "real")
    (home / "here/link").symlink_to(home / "real")
    around = way.format(home=home)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{around}/hub")
    hub = cached(Path(around, "hub"), "org/Smol", WEIGHTS)
    gguf = cached(Path(around, "hub"), "org/Other", {"folder/x-Q8_0.gguf": b"GGUF"}) / "folder/x-Q8_0.gguf"
    kept.keep(hub, "hub", list(WEIGHTS))
    kept.keep(gguf, "hub", [gguf.name])
    late = Path(around, f"hub/models--org--Late/snapshots/{COMMIT}")
    late.mkdir(parents=True)
    kept.try_to_begin(late, "org/Late", ["config.json"])
    kept.set_alias("mine", names.checked_target(str(converted(Path(around), "Tiny"))))
    real = {one.path: one.kept for one in names.stored_models()}
    assert all(path.is_relative_to(home / "real") for path in real) and len(real) == 3 and all(real.values())
    assert names.path_of(kept.read_names().aliases["mine"]) == home / "real/Tiny"
    for typed in ("smol", "org/Other:Q8_0", f"{around}/Tiny", "org/Late"):
        (found,) = names.removable(typed)
        assert found.kept is not None and remove(found.path, found.kept) == []
    assert os.listdir(home / "real/hub") == [] and os.listdir(home / "real") == ["hub"]
    assert json.loads(kept.table_path().read_text())["stored"] == kept.read_names().begun == {}


def test_a_model_stays_runners_where_its_disk_is_moved_behind_a_link(home: Path) -> None:
    converted(home / "disk", "mine")
    (home / "disk").rename(home / "larger")
    (home / "disk").symlink_to(home / "larger")
    (found,) = names.removable("mine")
    assert found.kept is not None and remove(found.path, found.kept) == [] and os.listdir(home / "larger") == []


def test_a_repository_that_is_a_link_is_known_by_its_name(home: Path) -> None:
    path = cached(home / "hub", "org/Smol", WEIGHTS)
    (home / "hub/models--org--Smol").rename(home / "moved")
    (home / "hub/models--org--Smol").symlink_to(home / "moved")
    kept.keep(path, "hub", list(WEIGHTS))
    assert [one.path for one in names.removable("smol")] == [path] == list(kept.read_names().stored)


def test_what_only_has_the_name_of_a_model_that_was_written_is_not_runners(home: Path) -> None:
    path, hub = converted(home, "Tiny"), cached(home / "hub", "org/Smol", WEIGHTS)
    kept.keep(hub, "hub", list(WEIGHTS))
    shutil.rmtree(path)
    shutil.rmtree(hub)
    path.mkdir()
    for file, data in WEIGHTS.items():
        (path / file).write_bytes(data + b" " if file == "config.json" else data)
        os.utime(path / file, (1e9, 1e9))
    cached(home / "hub", "org/Smol", WEIGHTS)
    for file in WEIGHTS:
        os.utime(hub / file, (1e9, 1e9), follow_symlinks=False)
    assert [(one.id, one.kept) for one in names.stored_models()] == [("org/Smol", None)]
    for typed, words in ((str(path), "was not stored by runner"), ("smol", "by another program")):
        with pytest.raises(UsageError, match=words):
            names.removable(typed)


def test_a_file_that_was_changed_since_stays(home: Path) -> None:
    path = converted(home, "Tiny")
    (path / "config.json").write_text('{"mine": 1}')
    (found,) = names.removable("tiny")
    assert found.kept is not None and remove(path, found.kept) == ["config.json"] == os.listdir(path)


def test_a_model_that_was_copied_to_another_disk_is_runners(home: Path) -> None:
    path = converted(home, "Tiny")
    shutil.copytree(path, home / "copy")
    shutil.rmtree(path)
    (home / "copy").rename(path)
    (found,) = names.removable("tiny")
    assert found.kept is not None and remove(path, found.kept) == [] and not path.exists()


def test_a_link_in_place_of_a_model_is_not_followed(home: Path) -> None:
    path = converted(home, "mine")
    path.rename(home / "moved")
    path.symlink_to(home / "moved")
    with pytest.raises(UserFileError, match="a link"):
        remove(path, kept.read_names().stored[path])
    assert set(os.listdir(home / "moved")) == set(WEIGHTS)


def test_a_fetched_model_goes_with_its_blobs_but_for_shared_ones(home: Path) -> None:
    old = cached(home / "hub", "org/Smol", WEIGHTS)
    new = cached(home / "hub", "org/Smol", WEIGHTS | {"model.safetensors": b"v2" * 400}, NEWER)
    for path in (old, new):
        kept.keep(path, "hub", list(WEIGHTS))
    (first,) = names.removable(f"org/Smol@{COMMIT}")
    assert first.path == old and first.kept is not None and remove(old, first.kept) == []
    assert not old.exists() and all((new / file).is_file() for file in WEIGHTS)
    assert len(os.listdir(home / "hub/models--org--Smol/blobs")) == 3 - 1  # both JSON files are one blob
    (second,) = names.removable("smol")
    assert second.kept is not None and remove(new, second.kept) == []
    assert os.listdir(home / "hub") == []


def test_what_a_stopped_download_left_can_be_deleted(home: Path) -> None:
    blobs = home / "hub/models--org--Large/blobs"
    blobs.mkdir(parents=True)
    for name in ("aa.runner.incomplete", "bb.runner.incomplete", "cc.0123.incomplete", "dd"):
        (blobs / name).write_bytes(b"x" * 10)
    (found,) = names.removable("org/Large")
    assert (found.id, found.nbytes) == ("what was begun of org/Large", 20) and found.kept is not None
    assert remove(found.path, found.kept) == [] and set(os.listdir(blobs)) == {"cc.0123.incomplete", "dd"}
    with pytest.raises(HubError, match="'org/Large' is not on this machine"):
        names.removable("org/Large")


def test_what_another_program_stored_is_left(home: Path) -> None:
    cached(home / "hub", "org/Smol", WEIGHTS)
    Path("dir").mkdir()
    for typed, words in [("smol", "org/Smol was stored in .* by another program"), ("dir", "was not stored by runner")]:
        with pytest.raises(UsageError, match=words):
            names.removable(typed)
    with pytest.raises(HubError, match="'org/other' is not on this machine"):
        names.removable("org/other")


# --- GGUF files of the hub --------------------------------------------------------------------------------------------


def test_a_gguf_file_goes_by_its_repository_and_its_quantization(home: Path) -> None:
    files = {"Smol-1B-Q4_K_M.gguf": b"GGUF", "Smol-1B-Q8_0.gguf": b"GGUF 8", "BF16/x-BF16.gguf": b"GGUF 16"}
    snapshot = cached(home / "hub", "org/Smol-1B-GGUF", files)
    short = {path.name: name for path, name in names.shortest(names.stored_models()).items()}
    assert short == {"Smol-1B-Q4_K_M.gguf": "smol:q4_k_m", "Smol-1B-Q8_0.gguf": "smol:q8_0", "x-BF16.gguf": "smol:bf16"}
    assert names.resolve("smol:Q8_0") == names.resolve("Smol-1B:q8_0") == snapshot / "Smol-1B-Q8_0.gguf"
    assert names.resolve("smol-1b-gguf:bf16") == snapshot / "BF16/x-BF16.gguf"
    with pytest.raises(UsageError, match=r"'smol' could be org/Smol-1B-GGUF:BF16, .*:Q4_K_M or .*:Q8_0"):
        names.resolve("smol")
    with pytest.raises(HubError, match="no model is called"):
        names.resolve("smol:Q5_0")
    for file, one in (("BF16/x-BF16.gguf", "smol:bf16"), ("Smol-1B-Q8_0.gguf", "org/Smol-1B-GGUF:smol-1b-q8_0.gguf")):
        kept.keep(snapshot / file, "hub", [file.rpartition("/")[2]])
        (found,) = names.removable(one)
        assert found.path == snapshot / file and found.kept is not None
        assert remove(found.path, found.kept) == ["Smol-1B-Q4_K_M.gguf"] + ["Smol-1B-Q8_0.gguf"] * ("bf" in one)
    assert names.resolve("smol") == snapshot / "Smol-1B-Q4_K_M.gguf" and not (snapshot / "BF16").exists()


def test_a_model_of_shards_in_a_snapshots_folder_may_link_to_its_blobs(home: Path) -> None:
    files = {"Q8/x-00001-of-00002.gguf": b"GGUF 1", "Q8/x-00002-of-00002.gguf": b"GGUF 2"}
    snapshot = cached(home / "hub", "org/Smol", files)
    assert path_in(snapshot / "Q8", "x-00002-of-00002.gguf").read_bytes() == b"GGUF 2"
    (snapshot / "Q8/evil.gguf").symlink_to(home / "elsewhere")
    (home / "elsewhere").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="outside the model's directory"):
        path_in(snapshot / "Q8", "evil.gguf")
