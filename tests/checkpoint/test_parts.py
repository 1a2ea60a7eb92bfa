"""Parts of tensors: what a whole read would give, cut; and no bytes of the file but theirs, where they lie together."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from cuts import any_cut, equal, read_so_far
from places import TESTS

from runner.checkpoint import cut_reader
from runner.checkpoint.directory import Checkpoint
from runner.checkpoint.model_files import open_files
from runner.errors import CheckpointError
from runner.weights.cuts import Cut, PartSource, cut_out, cut_shape, within

FIXTURES = sorted(path.parent for path in TESTS.glob("fixtures/*/*/config.json"))
COUNTED = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="what was read, /proc tells")


def test_parts_are_what_a_whole_tensor_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every tensor of a few models; with short and long runs, and buffers that are too small."""
    draw = random.Random(0)
    for path in draw.sample(FIXTURES, 12):
        source = open_files(path).source
        assert isinstance(source, PartSource)
        for name, header in source.headers.items():
            monkeypatch.setattr(cut_reader, "RUN", draw.choice((1, 64, 1 << 20)))
            monkeypatch.setattr(cut_reader, "BUFFER", draw.choice((64, 1000, 1 << 20)))
            cut = any_cut(header.shape, draw)
            assert equal(source.read_part(name, cut), cut_out(source.read(name), cut)), (path, name, cut)


@pytest.mark.parametrize("run", [1, 1 << 20])
def test_rows_apart_and_short_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: int) -> None:
    """Systems may give fewer bytes than were asked for; kept rows need neither follow on each other nor ascend."""
    read = os.preadv
    monkeypatch.setattr(cut_reader, "RUN", run)
    numbers = mx.arange(12 * 8 * 3, dtype=mx.uint32).reshape(12, 8, 3)
    checkpoint = stored(tmp_path, {"w": mx.ones(5), "x": numbers})
    monkeypatch.setattr(os, "preadv", lambda file, views, at: read(file, [view[:7] for view in views], at))
    rows: tuple[Cut, ...] = (
        (((0, 2), (5, 7)), ((1, 3),), None),
        (((5, 7), (0, 2)), ((6, 7), (1, 3)), None),
        (((9, 12),), None, ((1, 2),)),
        (((5, 6), (2, 4)), None, None),
    )
    for cut in rows:
        assert equal(checkpoint.read_part("x", cut), cut_out(numbers, cut)), cut


def test_a_file_that_ends_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = stored(tmp_path, {"x": mx.ones((64, 64))})
    monkeypatch.setattr("runner.checkpoint.directory._check_stamp", lambda *given: None)  # it was whole until then
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 64 * 64 * 2)
    with pytest.raises(CheckpointError, match="ends inside tensor 'x'"):
        checkpoint.read_part("x", (((30, 40),), None))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 4), (2, 4, 0)])
def test_a_tensor_of_no_numbers_has_parts(tmp_path: Path, shape: tuple[int, ...]) -> None:
    checkpoint = stored(tmp_path, {"x": mx.zeros(shape), "y": mx.ones(3)})
    for axis, size in enumerate(shape):
        cut: Cut = tuple(((0, size // 2),) if index == axis else None for index in range(len(shape)))
        assert checkpoint.read_part("x", cut).shape == cut_shape(shape, cut)
    # Of rows that are there, none may be wanted.
    assert checkpoint.read_part("y", (((1, 1),),)).shape == (0,)


def test_ranges_within_ranges() -> None:
    kept = ((3, 5), (10, 14), (1, 2))
    places = [place for start, stop in kept for place in range(start, stop)]
    for first in range(len(places)):
        for last in range(first + 1, len(places) + 1):
            found = [place for start, stop in within(kept, first, last) for place in range(start, stop)]
            assert found == places[first:last]


def stored(folder: Path, arrays: dict[str, mx.array]) -> Checkpoint:
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    (folder / "config.json").write_text("{}")
    return Checkpoint.open(folder)


@COUNTED
@pytest.mark.parametrize(
    ("cut", "between"),
    [
        ((((100, 300),), None), 0),  # rows
        ((((0, 64), (256, 320)), None), 0),  # rows of two matrices in one
        ((None, ((0, 4096),)), 0),  # columns, of which those of a row fill pages
        ((None, ((0, 2048),)), 3),  # columns that do not: three times as much lies between them
        ((((1, 3),), ((8, 16),), None), 0),  # experts' rows
        ((None, ((8, 16),), None), 0),
        ((None, None, ((0, 512),)), 7),
    ],
)
def test_no_other_bytes_are_read_where_those_of_a_part_lie_together(tmp_path: Path, cut: Cut, between: int) -> None:
    shape = (512, 8192) if len(cut) == 2 else (4, 32, 4096)
    numbers = mx.arange(int(np.prod(shape)), dtype=mx.uint32).reshape(shape).view(mx.float32)
    checkpoint = stored(tmp_path, {"x": numbers, "y": numbers * 2})
    before = read_so_far()
    part = checkpoint.read_part("x", cut)
    mx.eval(part)
    read = read_so_far() - before
    assert bool(mx.array_equal(part.view(mx.uint32), cut_out(numbers, cut).view(mx.uint32)))
    wanted = int(np.prod(cut_shape(shape, cut))) * 4
    assert wanted * (1 + between) <= read < wanted * (1 + between) + 4096


@pytest.mark.skipif(mx.cuda.is_available(), reason="MLX frees buffers there when kernels end, later")
@COUNTED
def test_memory_holds_a_part_and_a_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_reader, "BUFFER", 1 << 18)
    checkpoint = stored(tmp_path, {"x": mx.ones((4096, 4096), mx.float16)})
    largest = 0

    def watched(shape: Any, kind: Any, make: Callable[..., Any] = np.empty) -> Any:
        nonlocal largest
        largest = max(largest, int(np.prod(shape)))
        return make(shape, kind)

    monkeypatch.setattr(cut_reader, "np", SimpleNamespace(**{**vars(np), "empty": watched}))
    for cut in ((None, ((0, 1024),)), (((0, 1024),), None)):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        part = checkpoint.read_part("x", cut)
        mx.eval(part)
        assert part.nbytes == 8 << 20 and 0 < largest <= 1 << 18
        assert mx.get_peak_memory() - before < (8 << 20) + (4 << 18)
