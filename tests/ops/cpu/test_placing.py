"""Weights in large pages of memory: the same numbers, one after the other, for as long as an array of them lives."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from places import TESTS

import runner
from runner.ops import cpu as kernels

if kernels.unavailable() is not None:
    pytest.skip("needs the CPU kernels", allow_module_level=True)

from runner.ops.cpu import _C, placing
from runner.ops.cpu.placing import CHUNK, SMALL, Pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HAS_LARGE_PAGES = sys.platform == "linux" and SETTING.exists() and "[never]" not in SETTING.read_text()
TYPES = ("uint8", "uint32", "float32", "float16", "bfloat16", "int64", "bool_", "complex64")


def numbers(*shape: int, dtype: str = "uint8", seed: int = 0) -> mx.array:
    array = mx.array(np.random.default_rng(seed).integers(0, 255, shape)).astype(getattr(mx, dtype))
    mx.eval(array)
    return array


def where(array: mx.array) -> int:
    """The address of an array's first number."""
    return int(np.array(array.view(mx.uint8), copy=False).ctypes.data)


def test_arrays_keep_their_numbers() -> None:
    """Of every type, and arrays larger than what is taken at a time; nothing overlaps what came before."""
    arrays = [numbers(97, 61, dtype=name, seed=index) for index, name in enumerate(TYPES)]
    arrays += [numbers(CHUNK // 2 + 3), numbers(CHUNK // 4, dtype="uint32"), numbers(3 * SMALL)]
    wanted = [mx.concatenate([each[:1], each[1:]]) for each in arrays]
    mx.eval(wanted)
    place = Pages()
    for array in arrays:
        place(array)
    for array, want in zip(arrays, wanted, strict=True):
        assert array.shape == want.shape and array.dtype == want.dtype
        assert mx.array_equal(array, want)


def test_arrays_lie_side_by_side_in_lines_of_their_own() -> None:
    place, arrays = Pages(), [numbers(SMALL + 1), numbers(2 * SMALL)]
    before = [where(array) for array in arrays]
    for array in arrays:
        place(array)
    first, second = (where(array) for array in arrays)
    assert first not in before and second - first == SMALL + 64 and first % 64 == 0


def test_what_is_small_or_shared_stays() -> None:
    place, small, whole = Pages(), numbers(SMALL - 100), numbers(4, SMALL)
    row = whole.reshape(-1)  # has the same memory
    mx.eval(row)
    wanted, places = np.array(row), [where(each) for each in (small, whole)]
    for array in (small, whole, row):
        place(array)
    assert [where(each) for each in (small, whole)] == places
    assert np.array_equal(np.array(row), wanted)
    assert not _C.move_into(mx.zeros((64,)), _C.pages(256), 0)  # not evaluated


def test_memory_lives_as_long_as_an_array_in_it() -> None:
    place, arrays = Pages(), [numbers(1 << 20, seed=seed) for seed in range(3)]
    wanted = np.array(arrays[2])
    for array in arrays:
        place(array)
    before = mx.get_active_memory()
    del array, arrays[:2]
    place = Pages()
    assert np.array_equal(np.array(arrays[0]), wanted)
    assert mx.get_active_memory() == before
    arrays.clear()
    assert mx.get_active_memory() <= before - CHUNK


def test_the_last_memory_is_no_larger_than_it_need_be() -> None:
    arrays = [numbers(20 << 20, seed=seed) for seed in range(5)]
    before, place = mx.get_active_memory(), Pages(100 << 20)
    for array in arrays:
        place(array)
    # 64 MiB hold three of them; the last two take what is left, and a little more.
    assert (60 << 20) + 2 * (20 << 20) <= mx.get_active_memory() - before + (100 << 20) <= (64 << 20) + (42 << 20)


@pytest.mark.parametrize(
    "size, at, message",
    [(0, 0, "positive multiple of 64"), (100, 0, "multiple"), (64, 4, "not fit"), (128, 2, "not fit")],
)
def test_what_does_not_fit_is_refused(size: int, at: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.move_into(numbers(16, dtype="uint32"), _C.pages(size), at)


@pytest.mark.skipif(not HAS_LARGE_PAGES, reason="this system has no pages of 2 MiB, or they are switched off")
@pytest.mark.skipif(mx.cuda.is_available(), reason="MLX takes its memory from CUDA's driver there")
def test_memory_is_held_in_large_pages() -> None:
    def held() -> int:
        found = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
        assert found is not None
        return int(found[1]) << 10

    mx.clear_cache()
    array, before = numbers(CHUNK), held()
    Pages()(array)
    # But for the two at its ends, which may not be there whole.
    assert held() - before >= CHUNK - (4 << 20)


def test_models_of_many_bytes_are_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is large enough moves its matrices, and says what it said before."""
    moved: list[int] = []

    class Noted(Pages):
        def __call__(self, array: mx.array) -> None:
            moved.append(array.nbytes)
            super().__call__(array)

    path = TESTS / "fixtures" / "llama" / "llama-gqa"
    with runner.load(path) as lm:
        wanted = lm.generate([5, 6, 7], temperature=0, max_tokens=5).tokens
        size = lm.engine.nbytes
    monkeypatch.setattr(placing, "Pages", Noted)
    for least in (size + 1, size):
        monkeypatch.setattr(placing, "HUGE", least)
        with runner.load(path) as lm:
            assert lm.generate([5, 6, 7], temperature=0, max_tokens=5).tokens == wanted
        assert sum(moved) == (0 if least > size else size)
