"""Builds the optional CPU kernels; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup


def extensions() -> list[Extension]:
    """The kernels, on Linux where MLX computes on the CPU; a machine without a compiler installs without them.

    RUNNER_STRICT_BUILD=1 (CI) makes warnings errors, and installs nothing without them.
    """
    mlx, nanobind = importlib.util.find_spec("mlx"), importlib.util.find_spec("nanobind")
    sources = sorted(str(path) for path in Path("runner/ops/cpu/src").glob("*.cpp"))
    if (
        sys.platform != "linux"
        or platform.machine() not in ("x86_64", "aarch64")
        or not mlx
        or not nanobind
        or not sources
    ):
        return []
    root = Path(next(iter(mlx.submodule_search_locations or [])))
    binding = Path(next(iter(nanobind.submodule_search_locations or [])))
    strict = os.environ.get("RUNNER_STRICT_BUILD") == "1"
    others = [root / "include", binding / "include", binding / "src", binding / "ext" / "robin_map" / "include"]
    return [
        Extension(
            "runner.ops.cpu._C",
            sources,
            depends=sorted(str(path) for path in Path("runner/ops/cpu/src").glob("*.h")),
            define_macros=[("NB_DOMAIN", "mlx"), ("NB_COMPACT_ASSERTIONS", None), ("NDEBUG", None)],
            # No run path: importing mlx.core has loaded the library by then, and the name finds it.
            library_dirs=[str(root / "lib")],
            libraries=["mlx"],
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-fvisibility=hidden",
                "-fno-strict-aliasing",
                "-Wall",
                "-Wextra",
                *(["-Werror"] if strict else []),
                *(f"-isystem{folder}" for folder in others),
            ],
            extra_link_args=["-pthread", "-Wl,-z,now", "-Wl,--strip-debug"],
            optional=not strict,
            language="c++",
        )
    ]


setup(ext_modules=extensions())
