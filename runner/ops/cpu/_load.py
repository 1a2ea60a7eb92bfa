"""Loads the extension, or says in one line why it cannot be used, so that a mismatched binary never crashes."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from types import ModuleType

import mlx.core as mx

from runner import installation
from runner.errors import UsageError


@dataclass(frozen=True)
class Unavailable:
    """Why the kernels cannot be used, and the command that fixes it, None where there is none.

    `needs` is what must be installed before that command.
    """

    reason: str
    fix: str | None
    needs: str | None = None

    def __str__(self) -> str:
        if self.fix is None:
            return self.reason
        return f"{self.reason}; {'' if self.needs is None else f'install {self.needs}, then '}run: {self.fix}"


def load_extension(name: str = f"{__package__}._C") -> ModuleType | Unavailable:
    """Import the extension. RUNNER_KERNELS_ISA=none leaves it out, to compare with plain MLX.

    Raises:
        UsageError: one of the two variables that the kernels read has a value that they cannot follow.
    """
    threads, wanted = os.environ.get("RUNNER_NUM_THREADS"), os.environ.get("RUNNER_KERNELS_ISA")
    if threads and not (threads.isascii() and threads.isdigit() and 0 < int(threads) < 1 << 31):
        raise UsageError(f"RUNNER_NUM_THREADS must be a whole number of at least 1, not {threads!r:.40}")
    if wanted == "none":
        return Unavailable("RUNNER_KERNELS_ISA=none turns the CPU kernels off", "unset RUNNER_KERNELS_ISA")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):  # as in setup.py
            others = "; MLX's default device, the GPU, is the fast one here" if sys.platform == "darwin" else ""
            return Unavailable(f"there are CPU kernels for Linux on x86-64 and ARM alone{others}", None)
        found = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
        needs = None if found else "a C++20 compiler (g++ or clang++)"
        return Unavailable("the CPU kernels are not built", installation.rebuild(dependencies=False), needs)
    except ImportError as error:  # a symbol of another MLX version, or a missing library
        return Unavailable(f"the CPU kernels do not load ({error})", installation.rebuild(dependencies=True))
    checked = check(module, vars(mx)["__version__"])
    if wanted and not isinstance(checked, Unavailable) and checked.isa() != wanted:
        why = checked.why_no_tiles() if wanted == "amx" else None
        raise UsageError(
            f"RUNNER_KERNELS_ISA={wanted:.40} names no instruction set that this CPU and these kernels have "
            f"({'' if why is None else f'{why}; '}{checked.isa()} is in use without it; none: plain MLX)"
        )
    return checked


def check(module: ModuleType, installed: str) -> ModuleType | Unavailable:
    """Return `module`, unless it was built for another MLX version or another nanobind ABI than mlx.core's."""
    built = str(module.built_for_mlx)
    if built != installed.split(".dev")[0]:
        reason = f"the CPU kernels were built for MLX {built}, but MLX {installed} is installed"
        return Unavailable(reason, installation.rebuild(dependencies=True))
    # nanobind shares types only between modules of one ABI: only a call shows whether arrays are accepted.
    try:
        module.accepts_array(mx.array(0))
    except TypeError:
        reason = f"the CPU kernels were built with another nanobind ABI than MLX {installed}"
        return Unavailable(reason, installation.rebuild(dependencies=True))
    return module
