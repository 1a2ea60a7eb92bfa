"""Fuses functions that work element by element into one kernel each, for devices where every kernel has to be launched.

A function of five operations is five kernels on a GPU, each of which reads its input from memory and writes its result
there. `mx.compile` makes one of them. On a CPU it calls a C++ compiler while the model answers: not used there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from runner.config.activations import ACTIVATIONS as NAMES
from runner.ops import attention, side_by_side
from runner.ops.table import ACTIVATIONS, GATES, Ops, convolved, unpacked_rows

if TYPE_CHECKING:
    from runner.ops.delta_rule import Gates, Recurrence
    from runner.ops.routing import Routing
    from runner.ops.state_space import Dynamics, Scanned


class Fusion:
    """Calls functions in their compiled form, which it makes at a function's first call and keeps.

    A form serves arrays of any size, and is made again for other dtypes or numbers of dimensions.
    """

    def __init__(self, *, delta_kernel: bool) -> None:
        self._delta_kernel = delta_kernel
        self._compiled: dict[Callable[..., mx.array], Callable[..., mx.array]] = {}

    def __call__(self, function: Callable[..., mx.array], *arguments: Any) -> mx.array:
        """`function(*arguments)`; arguments are arrays, or numbers that become part of the kernel."""
        compiled = self._compiled.get(function)
        if compiled is None:
            compiled = self._compiled[function] = mx.compile(function, shapeless=True)
        return compiled(*arguments)

    def glu(self, gate_up: mx.array, activation: str) -> mx.array:
        """`Ops.glu`: one kernel that reads both halves of `gate_up` where they lie."""
        return self(GATES[NAMES[activation]], *mx.split(gate_up, 2, axis=-1))

    def activate(self, x: mx.array, activation: str) -> mx.array:
        """`Ops.activate` as one kernel."""
        return self(ACTIVATIONS[NAMES[activation]], x)

    def short_conv(self, *arguments: Any) -> mx.array:
        """`Ops.short_conv`: one kernel for the sum over the taps, and one for the activation."""
        return convolved(self, *arguments)

    def state_space(self, mixed: mx.array, dt: mx.array, dynamics: Dynamics, state: mx.array) -> Scanned:
        """`Ops.state_space` in chunks of tokens."""
        from runner.ops import state_space  # for those who need it: most families don't

        return state_space.in_chunks(self, mixed, dt, dynamics, state)

    def gated_delta(self, q: mx.array, k: mx.array, v: mx.array, gates: Gates, state: mx.array) -> Recurrence:
        """`Ops.gated_delta` by MLX's op where it has a kernel, else in chunks of tokens."""
        from runner.ops import delta_rule  # for those who need it: most families don't

        return (delta_rule.by_mlx if self._delta_kernel else delta_rule.in_chunks)(self, q, k, v, gates, state)

    def gated_norm(self, *arguments: Any) -> mx.array:
        """`Ops.gated_norm`: one kernel for the norm, and one for the gate."""
        from runner.ops import gates  # for those who need it: most families don't

        return gates.gated_norm(self, *arguments)

    def gate(self, x: mx.array, gate: mx.array) -> mx.array:
        """`Ops.gate` as one kernel."""
        from runner.ops import gates  # for those who need it: most families don't

        return self(gates.opened, x, gate)

    def route(self, logits: mx.array, correction: mx.array | None, how: Routing) -> tuple[mx.array, mx.array]:
        """`Ops.route` with one kernel for the routing weights."""
        from runner.ops import routing  # for those who need it: most families don't

        return routing.route(self, logits, correction, how)

    def mixture(self, outputs: mx.array, weights: mx.array) -> mx.array:
        """`Ops.mixture`: one kernel for the products, and one for their sums."""
        from runner.ops import routing  # for those who need it: most families don't

        return routing.mixture(self, outputs, weights)

    def add_gated(self, routed: mx.array, gate: mx.array, shared: mx.array) -> mx.array:
        """`Ops.add_gated` as one kernel."""
        from runner.ops import gates  # for those who need it: most families don't

        return self(gates.add_gated, routed, gate, shared)

    def clamped_glu(self, gate_up: mx.array, alpha: float, limit: float) -> mx.array:
        """`Ops.clamped_glu` as one kernel."""
        from runner.ops import gates  # for those who need it: most families don't

        return self(gates.clamped, *mx.split(gate_up, 2, axis=-1), alpha, limit)


def fusing(ops: Ops, *, delta_kernel: bool) -> Ops:
    """The table `ops` for a GPU: activations, and what layers pass to `Ops.fused`, in one kernel each; rows of packed
    tables without the padding that MLX's CPU needs.

    Args:
        delta_kernel: whether MLX 0.32.4's gated delta rule has a kernel there, and is not a dozen operations a token.
    """
    fusion = Fusion(delta_kernel=delta_kernel)
    return dataclasses.replace(
        ops,
        fused=fusion,
        attention=functools.partial(attention.attention, fusion),
        attention_rows=functools.partial(side_by_side.attention_rows, fusion),
        glu=fusion.glu,
        activate=fusion.activate,
        short_conv=fusion.short_conv,
        state_space=fusion.state_space,
        gated_delta=fusion.gated_delta,
        gated_norm=fusion.gated_norm,
        gate=fusion.gate,
        add_gated=fusion.add_gated,
        clamped_glu=fusion.clamped_glu,
        route=fusion.route,
        mixture=fusion.mixture,
        quantized_embed=unpacked_rows,
    )
