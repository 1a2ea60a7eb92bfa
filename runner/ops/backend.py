"""Is there an MLX that can compute here? Answered once, in one clear line."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
import platform
from dataclasses import dataclass

from runner import installation
from runner.errors import BackendError


@dataclass(frozen=True)
class BackendReport:
    """What `doctor` shows. `problem`: why models cannot run; `notice`: why they run slower than they could.

    `fix` is the command that changes that, `needs` what must be installed before it; None: nothing to say.
    """

    mlx_version: str | None
    device: str
    kernels: str
    memory_bytes: int
    problem: str | None = None
    notice: str | None = None
    fix: str | None = None
    needs: str | None = None


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
            f"MLX has no backend that works on this machine ({reason}); install one with: {_fix()}"
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
        return BackendReport(version, platform.machine(), "none", 0, problem=str(error), fix=_fix())
    import mlx.core as mx

    from runner.ops.device import current

    info = mx.device_info(mx.default_device())
    name = str(info.get("device_name") or info.get("architecture") or platform.processor() or platform.machine())
    kind = "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
    device = current()
    report = BackendReport(version, f"{kind}: {name}", device.name, _memory())
    return dataclasses.replace(report, notice=device.notice, fix=device.fix, needs=device.needs)


def _fix() -> str:
    return installation.install(installation.extra())


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
