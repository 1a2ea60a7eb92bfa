"""Reports whether MLX can compute on this machine, and the command that fixes it if not."""

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
    """What `doctor` shows about MLX on this machine.

    Attributes:
        device: kind and name of MLX's default device.
        kernels: name of the operations that models run on.
        problem: why models cannot run; None if they can.
        notice: why models run slower than they could; None if they do not.
        fix: the command that removes the problem or the notice.
        needs: what must be installed before that command.
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
    """Check that MLX and a backend can be imported.

    Raises:
        BackendError: they cannot; the message has the command that installs what is missing.
    """
    try:
        importlib.import_module("mlx.core")
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise BackendError(
            f"MLX has no backend that works on this machine ({reason}); install one with: {_fix()}"
        ) from error


def describe() -> BackendReport:
    """Describe MLX, its device and this package's CPU kernels; never raises."""
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
    """The command that installs MLX with a backend for this machine."""
    return installation.install(installation.extra())


def _memory() -> int:
    """Physical memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
