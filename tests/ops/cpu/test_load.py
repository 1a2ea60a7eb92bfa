"""Loading the extension, and why it is refused. What it computes is tested in the files next to this one."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
import types

import mlx.core as mx
import pytest

from runner.errors import BackendError, UsageError
from runner.ops import cpu as kernels
from runner.ops.cpu import _load


class Fake(types.ModuleType):
    """A stand-in for the extension, built for some MLX; without `same_abi` it refuses arrays, as nanobind does."""

    def __init__(self, built_for_mlx: str, *, same_abi: bool = True) -> None:
        super().__init__("_C")
        self.built_for_mlx = built_for_mlx
        self.same_abi = same_abi

    def accepts_array(self, x: object) -> bool:
        if not self.same_abi:
            raise TypeError("incompatible function arguments")
        return True


def test_a_missing_extension_has_a_reason_and_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNNER_KERNELS_ISA", raising=False)
    monkeypatch.setenv("PATH", "")  # no compiler: that is needed first
    why = _load.load_extension("runner.ops.cpu._no_such_module")
    assert isinstance(why, _load.Unavailable)
    assert "not built" in why.reason and why.needs is not None and "g++" in why.needs
    assert why.fix is not None and why.fix.startswith(shlex.quote(sys.executable)) and "--no-deps" in why.fix


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("linux", "riscv64")])
def test_where_there_are_no_kernels_nobody_is_told_to_build_them(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str
) -> None:
    monkeypatch.delenv("RUNNER_KERNELS_ISA", raising=False)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    why = _load.load_extension("runner.ops.cpu._no_such_module")
    assert isinstance(why, _load.Unavailable) and why.fix is None and why.needs is None
    assert "Linux on x86-64 and ARM alone" in str(why) and "run:" not in str(why)
    assert ("the GPU, is the fast one" in str(why)) is (system == "darwin")


def test_a_build_for_another_mlx_is_refused() -> None:
    why = _load.check(Fake("0.1.2"), "0.32.4")
    assert isinstance(why, _load.Unavailable)
    assert "0.1.2" in why.reason and "0.32.4" in why.reason
    assert (
        why.fix is not None and "pip install" in why.fix and "--no-deps" not in why.fix
    )  # the MLX that it is built for comes along


def test_another_nanobind_abi_is_refused() -> None:
    why = _load.check(Fake("0.32.4", same_abi=False), "0.32.4")
    assert isinstance(why, _load.Unavailable) and "nanobind" in why.reason


def test_a_development_build_of_the_same_mlx_is_accepted() -> None:
    same = Fake("0.32.4")
    assert _load.check(same, "0.32.4.dev20260101+abc") is same


def test_kernels_turned_off_name_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNNER_KERNELS_ISA", "none")
    why = _load.load_extension()
    assert isinstance(why, _load.Unavailable) and why.fix == "unset RUNNER_KERNELS_ISA"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NUM_THREADS", "two"),
        ("NUM_THREADS", "0"),
        ("NUM_THREADS", "-1"),
        ("NUM_THREADS", "9" * 20),
        ("KERNELS_ISA", "x"),
    ],
)
def test_a_variable_that_the_kernels_cannot_follow_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"RUNNER_{name}", value)
    if name == "KERNELS_ISA" and kernels.unavailable() is not None:
        pytest.skip("no kernels")
    with pytest.raises(UsageError, match=f"RUNNER_{name}"):
        _load.load_extension()
    monkeypatch.setenv(f"RUNNER_{name}", "")  # as if it were not set
    _load.load_extension()


def test_require_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_C", _load.Unavailable("because of the test", "make it", "a thing"))
    with pytest.raises(BackendError, match="because of the test; install a thing, then run: make it"):
        kernels.require()
    monkeypatch.setattr(kernels, "_C", Fake("0.32.4"))
    kernels.require()


def test_importing_does_not_start_threads_or_change_the_device() -> None:
    code = (
        "import threading, os, mlx.core as mx\n"
        "before = mx.default_device(), len(os.listdir('/proc/self/task')) if os.path.isdir('/proc/self/task') else 0\n"
        "import runner.ops.cpu\n"
        "after = mx.default_device(), len(os.listdir('/proc/self/task')) if os.path.isdir('/proc/self/task') else 0\n"
        "assert before == after, (before, after)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_base_of_the_package_does_not_need_the_extension() -> None:
    code = (
        "import sys\n"
        "sys.modules['runner.ops.cpu._C'] = None\n"  # what an import of a module that is not there looks like
        "import mlx.core as mx, runner.ops.cpu as k\n"
        "assert k.unavailable() is not None\n"
        "from runner.ops.table import PORTABLE\n"
        "assert PORTABLE.linear(mx.ones((2, 3)), mx.ones((4, 3)), None).tolist() == [[3.0] * 4] * 2\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert mx.default_device() is not None
