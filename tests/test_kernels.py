"""The extension as a whole: loading it, its threads, its refusals. What it computes is tested in tests/kernels."""

from __future__ import annotations

import subprocess
import sys
import types

import mlx.core as mx
import pytest

from runner import kernels
from runner.errors import BackendError
from runner.kernels import _load


def test_a_missing_extension_has_a_reason_and_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNNER_KERNELS_ISA", raising=False)
    module, reason = _load.load_extension("runner.kernels._no_such_module")
    assert module is None
    assert reason is not None and "not built" in reason and "pip install" in reason


def test_a_build_for_another_mlx_is_refused() -> None:
    other = types.ModuleType("_C")
    other.built_for_mlx = "0.1.2"  # type: ignore[attr-defined]
    module, reason = _load.check(other, "0.32.4")
    assert module is None
    assert reason is not None and "0.1.2" in reason and "0.32.4" in reason and "pip install" in reason


def test_another_nanobind_abi_is_refused() -> None:
    def accepts_array(x: object) -> bool:
        raise TypeError("incompatible function arguments")

    other = types.ModuleType("_C")
    other.built_for_mlx, other.accepts_array = "0.32.4", accepts_array  # type: ignore[attr-defined]
    module, reason = _load.check(other, "0.32.4")
    assert module is None
    assert reason is not None and "nanobind" in reason


def test_a_development_build_of_the_same_mlx_is_accepted() -> None:
    same = types.ModuleType("_C")
    same.built_for_mlx, same.accepts_array = "0.32.4", lambda x: True  # type: ignore[attr-defined]
    assert _load.check(same, "0.32.4.dev20260101+abc") == (same, None)


def test_require_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_reason", "because of the test")
    with pytest.raises(BackendError, match="because of the test"):
        kernels.require()
    monkeypatch.setattr(kernels, "_reason", None)
    kernels.require()


def test_importing_does_not_start_threads_or_change_the_device() -> None:
    code = (
        "import threading, os, mlx.core as mx\n"
        "before = mx.default_device(), len(os.listdir('/proc/self/task')) if os.path.isdir('/proc/self/task') else 0\n"
        "import runner.kernels\n"
        "after = mx.default_device(), len(os.listdir('/proc/self/task')) if os.path.isdir('/proc/self/task') else 0\n"
        "assert before == after, (before, after)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_base_of_the_package_does_not_need_the_extension() -> None:
    code = (
        "import sys\n"
        "sys.modules['runner.kernels._C'] = None\n"  # what an import of a module that is not there looks like
        "import mlx.core as mx, runner.kernels as k\n"
        "assert k.unavailable_reason() is not None\n"
        "from runner.fast import PORTABLE\n"
        "assert PORTABLE.linear(mx.ones((2, 3)), mx.ones((4, 3)), None).tolist() == [[3.0] * 4] * 2\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert mx.default_device() is not None
