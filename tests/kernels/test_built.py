"""What only the extension does: refusals, forced instruction sets, forks. Not collected where it is not built."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import mlx.core as mx
import pytest
from conftest import available
from twins import numpy, rand

from runner import kernels
from runner.kernels import _C


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
    "x of integers": lambda: kernels.rms_norm(mx.zeros((2, 4), mx.int32), None, 1e-5),
    "in differs": lambda: kernels.linear(mx.zeros((2, 4)), mx.zeros((3, 5))),
    "bias size": lambda: kernels.linear(mx.zeros((2, 4)), mx.zeros((3, 4)), mx.zeros((4,))),
    "3 bits": lambda: kernels.quantized_linear(
        mx.zeros((1, 64)), mx.zeros((2, 6), mx.uint32), mx.zeros((2, 1)), mx.zeros((2, 1)), group_size=64, bits=3
    ),
    "scales shape": lambda: kernels.quantized_linear(
        mx.zeros((1, 64)), mx.zeros((2, 8), mx.uint32), mx.zeros((2, 2)), mx.zeros((2, 2)), group_size=64, bits=4
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
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_before_anything_runs(case: str) -> None:
    with pytest.raises(ValueError, match=r"expected|must be|give either"):
        WRONG[case]()


@pytest.mark.parametrize("name", available()[1:])
def test_the_instruction_set_can_be_forced(name: str) -> None:
    code = "from runner import kernels; print(kernels.isa(), kernels.num_threads())"
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
        "from runner.kernels import _C\n"
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
    """Plain MLX 0.32.4 dies of a division by zero in some of these."""
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
