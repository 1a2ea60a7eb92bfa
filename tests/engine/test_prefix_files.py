"""Kept prefixes on disk: found again by who computes the same, by nobody else, and never in part."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from engine_requests import KINDS as MODELS
from engine_requests import idle, ids, naive, opened, prompts
from places import ROOT, TESTS
from toy_memories import KINDS, feed, fresh, shown

import runner
from runner.cache.caches import Caches
from runner.checkpoint.shard_writer import bytes_of
from runner.engine.background import Background
from runner.engine.engine import Engine
from runner.engine.loaded import open_loaded
from runner.engine.prefix_files import PrefixFiles, _copied, fingerprint
from runner.engine.prefixes import Prefixes
from runner.errors import UsageError
from runner.ops.device import current

FIRST = list(range(1, 41))
SAME = "a" * 64


def opened_at(directory: Path, kind: str = "rows", limit: int = 1 << 30, model: str = SAME) -> Prefixes:
    new = functools.partial(Caches.of, KINDS[kind], current().ops.storage)
    return Prefixes(new, 1 << 30, PrefixFiles(directory, limit, model, new()))


def told(prefixes: Prefixes, talk: list[int], kind: str = "rows") -> int:
    """Read a prompt with pauses, give it back, and return how much of it was there."""
    kept = prefixes.take(talk)
    for start, end in zip([kept.reused, *sorted(kept.places)], [*sorted(kept.places), len(talk)], strict=True):
        feed(kept.caches, KINDS[kind], talk[start:end])
        if end in kept.places:
            prefixes.mark(kept)
    assert shown(kept.caches, KINDS[kind]) == fresh(KINDS[kind], talk)
    prefixes.give(kept, talk)
    return kept.reused


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
def test_another_process_finds_them(kind: str, tmp_path: Path) -> None:
    first = opened_at(tmp_path / "kept", kind)
    for talk in ([*FIRST, 50, 51], [*FIRST[:20], 60, 61], [7, 8, 9]):
        told(first, talk, kind)
    first.flush()
    again = opened_at(tmp_path / "kept", kind)
    assert again.stats.nbytes == 0
    assert told(again, [*FIRST, 50, 51, 52], kind) in (41, 42)  # the second talk took its caches, but for the mark
    assert told(again, [*FIRST[:20], 60, 61, 62], kind) >= 20
    assert again.stats.restored >= 41 and told(again, [7, 8, 9, 10], kind) == 3


def test_modes_keep_others_out(tmp_path: Path) -> None:
    directory = tmp_path / "kept"
    prefixes = opened_at(directory)
    told(prefixes, FIRST)
    prefixes.flush()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}
    directory.chmod(0o770)
    with pytest.raises(UsageError, match="nobody else may write"):
        opened_at(directory)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot hold kept prefixes"):
        opened_at(tmp_path / "file")


def test_what_memory_has_no_room_for_goes_to_disk_and_comes_back(tmp_path: Path) -> None:
    prefixes = opened_at(tmp_path / "kept")
    talks = [[index, *range(20, 400)] for index in range(1, 7)]
    for talk in talks:
        told(prefixes, talk)
        prefixes.budget = 150_000  # two of them
    written(prefixes)
    assert prefixes.stats.nbytes <= 150_000 and len(files(tmp_path / "kept")) >= 4
    assert [told(prefixes, [*talk, 5]) for talk in talks] == [381] * 6
    assert prefixes.stats.evicted == 0


def test_the_limit_holds_and_the_oldest_go_first(tmp_path: Path) -> None:
    directory = tmp_path / "kept"
    talks = [[index, *range(20, 400)] for index in range(1, 7)]
    for number, talk in enumerate(talks):
        prefixes = opened_at(directory, limit=180_000, model="ab"[number % 2] * 64)  # of two models in turns
        told(prefixes, talk)
        prefixes.flush()
        assert sum(path.stat().st_size for path in directory.iterdir()) <= 180_000
    assert len(files(directory)) == 3
    assert told(opened_at(directory, model="b" * 64), [*talks[5], 1]) == 381
    assert told(opened_at(directory, model="b" * 64), [*talks[1], 1]) == 0
    small = opened_at(directory, limit=1000)
    told(small, talks[0])
    small.flush()
    assert small.stats.note is None and len(files(directory)) == 3  # it fits in no way: nothing goes for it


def test_another_model_finds_nothing_and_leaves_it_there(tmp_path: Path) -> None:
    prefixes = opened_at(tmp_path / "kept")
    told(prefixes, FIRST)
    prefixes.flush()
    assert told(opened_at(tmp_path / "kept", model="a" * 16 + "b" * 48), FIRST) == 0  # a name alike is not enough
    assert told(opened_at(tmp_path / "kept", model="b" * 64), FIRST) == 0


BREAKS: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: os.truncate(path, 0),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.open("ab").write(b"x"),
    "a bit": lambda path: _flip(path, path.stat().st_size // 2),
    "its last bit": lambda path: _flip(path, path.stat().st_size - 1),
    "its header": lambda path: _flip(path, 30),
    "a large header": lambda path: _write(path, 0, struct.pack("<Q", 1 << 60)),
    "a pickle": lambda path: path.write_bytes(b"\x80\x04\x95" + b"x" * 100),
    "a link": lambda path: (path.rename(path.with_suffix(".moved")), path.symlink_to(path.with_suffix(".moved"))),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "another's place": lambda path: path.rename(path.with_name(path.name[:20] + "0" * 4 + path.name[24:])),
    "another key": lambda path: _change(path, key='["b"]'),
    "no key": lambda path: _change(path, key="[" * 5000),
    "another beginning": lambda path: _change(path, first="-1"),
    "no checksum": lambda path: _change(path, sha256=""),
}


def said(path: Path) -> dict[str, str]:
    """The metadata of a file."""
    loaded = mx.load(str(path), return_metadata=True)
    assert isinstance(loaded, tuple)
    return {str(name): str(value) for name, value in loaded[1].items()}


def _flip(path: Path, at: int) -> None:
    _write(path, at, bytes([path.read_bytes()[at] ^ 1]))


def _write(path: Path, at: int, what: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(what)


def _change(path: Path, **said: str) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] |= said
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["rows", "hybrid"])
def test_a_truncated_or_broken_file_is_not_used(how: str, when: str, kind: str, tmp_path: Path) -> None:
    """Broken before the directory is opened, or between that and its use; what follows on it alone goes, too."""
    directory = tmp_path / "kept"
    prefixes = opened_at(directory, kind)
    told(prefixes, FIRST, kind)
    told(prefixes, [*FIRST, 50, 51], kind)
    told(prefixes, [*FIRST, 60, 61], kind)
    prefixes.flush()
    (parent,) = [path for path in files(directory) if said(path)["first"] == "0"]
    others = [path for path in files(directory) if path != parent]
    assert others
    if when == "before":
        BREAKS[how](parent)
    again = opened_at(directory, kind)
    if when == "after":
        BREAKS[how](parent)
    assert told(again, [*FIRST, 50, 51, 52], kind) < 39
    assert not any(path.exists() for path in others)
    assert told(again, [*FIRST, 50, 51, 52, 53], kind) == 43
    again.flush()
    assert told(opened_at(directory, kind), [*FIRST, 50, 51, 52, 53, 54], kind) == 44 or how == "a directory"


def written(prefixes: Prefixes) -> None:
    """Wait for the thread that writes."""
    assert prefixes._disk is not None
    prefixes._disk._files.finish()


def test_nobody_waits_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But who wants what is being written, and who would have more waiting than there may be."""
    directory, go, real = tmp_path / "kept", threading.Event(), os.fsync
    monkeypatch.setattr("runner.engine.prefix_files.os.fsync", lambda handle: (go.wait(30), real(handle)))
    prefixes = opened_at(directory)
    told(prefixes, FIRST)
    prefixes.evict(1 << 40)
    assert prefixes.stats.nbytes == 0 and not files(directory)  # let go of, and not yet on disk
    threading.Timer(0.2, go.set).start()
    assert told(prefixes, [*FIRST, 50]) == 40 and prefixes.stats.restored == 40
    assert len(files(directory)) == 1


def test_jobs_in_the_background_keep_their_order_and_their_bound() -> None:
    background, go, done = Background(100), threading.Event(), list[int]()
    background.put(60, lambda: (go.wait(30), done.append(0)))
    background.put(40, lambda: done.append(1))
    threading.Timer(0.2, go.set).start()
    assert not done
    background.put(10, lambda: done.append(2))  # waits for the first
    assert done[:1] == [0]
    background.put(1000, lambda: done.append(3))  # larger than all that may wait: when nothing does
    background.wait()
    assert done == [0, 1, 2, 3]
    background.put(0, lambda: done.append(4))  # by another thread
    background.wait()
    assert done[-1] == 4


def test_a_full_disk_turns_writing_off_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "kept"
    prefixes = opened_at(directory)
    told(prefixes, FIRST)
    prefixes.flush()
    before = files(directory)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("runner.engine.prefix_files.os.fsync", full)
    prefixes = opened_at(directory)
    assert told(prefixes, [*FIRST, 50]) == 40
    told(prefixes, [*FIRST[:10], 60])
    prefixes.evict(1 << 40)
    written(prefixes)
    note = prefixes.stats.note
    assert note is not None and "No space left" in note and caplog.messages == [note]
    assert files(directory) == before and not list(directory.glob(".*.tmp"))
    monkeypatch.undo()
    assert told(prefixes, [*FIRST, 50]) == 40  # what is there is still read
    prefixes.flush()
    assert files(directory) == before  # and no more is written


DIES = """
import os, sys
from pathlib import Path
import mlx.core as mx
from runner.cache.caches import Caches
from runner.config.memory import Rows
from runner.engine.prefix_files import PrefixFiles
caches = Caches.of([(Rows(1, 4, 4),)])
caches[0].append(mx.ones((1, 1, 3, 4)), mx.ones((1, 1, 3, 4)))
Path.replace = lambda *_: os._exit(9)  # after the bytes, before they have their name
files = PrefixFiles(Path(sys.argv[1]), 1 << 30, "a" * 64, caches)
files.write((), [1, 2, 3], caches.rows(0, 3), None)
files.finish()
"""


def test_a_crash_in_the_middle_leaves_no_part(tmp_path: Path) -> None:
    directory = tmp_path / "kept"
    died = subprocess.run([sys.executable, "-c", DIES, directory], cwd=ROOT, check=False)
    assert died.returncode == 9 and len(list(directory.glob(".*.tmp"))) == 1 and not files(directory)
    again = opened_at(directory)
    assert not list(directory.glob(".*.tmp")) and told(again, [1, 2, 3]) == 0


def test_the_fingerprint_is_of_all_that_the_numbers_depend_on() -> None:
    path = MODELS["rows"]
    models = [open_loaded(path, dtype="float32"), open_loaded(path, dtype="float32"), open_loaded(path)]
    if models[-1].dtype != mx.bfloat16:
        models.append(open_loaded(path, dtype="bfloat16"))
    models.append(open_loaded(MODELS["window"], dtype="float32"))
    if models[0].device.int8 is not None:
        models.append(open_loaded(path, dtype="float32", activations="int8"))
    one, same, *others = [fingerprint(model) for model in models]
    assert one == same and len({one, *others}) == len(models) - 1
    weight = next(array for name, array in _arrays(models[1]) if name.endswith("weight"))
    weight[..., -1] += 0.01
    assert fingerprint(models[1]) != one


@pytest.mark.parametrize(("adapter", "changed"), [("llama-qv", "lora_alpha"), ("llama-dora", "magnitude")])
def test_the_fingerprint_is_of_what_adapters_compute_too(adapter: str, changed: str, tmp_path: Path) -> None:
    """Of a factor that is one number, and of what is computed from magnitudes when a layer is made."""
    folder = tmp_path / "adapter"
    shutil.copytree(TESTS / "fixtures" / "adapters" / adapter / "adapter", folder)

    def taken() -> str:
        with runner.load(MODELS["rows"], adapters=[folder]) as lm:
            return lm.engine.run(lambda: fingerprint(lm.engine))

    before = taken()
    assert taken() == before
    if changed == "lora_alpha":
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 64}))
    else:
        weights: Any = mx.load(str(folder / "adapter_model.safetensors"))
        weights = {name: array * (2 if changed in name else 1) for name, array in weights.items()}
        mx.eval(weights)
        (folder / "adapter_model.safetensors").unlink()
        mx.save_safetensors(str(folder / "adapter_model.safetensors"), weights)
    assert taken() != before


def _arrays(model: object) -> list[tuple[str, mx.array]]:
    from runner.weights import loading

    return list(loading.arrays(model.model))  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["rows", "window", "delta rule", "Mamba", "latent", "shared"])
def test_an_engine_after_another_goes_on_where_that_one_ended(kind: str, tmp_path: Path) -> None:
    loaded = opened(kind)
    (prompt,) = prompts(loaded, (45,))
    with Engine(loaded, cache_dir=tmp_path / "kept") as engine:
        answer = ids(engine.submit(prompt, max_tokens=5))
        running = engine.submit([*prompt[:20], 5, 6], max_tokens=30)  # ends with the engine
        next(iter(running))
    follow = [*prompt, *answer, 7, 8]
    with Engine(loaded, cache_dir=tmp_path / "kept") as engine:
        ticket = engine.submit(follow, max_tokens=5)
        assert ids(ticket) == naive(loaded, follow, 5) and ticket.reused >= len(prompt) - 1
        idle(engine)
        assert engine.status().prefixes.restored >= len(prompt) - 1 and engine.status().prefixes.note is None


def test_a_directory_that_cannot_be_used_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UsageError, match="nobody else"):
        Engine(opened("rows"), cache_dir=tmp_path / "open")
    for wrong in (0, -1, 2.5):
        with pytest.raises(UsageError, match="cache_size"):
            Engine(opened("rows"), cache_dir=tmp_path / "kept", cache_size=wrong)  # type: ignore[arg-type]


def test_a_forked_child_that_closes_an_engine_ends(tmp_path: Path) -> None:
    """Nothing can be computed there, nothing is written: it would wait for threads that it does not have."""
    script = (
        "import os, signal, sys, pathlib, runner\n"
        "engine = runner.Engine(runner.load(sys.argv[1]), cache_dir=sys.argv[2])\n"
        "list(engine.submit([1, 2, 3], max_tokens=2))\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(20)\n"
        "    engine.close()\n"
        "    os._exit(3)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3\n"
        "assert not list(pathlib.Path(sys.argv[2]).glob('*.safetensors'))\n"
        "engine.close()\n"
        "assert list(pathlib.Path(sys.argv[2]).glob('*.safetensors'))\n"
    )
    subprocess.run([sys.executable, "-c", script, MODELS["rows"], tmp_path / "kept"], cwd=ROOT, check=True)


def test_what_is_written_is_a_copy() -> None:
    """An array that the host has read may lie elsewhere on a GPU, whose kernels go on where it was."""
    for array in (mx.arange(5000, dtype=mx.int32).reshape(2, 2500), mx.array(3.5, mx.bfloat16), mx.zeros((2, 0))):
        mx.eval(array)
        copy = bytes_of(_copied(array))
        assert bytes(copy) == bytes(bytes_of(array))
        if array.size > 1:
            places = [np.asarray(data).ctypes.data for data in (copy, bytes_of(array))]
            assert abs(places[0] - places[1]) >= array.nbytes
