"""Reports whether MLX can compute on this machine, and the command that fixes it if not."""

from __future__ import annotations

import dataclasses
import importlib
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from runner import installation
from runner.errors import BackendError

if TYPE_CHECKING:
    from runner.ops.device import Device


class Remark(NamedTuple):
    """Something to know about the device: its name, a sentence, and the command that changes it."""

    name: str
    text: str
    fix: str | None = None


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
        working_set: bytes that macOS recommends its GPU to use at once; None elsewhere.
    """

    mlx_version: str | None
    device: str
    kernels: str
    memory_bytes: int
    problem: str | None = None
    notice: str | None = None
    fix: str | None = None
    needs: str | None = None
    working_set: int | None = None
    remarks: tuple[Remark, ...] = ()


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
    import importlib.metadata  # with what it imports it is a fiftieth of a short answer, which needs none of it

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

    try:
        device = current()
    except BackendError as error:
        return BackendReport(version, platform.machine(), "none", 0, problem=str(error))
    info = mx.device_info(mx.default_device())
    name = str(info.get("device_name") or info.get("architecture") or platform.processor() or platform.machine())
    kind = "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
    report = BackendReport(version, f"{kind}: {name}", device.name, _memory(), remarks=tuple(_remarks(device)))
    if device.metal is not None:
        report = dataclasses.replace(report, memory_bytes=device.metal.memory, working_set=device.metal.working_set)
    return dataclasses.replace(report, notice=device.notice, fix=device.fix, needs=device.needs)


def _remarks(device: Device) -> Iterator[Remark]:
    """What a user of this GPU should know."""
    metal = device.metal
    if metal is not None and metal.virtual:
        yield Remark("gpu", "a virtual machine's: slower than the Mac's own")
    if metal is not None and not metal.bfloat16:
        yield Remark(
            "bfloat16", f"{metal.chip} imitates it: --dtype float16 is faster, where a model stays in its range"
        )
    if device.compiles:
        from runner.ops.cuda.driver import impossible  # not where there is no such GPU

        why = impossible()
        yield Remark("decode steps", "one kernel each, where a model fits" if why is None else f"by operations: {why}")
    if device.tf32 and not exact_float32():
        yield Remark("float32", "matrices are multiplied in TF32, with 10 bits of mantissa", "export MLX_ENABLE_TF32=0")


def exact_float32() -> bool:
    """Whether MLX is told not to use TF32: MLX_ENABLE_TF32 is 0, or no number, as C's `atoi` reads it."""
    said = os.environ.get("MLX_ENABLE_TF32")
    found = None if said is None else re.match(r"\s*[+-]?0*([1-9])?", said)
    return found is not None and found[1] is None


def _fix() -> str:
    """The command that installs MLX with a backend for this machine."""
    return installation.install(installation.extra())


def _memory() -> int:
    """Physical memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
