"""Builds the optional CPU kernels, names the platform of a wheel; everything else is in pyproject.toml.

Objects lie in build/kernels and are compiled in parallel, each one once: beside an object stands what it was made from,
and only what differs from that is compiled again, whoever asks (pip in an environment of its own, `scripts/setup_venv`,
`scripts/wheel`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

STRICT = os.environ.get("RUNNER_STRICT_BUILD") == "1"
SOURCES = Path("runner/ops/cpu/src")


class Build(build_ext):
    """Compiles files side by side, and none whose object is there already."""

    def build_extension(self, ext: Extension) -> None:
        self.build_temp = str(Path("build") / "kernels")
        self.compiler.compile = functools.partial(self.compile_files, self.compiler)
        super().build_extension(ext)

    def compile_files(
        self,
        compiler: Any,
        sources: list[str],
        output_dir: str | None = None,
        macros: Any = None,
        include_dirs: Any = None,
        debug: bool = False,
        extra_preargs: Any = None,
        extra_postargs: Any = None,
        depends: Any = None,
    ) -> list[str]:
        """Stand in for the compiler's `compile`, which takes one file after the other."""
        macros, objects, extra, options, made_from = compiler._setup_compile(
            output_dir, macros, include_dirs, sources, depends, extra_postargs
        )
        arguments = compiler._get_cc_args(options, debug, extra_preargs)
        common = environment(compiler, arguments, extra)
        todo = []
        for target in objects:
            source, suffix = made_from[target]
            if not current(Path(target), f"{common} {digest(Path(source))}"):
                todo.append((Path(source).stat().st_size, target, source, suffix))
        # The instruction sets' files, which are the shortest and take the longest, begin.
        todo.sort(key=lambda item: ("isa_" not in item[1], -item[0]))
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            jobs = []
            for _, target, source, suffix in todo:
                Path(target).with_suffix(".made").unlink(missing_ok=True)
                jobs.append(pool.submit(compiler._compile, target, source, suffix, arguments, extra, options))
            for (_, target, source, _), job in zip(todo, jobs, strict=True):
                job.result()
                note = f"{common} {digest(Path(source))}\n{'strict' if STRICT else 'warnings allowed'}\n"
                Path(target).with_suffix(".made").write_text(note)
        print(f"kernels: {len(todo)} of {len(objects)} files compiled")
        return list(objects)


class Wheel(bdist_wheel):
    """Names the platform that a wheel was made on, with the kernels or without them.

    Named `any`, one without them would be taken on Linux too, in place of one with them or of a build from source.
    """

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, place = super().get_tag()
        return python, abi, platform_tag() if place == "any" else place


def platform_tag() -> str:
    """This machine's, as wheels spell it; on a Mac that of MLX's own wheels, whatever Python was built for."""
    if sys.platform == "darwin":
        return "macosx_14_0_arm64"
    return re.sub(r"[-.]", "_", sysconfig.get_platform())


def current(target: Path, wanted: str) -> bool:
    """Whether an object was made from the same; where warnings are errors, they must have been then too."""
    try:
        made, strictness = target.with_suffix(".made").read_text().splitlines()
    except (OSError, ValueError):
        return False
    return target.exists() and made == wanted and (strictness == "strict" or not STRICT)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def environment(compiler: Any, arguments: list[str], extra: list[str]) -> str:
    """What every object depends on: compiler, flags, headers, and the versions of what is included from elsewhere.

    Not the paths of those: pip makes an environment of its own for each build.
    """
    try:
        version = subprocess.run(
            [*compiler.compiler_so_cxx[:1], "--version"], capture_output=True, text=True, check=False
        )
    except OSError as error:  # setuptools leaves out what cannot be compiled, but ends at any other error
        raise CompileError(f"{compiler.compiler_so_cxx[0]}: {error.strerror}") from error
    flags = [word for word in [*arguments, *extra] if not word.startswith(("-I", "-isystem")) and word != "-Werror"]
    headers = [digest(path) for path in sorted(SOURCES.glob("*.h"))]
    versions = [importlib.metadata.version(name) for name in ("mlx", "nanobind")]
    parts = [version.stdout, sys.version, *flags, *headers, *versions, *compiler.compiler_so_cxx]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def extensions() -> list[Extension]:
    """The kernels, on Linux where MLX computes on the CPU; a machine without a compiler installs without them.

    RUNNER_STRICT_BUILD=1 (CI) makes warnings errors, and installs nothing without them.
    """
    mlx, nanobind = importlib.util.find_spec("mlx"), importlib.util.find_spec("nanobind")
    sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
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
    others = [root / "include", binding / "include", binding / "src", binding / "ext" / "robin_map" / "include"]
    return [
        Extension(
            "runner.ops.cpu._C",
            sources,
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
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
                *(["-Werror"] if STRICT else []),
                *(f"-isystem{folder}" for folder in others),
            ],
            extra_link_args=["-pthread", "-Wl,-z,now", "-Wl,--strip-debug"],
            optional=not STRICT,
            language="c++",
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
