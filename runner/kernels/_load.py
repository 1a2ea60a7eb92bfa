"""Loads the extension, or says in one line why it cannot be used: never a crash on a mismatched binary."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from types import ModuleType

import mlx.core as mx

_REBUILD = "reinstall runner with `pip install --no-cache-dir --force-reinstall --no-deps` to rebuild it"


def load_extension(name: str = f"{__package__}._C") -> tuple[ModuleType | None, str | None]:
    """(module, None), or (None, reason). RUNNER_KERNELS_ISA=none leaves the extension out, to compare with plain MLX."""
    if os.environ.get("RUNNER_KERNELS_ISA") == "none":
        return None, "RUNNER_KERNELS_ISA=none turns the CPU kernels off"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        return (
            None,
            "the CPU kernels are not built; install a C++20 compiler (g++ or clang++), then `pip install .[cpu]`",
        )
    except ImportError as error:  # a symbol of another MLX, a library that is not there
        return None, f"the CPU kernels do not load ({error}); {_REBUILD}"
    return check(module, importlib.metadata.version("mlx"))


def check(module: ModuleType, installed: str) -> tuple[ModuleType | None, str | None]:
    """Refuses a module built for another MLX or another nanobind ABI than mlx.core's."""
    built = str(module.built_for_mlx)
    if built != installed.split(".dev")[0]:
        return None, f"the CPU kernels were built for MLX {built}, installed is {installed}; {_REBUILD}"
    try:
        module.accepts_array(mx.array(0))
    except TypeError:
        return None, f"the CPU kernels were built with another nanobind ABI than MLX {installed}; {_REBUILD}"
    return module, None
