"""What this machine computes with, decided once when a model is loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import mlx.core as mx

from runner.fast import PORTABLE, Ops


@dataclass(frozen=True)
class Device:
    """A table of ops, with the dtype of activations that suits it (None: as the checkpoint stores its weights).

    `threads` are those of our kernels; None where MLX decides. `notice` and `fix` tell what a user could install to run faster; None where nothing is missing.
    """

    name: str
    ops: Ops
    activations: mx.Dtype | None = None
    threads: int | None = None
    notice: str | None = None
    fix: str | None = None


def current() -> Device:
    """The device that MLX computes on by default."""
    if mx.default_device() != mx.Device(mx.cpu):
        return Device("MLX's GPU kernels", PORTABLE)
    from runner import kernels

    reason = kernels.unavailable_reason()
    if reason is None:
        from runner.kernels.ops import KERNELS

        threads = kernels.num_threads()
        return Device(f"runner's CPU kernels ({kernels.isa()}, {threads} threads)", KERNELS, mx.float32, threads)
    return Device(
        "plain MLX on the CPU",
        CPU_WITHOUT_KERNELS,
        notice=f"running on plain MLX, many times slower than this machine can: {reason}",
        fix="install a C++ compiler (g++ or clang), then reinstall: pip install --force-reinstall --no-deps mlx-runner",
    )


def _unpacked_linear(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    bias: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str,
) -> mx.array:
    """MLX multiplies packed weights on a CPU one number at a time; unpacking them for each product is 5 times faster."""
    full = mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits, mode=mode)
    return PORTABLE.linear(x.astype(mx.float32), full.astype(mx.float32), bias).astype(x.dtype)


CPU_WITHOUT_KERNELS = dataclasses.replace(PORTABLE, name="mlx, unpacking", quantized_linear=_unpacked_linear)
