"""RMS norms with a gate, as recurrent layers end with: normalized and then gated, or gated and then normalized."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from runner.nn.fast import provided_ops
from runner.ops.gates import gated
from runner.ops.table import Ops
from runner.weights.module import Module
from runner.weights.tags import setting, tensor


@dataclass
class GatedRMSNorm(Module):
    """RMS norm of a recurrence's output, and its gate: `x` and `gate` `[B, L, C]` to the same shape.

    The last axis is normalized in `groups` equal parts, each by itself, with a weight `[C]`, or `[C / groups]` for all
    parts. Everything is computed in float32 and rounded once. Sources: `Qwen3NextRMSNormGated`, `Zamba2RMSNormGated`
    and `FalconH1RMSNormGated` in transformers.
    """

    weight: mx.array = tensor("weight", "$0")
    groups: int = setting("gated_norm_groups", default=1)
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, gate: mx.array, eps: float) -> mx.array:
        raise NotImplementedError


@dataclass
class NormThenGate(GatedRMSNorm):
    """`norm(x) * weight * silu(gate)`."""

    def __call__(self, x: mx.array, gate: mx.array, eps: float) -> mx.array:
        return self.ops.gated_norm(x, gate, self.weight, eps, self.groups, False)


@dataclass
class GateThenNorm(GatedRMSNorm):
    """`norm(x * silu(gate)) * weight`."""

    def __call__(self, x: mx.array, gate: mx.array, eps: float) -> mx.array:
        return self.ops.gated_norm(x, gate, self.weight, eps, self.groups, True)


@dataclass
class Gate:
    """`x * silu(gate)`, rounded once; nothing is normalized, and no tensor read."""

    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, gate: mx.array, eps: float) -> mx.array:
        return self.ops.fused(gated, x, gate).astype(x.dtype)
