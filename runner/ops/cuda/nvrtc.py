"""Compiles CUDA C++ with NVRTC, the library that MLX's CUDA backend brings, and keeps what came of it.

No other part of CUDA is needed: the texts include nothing. A kernel is kept under a hash of all it was made from, in a
directory that only its owner can read.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import site
import stat
import sys
import sysconfig
from pathlib import Path

from runner.errors import BackendError

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120a")
"""What the kernels are written for, and tested to compile for; others in between take the code of the same texts."""

_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


class Nvrtc:
    """The library, opened."""

    def __init__(self) -> None:
        """Open the library.

        Raises:
            BackendError: there is none.
        """
        self._library = _open()
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def compile(self, source: str, architecture: str) -> tuple[bytes, str]:
        """Compile a text for an architecture such as `sm_90a`; returns the machine code, and what the compiler said.

        Raises:
            BackendError: the text does not compile; the message has the compiler's first lines.
        """
        library, program = self._library, ctypes.c_void_p()
        if library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"step.cu", 0, None, None):
            raise BackendError("NVRTC cannot begin a program")
        try:
            # A lambda with a parameter `auto` is a device function to NVRTC 13.5, to 13.0 only when told so.
            options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17", b"--ptxas-options=-v"]
            options.append(b"--device-as-default-execution-space")
            if int(self.version.partition(".")[0]) >= 13:
                # What it kept of an earlier process says nothing of registers, and we keep kernels ourselves.
                options.append(b"--no-cache")
            failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
            log = self._read(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0").decode()
            if failed:
                raise BackendError(f"NVRTC {self.version} refuses a kernel: {log[:2000]}")
            return self._read(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN"), log
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, size: str, content: str) -> bytes:
        length = ctypes.c_size_t()
        getattr(self._library, size)(program, ctypes.byref(length))
        buffer = ctypes.create_string_buffer(max(1, length.value))
        getattr(self._library, content)(program, buffer)
        return buffer.raw[: length.value]


def _open() -> ctypes.CDLL:
    # Where pip puts NVIDIA's packages: beside MLX's.
    roots = {*site.getsitepackages(), sysconfig.get_path("purelib"), *sys.path}
    for root in sorted(path for path in roots if path):
        for folder in ("nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"):
            for name in _NAMES:
                if (found := Path(root, folder, name)).is_file():
                    # What it opens by name later, and 13.0 would look for elsewhere.
                    for part in found.parent.glob("libnvrtc-builtins.so.*"):
                        ctypes.CDLL(str(part))
                    return ctypes.CDLL(str(found))
    for name in _NAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BackendError("there is no NVRTC (libnvrtc.so), which compiles kernels for NVIDIA GPUs")


def compiled(source: str, architecture: str, cache: Path | None = None) -> bytes:
    """The machine code of a text: what is kept of an earlier process, or compiled now and kept.

    Args:
        cache: the directory; None: `$XDG_CACHE_HOME/runner/cuda`.

    Raises:
        BackendError: there is no NVRTC, or it refuses the text.
    """
    nvrtc = Nvrtc()
    made_from = "\0".join([source, architecture, nvrtc.version])
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "runner" / "cuda"
    file = folder / f"step-{hashlib.sha256(made_from.encode()).hexdigest()[:32]}.cubin"
    if (kept := _kept(folder, file)) is not None:
        return kept
    code, _ = nvrtc.compile(source, architecture)
    _keep(folder, file, code)
    return code


def _kept(folder: Path, file: Path) -> bytes | None:
    """What was kept in a directory that nobody else may write to; code from elsewhere is never run."""
    try:
        for path in (folder, file):
            info = path.lstat()
            if info.st_uid != os.getuid() or info.st_mode & 0o022 or stat.S_ISLNK(info.st_mode):
                return None
        return file.read_bytes()
    except OSError:
        return None


def _keep(folder: Path, file: Path, code: bytes) -> None:
    """Keep `code`, whole or not at all; where that fails, the next process compiles again."""
    part = file.with_suffix(f".{os.getpid()}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as out:
            out.write(code)
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)
