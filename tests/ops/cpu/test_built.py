"""Behaviour of the extension alone: refusals, forced instruction sets, forks. Not collected where it is not built."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import available
from twins import EPSILON, FLOATS, Layout, assert_close, attention, numpy, rand

from runner.cache.kv import KVCache, RotatingKVCache
from runner.cache.storage import unpacked
from runner.ops import cpu as kernels
from runner.ops.cpu import _C
from runner.ops.cpu.ops import DENSE


def test_a_query_that_sees_no_key() -> None:
    q, k = rand(1, 2, 3, 16, seed=0), rand(1, 1, 5, 16, seed=1)
    mask = mx.array([[True] * 5, [False] * 5, [True] * 5])
    best = _C.isa()
    for level in available()[1:]:
        _C.set_isa(level)
        found = numpy(kernels.attention(q, k, k, scale=0.2, mask=mask))
        assert not found[0, :, 1].any() and found[0, :, 0].any()
    _C.set_isa(best)


WRONG: dict[str, Any] = {
    "a negative size": lambda: kernels.empty((1, -1), mx.float32),
    "append past the end": lambda: kernels.append(
        mx.zeros((1, 1, 4, 8)), mx.zeros((1, 1, 4, 8)), mx.zeros((1, 1, 2, 8)), mx.zeros((1, 1, 2, 8)), 3
    ),
    "append of another width": lambda: kernels.append(
        mx.zeros((1, 1, 4, 8)), mx.zeros((1, 1, 4, 8)), mx.zeros((1, 1, 2, 8)), mx.zeros((1, 1, 2, 6)), 0
    ),
    "length beyond the buffer": lambda: kernels.attention(
        mx.zeros((1, 1, 1, 8)), mx.zeros((1, 1, 4, 8)), mx.zeros((1, 1, 4, 8)), scale=1.0, length=5
    ),
    "x of integers": lambda: kernels.rms_norm(mx.zeros((2, 4), mx.int32), None, 1e-5),
    "in differs": lambda: kernels.linear(mx.zeros((2, 4)), mx.zeros((3, 5))),
    "bias size": lambda: kernels.linear(mx.zeros((2, 4)), mx.zeros((3, 4)), mx.zeros((4,))),
    "7 bits": lambda: kernels.quantized_linear(
        mx.zeros((1, 64)), mx.zeros((2, 14), mx.uint32), mx.zeros((2, 1)), mx.zeros((2, 1)), group_size=64, bits=7
    ),
    "scales shape": lambda: kernels.quantized_linear(
        mx.zeros((1, 64)), mx.zeros((2, 8), mx.uint32), mx.zeros((2, 2)), mx.zeros((2, 2)), group_size=64, bits=4
    ),
    "another mode": lambda: kernels.small_float_linear(
        mx.zeros((1, 64)), mx.zeros((2, 8), mx.uint32), mx.zeros((2, 2), mx.uint8), mode="affine"
    ),
    "scales of floats": lambda: kernels.small_float_linear(
        mx.zeros((1, 64)), mx.zeros((2, 8), mx.uint32), mx.zeros((2, 2)), mode="mxfp4"
    ),
    "half a group": lambda: kernels.small_float_linear(
        mx.zeros((1, 48)), mx.zeros((2, 6), mx.uint32), mx.zeros((2, 1), mx.uint8), mode="mxfp4"
    ),
    "heads": lambda: kernels.attention(
        mx.zeros((1, 3, 1, 8)), mx.zeros((1, 2, 4, 8)), mx.zeros((1, 2, 4, 8)), scale=1.0
    ),
    "window 0": lambda: kernels.attention(
        mx.zeros((1, 2, 1, 8)), mx.zeros((1, 2, 4, 8)), mx.zeros((1, 2, 4, 8)), scale=1.0, window=0
    ),
    "odd dims": lambda: kernels.rope(mx.zeros((1, 1, 1, 8)), 0, dims=3, base=1e4),
    "freqs and base": lambda: kernels.rope(mx.zeros((1, 1, 1, 8)), 0, dims=8, base=1e4, freqs=mx.ones((4,))),
    "offsets": lambda: kernels.rope(mx.zeros((2, 1, 1, 8)), mx.array([1, 2, 3]), dims=8, base=1e4),
    "odd glu": lambda: kernels.glu(mx.zeros((2, 5))),
    "empty argmax": lambda: kernels.argmax(mx.zeros((2, 0))),
    "empty greatest": lambda: kernels.greatest(mx.zeros((2, 0))),
    "draw from no rows": lambda: kernels.draw(mx.zeros((3,)), [(0.5, 1.0, 0, 1.0, 0.0)]),
    "draw from halves": lambda: kernels.draw(mx.zeros((1, 3), mx.float16), [(0.5, 1.0, 0, 1.0, 0.0)]),
    "draw beyond all": lambda: kernels.draw(mx.zeros((1, 3)), [(1.0, 1.0, 0, 1.0, 0.0)]),
    "draw at a temperature too low": lambda: kernels.draw(mx.zeros((1, 3)), [(0.5, 1e-60, 0, 1.0, 0.0)]),
    "draw from none": lambda: kernels.draw(mx.zeros((1, 3)), [(0.5, 1.0, -1, 1.0, 0.0)]),
    "draw from one row of two": lambda: kernels.draw(mx.zeros((2, 3)), [(0.5, 1.0, 0, 1.0, 0.0)]),
    "two tokens": lambda: kernels.log_probabilities(mx.zeros((1, 3)), mx.array([1, 2], mx.uint32), [2]),
    "a signed token": lambda: kernels.log_probabilities(mx.zeros((1, 3)), mx.array([1]), [2]),
    "bits of fewer tokens": lambda: kernels.masked(mx.zeros((1, 33)), mx.zeros((1, 1), mx.uint32)),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_before_anything_runs(case: str) -> None:
    with pytest.raises(ValueError, match=r"expected|must be|give either"):
        WRONG[case]()


@pytest.mark.parametrize("name", available()[1:])
def test_the_instruction_set_can_be_forced(name: str) -> None:
    code = "from runner.ops import cpu as kernels; print(kernels.isa(), kernels.num_threads())"
    environment = {**os.environ, "RUNNER_KERNELS_ISA": name, "RUNNER_NUM_THREADS": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == [name, "3"]


def test_no_gradients() -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"Not implemented|not implemented"):
        mx.eval(mx.grad(lambda x: kernels.rms_norm(x, None, 1e-5).sum())(mx.ones((4,))))


def test_a_forked_child_gets_threads_of_its_own() -> None:
    code = (
        "import os, sys\n"
        "from runner.ops.cpu import _C\n"
        "_C.set_num_threads(3)\n"
        "assert _C.self_test(1000)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    _C.set_num_threads(3)\n"
        "    os._exit(0 if _C.self_test(1000) else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (1, 1, 64)])
def test_empty_and_small_batches(shape: tuple[int, ...]) -> None:
    """Plain MLX 0.32.4 crashes with a division by zero on some of these shapes."""
    x = mx.zeros(shape)
    packed, scales, shifts = mx.quantize(rand(8, 64, seed=1), group_size=32, bits=8)
    y = kernels.quantized_linear(x, packed, scales, shifts, group_size=32, bits=8)
    for found in (kernels.linear(x, rand(8, 64, seed=1)), y):
        assert found.shape == (*shape[:-1], 8)
        assert not numpy(found).any()
    assert numpy(kernels.rms_norm(x, None, 1e-5)).shape == shape
    assert numpy(kernels.glu(x, "silu")).shape == (*shape[:-1], 32)


def test_no_keys_no_inputs() -> None:
    q, none = rand(1, 2, 1, 16, seed=0), mx.zeros((1, 1, 0, 16))
    assert not numpy(kernels.attention(q, none, none, scale=1.0)).any()
    bias = rand(3, seed=1)
    assert mx.array_equal(kernels.linear(mx.zeros((2, 0)), mx.zeros((3, 0)), bias), mx.broadcast_to(bias, (2, 3)))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(available()[1:]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 70),
    FLOATS,
    st.sampled_from(["int16", "float32", "float16", "bfloat16"]),
    Layout,
    st.integers(0, 99),
)
def test_append(
    level: str, batch: int, kv: int, length: int, dim: int, dtype: mx.Dtype, kept: str, layout: str, seed: int
) -> None:
    """The rows hold what was written, to the rounding of the buffer's type; the rows before and after are untouched."""
    k, v = (rand(batch, kv, length, dim, seed=seed + i, dtype=dtype, layout=layout) for i in range(2))
    packed = kept == "int16"
    shape = (batch, kv, length + 9, dim + 2 * packed)
    keys, values = (mx.full(shape, 7, dtype=getattr(mx, kept)) for _ in range(2))
    best = _C.isa()
    assert _C.set_isa(level)
    found = kernels.append(keys, values, k, v, 4)
    mx.eval(found)
    _C.set_isa(best)
    for buffer, x in zip(found, (k, v), strict=True):
        assert bool(mx.all(buffer[:, :, :4] == 7)) and bool(mx.all(buffer[:, :, 4 + length :] == 7))
        rows, want = numpy(unpacked(buffer, 4 + length))[:, :, 4:], numpy(x)
        if packed:
            # All powers of channels are 7 here, which changes no code.
            # Half a code, and float32's rounding of a code of up to 32767 in two products.
            limit = np.abs(want).max(-1, keepdims=True) * (0.5 + 2**-7) / 32767
        else:
            limit = np.abs(want) * EPSILON[getattr(mx, kept)]
        assert np.all(np.abs(rows - want) <= limit + 1e-7)


def test_append_writes_in_place_and_a_bad_row_is_nan_alone() -> None:
    k = mx.concatenate([rand(1, 1, 2, 20, seed=0), mx.full((1, 1, 1, 20), mx.inf)], axis=2)
    buffers = mx.zeros((1, 1, 8, 22), dtype=mx.int16), mx.zeros((1, 1, 8, 22), dtype=mx.int16)
    mx.eval(buffers)
    found = kernels.append(*buffers, k, k * 2, 1)
    mx.eval(found)
    assert mx.array_equal(buffers[0], found[0])  # the same memory
    rows = numpy(unpacked(found[1], 7))[0, 0]
    assert np.isnan(rows[3]).all() and np.isfinite(rows[[0, 1, 2, 4, 5, 6]]).all() and not rows[4:].any()
    assert np.allclose(rows[1:3], numpy(k)[0, 0, :2] * 2, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(available()[1:]), st.integers(1, 2), st.integers(1, 4), st.integers(1, 40), st.integers(0, 600),
    st.integers(1, 70), st.sampled_from([None, 1, 30]), st.sampled_from([1, 100]), st.integers(0, 99),
)  # fmt: skip
def test_attention_over_a_cache_is_attention_over_its_numbers(
    level: str, kv: int, group: int, new: int, before: int, dim: int, window: int | None, times: int, seed: int
) -> None:
    """Int16 rows and a length give the same result as the rows as numbers, cut to that length."""
    size = before + new
    q, k, v = (rand(2, heads, rows, dim, seed=seed + i) for i, (heads, rows) in enumerate(
        [(kv * group, new), (kv, size), (kv, size)]))  # fmt: skip
    q[..., 0] = q[..., 0] / times
    k[..., 0], v[..., dim // 2] = k[..., 0] * times, v[..., dim // 2] * times
    empty = [mx.zeros((2, kv, size + 5, dim + 2), dtype=mx.int16) for _ in range(2)]
    best = _C.isa()
    assert _C.set_isa(level)
    keys, values = kernels.append(*empty, k, v, 0)
    found = kernels.attention(q, keys, values, scale=0.3, mask="causal", window=window, length=size)
    plain = [unpacked(buffer, size) for buffer in (keys, values)]
    wanted = kernels.attention(q, *plain, scale=0.3, mask="causal", window=window)
    # Scores are scaled before or after their sum, which is 1e-6 of a weight. Where one channel of the values is 100
    # times the others, that is up to 4e-5 of what an average over hundreds of keys leaves of them.
    assert_close(found, numpy(wanted), rounded_to=mx.float32, tolerance=1e-4)
    _C.set_isa(best)


@pytest.mark.parametrize("level", available()[1:])
@pytest.mark.parametrize("times", [1, 100, 1000])
@pytest.mark.parametrize("outliers", [(3,), (0, 17, 40)])
@pytest.mark.parametrize("sample", [16, 700])
@pytest.mark.parametrize("turned", [False, True])
def test_channels_that_stand_out_leave_the_others_their_codes(
    level: str, times: int, outliers: tuple[int, ...], sample: int, turned: bool
) -> None:
    """Real models have such channels (arXiv:2402.02750). What is seen of them in a few rows must serve for all.

    The error of each channel is a share of its own magnitude, and attention is as exact as without them: with one scale
    for all channels of a row, a channel 1,000 times as large as the others left these 3 % of their size.
    """
    heads, dim, size = 2, 64, 760
    k, v = (rand(1, heads, size, dim, seed=i) for i in range(2))
    q = rand(1, 2 * heads, 1, dim, seed=3)
    for channel in outliers:
        # Keys as RoPE leaves them: the pair's other half is nothing at first, and large later.
        angles = mx.arange(size) * (0.004 if turned else 0.0)
        k[..., channel] = times * (1 + 0.1 * k[..., channel]) * mx.cos(angles)
        k[..., (channel + 32) % 64] = k[..., (channel + 32) % 64] + times * mx.sin(angles)
        v[..., channel] = times * (1 + 0.1 * v[..., channel])
        q[..., channel] = q[..., channel] / times
        q[..., (channel + 32) % 64] = q[..., (channel + 32) % 64] / times
    # A few rows do not show that a pair will turn: half an outlier's power is all that its other half has then.
    unseen = sample == 16 and turned
    best = _C.isa()
    assert _C.set_isa(level)
    assert DENSE.powers is not None
    powers = DENSE.powers(k[:, :, :sample], v[:, :, :sample])
    keys, values = (DENSE.empty(x, size, own) for x, own in zip((k, v), powers, strict=True))
    for at in range(0, size, 97):
        keys, values = kernels.append(keys, values, k[:, :, at : at + 97], v[:, :, at : at + 97], at)
    found = numpy(kernels.attention(q, keys, values, scale=dim**-0.5))
    rows = [numpy(unpacked(buffer, size)) for buffer in (keys, values)]
    _C.set_isa(best)
    for got, want, pairs in zip(rows, (numpy(k), numpy(v)), (True, False), strict=True):
        error, sizes = np.abs(got - want).max((0, 1, 2)), np.sqrt((want**2).mean((0, 1, 2)))
        # The other half of an outlier's pair may turn out as large, or not, so its codes are coarser.
        partners = {(channel + 32) % 64 for channel in outliers} if pairs else set()
        others = [channel for channel in range(dim) if channel not in partners]
        assert (error[others] / sizes[others]).max() < (2.5e-3 if unseen else 5e-4)
    sizes = np.sqrt((numpy(v) ** 2).mean((0, 1, 2)))
    want = attention(numpy(q), numpy(k), numpy(v), scale=dim**-0.5, visible=np.array(True)) / sizes
    assert np.abs(found / sizes - want).max() < (2.5e-3 if unseen else 1e-3) * np.sqrt((want**2).mean())


@pytest.mark.parametrize("window", [None, 30])
def test_channels_keep_their_powers_where_rows_move(window: int | None) -> None:
    """Growing, dropping, marking and cutting copy rows: without their channels' powers they would be other numbers."""
    rows = rand(1, 2, 700, 16, seed=1)
    rows[..., 5] = rows[..., 5] * 1000
    assert DENSE.powers is not None
    powers = DENSE.powers(rows[:, :, :20], -2 * rows[:, :, :20])
    cache = KVCache(DENSE, powers) if window is None else RotatingKVCache(window, DENSE, powers)

    def check(end: int) -> None:
        history = cache.history
        for seen in (history, history.latest(20)):
            want = numpy(rows[:, :, end - seen.length : end])
            for found, times in ((seen.keys, 1), (seen.values, -2)):
                off = np.abs(numpy(found) - times * want) / np.abs(want).mean((0, 1, 2))
                # The other half of the outlier's pair has the coarsest codes; lost powers are off by 1 and more.
                assert found.shape == want.shape and off.max() < 5e-3

    for start in range(0, 700, 20):
        if start == 400:
            mark = cache.mark()
        cache.append(rows[:, :, start : start + 20], -2 * rows[:, :, start : start + 20])
        check(start + 20)
    cache.restore(mark)
    cache.append(rows[:, :, 400:420], -2 * rows[:, :, 400:420])
    check(420)
