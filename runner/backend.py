"""Is there an MLX that can compute here? Answered once, in one clear line."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shutil
import sys
from dataclasses import dataclass

from runner.errors import BackendError


@dataclass(frozen=True)
class BackendReport:
    """What `doctor` shows. `problem`: why models can't run; `notice`: why they run slower than they could; `fix`: the
    command for either; each None where there is nothing to say."""

    mlx_version: str | None
    device: str
    kernels: str
    problem: str | None
    notice: str | None
    fix: str | None
    memory_bytes: int


def install_command() -> str:
    """The pip command that brings the backend that fits this machine."""
    if sys.platform == "darwin":
        return "pip install mlx-runner"
    extra = "cuda13" if shutil.which("nvidia-smi") else "cpu"
    return f'pip install "mlx-runner[{extra}]"'


def require() -> None:
    """Make sure that MLX and a backend can be imported.

    Raises:
        BackendError: they cannot; the message carries the command that installs what is missing.
    """
    try:
        importlib.import_module("mlx.core")
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise BackendError(
            f"MLX has no backend that works on this machine ({reason}); install one with: {install_command()}"
        ) from error


def describe() -> BackendReport:
    """Look at MLX, its device, and this package's CPU kernels; raises nothing."""
    try:
        version: str | None = importlib.metadata.version("mlx")
    except importlib.metadata.PackageNotFoundError:
        version = None
    try:
        require()
    except BackendError as error:
        return BackendReport(version, platform.machine(), "none", str(error), None, install_command(), 0)
    import mlx.core as mx

    from runner.device import current

    info = mx.device_info(mx.default_device())
    name = str(info.get("device_name") or info.get("architecture") or platform.processor() or platform.machine())
    kind = "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
    device = current()
    return BackendReport(version, f"{kind}: {name}", device.name, None, device.notice, device.fix, _memory())


def _memory() -> int:
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
