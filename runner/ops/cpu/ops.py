"""The operations for CPUs where the extension is built: its kernels, or MLX for arguments that they do not take."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from runner.cache.kv import History
from runner.cache.recurrent import Slots, Stepped
from runner.cache.storage import HEADER_ROWS, SCALE_COLUMNS, Powers, Storage, unpacked
from runner.config.activations import ACTIVATIONS
from runner.ops import cpu as kernels
from runner.ops.cpu import _C
from runner.ops.gates import gated
from runner.ops.quantized import QuantizedWeight
from runner.ops.table import PORTABLE, Ops, Recorder, Taps

if TYPE_CHECKING:
    from runner.ops.delta_rule import Gates, Recurrence
    from runner.ops.routing import Routing
    from runner.ops.selective import Selective
    from runner.ops.state_space import Dynamics, Scanned

_PACKED = (2, 3, 4, 5, 6, 8)
_GROUPS = (32, 64, 128)
_IDS = (mx.int32, mx.uint32)
_SMALL_FLOATS = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


def _quantized_linear(x: mx.array, matrix: QuantizedWeight, bias: mx.array | None, *, int8: bool = False) -> mx.array:
    """A kernel for the quantized forms that have one, else a product with the dequantized matrix."""
    weight, scales, biases, group_size, bits, mode = matrix
    if mode == "affine" and biases is not None and bits in _PACKED and group_size in _GROUPS:
        return _C.quantized_linear(x, weight, scales, biases, bias, group_size, bits, int8)
    if _SMALL_FLOATS.get(mode) == (bits, group_size) and biases is None:
        return _C.small_float_linear(x, weight, scales, bias, mode, int8)
    return _C.linear(x, matrix.dequantize(), bias)


def _gather_linear(
    x: mx.array, weight: mx.array, experts: mx.array, bias: mx.array | None = None, *, sorted_indices: bool = False
) -> mx.array:
    return _C.gather_linear(x, weight, experts, bias)


def _gather_quantized_linear(
    x: mx.array,
    matrices: QuantizedWeight,
    experts: mx.array,
    bias: mx.array | None = None,
    *,
    sorted_indices: bool = False,
    int8: bool = False,
) -> mx.array:
    weight, scales, biases, group_size, bits, mode = matrices
    return _C.gather_quantized_linear(x, weight, scales, biases, experts, bias, group_size, bits, mode, int8)


def _route(logits: mx.array, correction: mx.array | None, how: Routing) -> tuple[mx.array, mx.array]:
    correction = None if correction is None else correction.reshape(-1)
    return _C.route(
        logits, correction, how.chosen, how.scoring == "sigmoid", how.groups, how.kept, how.members, how.normalized,
        how.eps, how.factor,
    )  # fmt: skip


def _embed(ids: mx.array, weight: mx.array, dtype: mx.Dtype | None) -> mx.array:
    return _C.embed(ids, weight, dtype or weight.dtype) if ids.dtype in _IDS else PORTABLE.embed(ids, weight, dtype)


def _quantized_embed(ids: mx.array, table: QuantizedWeight, dtype: mx.Dtype | None) -> mx.array:
    weight, scales, biases, group_size, bits, mode = table
    if mode == "affine" and biases is not None and bits in _PACKED and group_size in _GROUPS and ids.dtype in _IDS:
        return _C.quantized_embed(ids, weight, scales, biases, group_size, bits, dtype or scales.dtype)
    return PORTABLE.quantized_embed(ids, table, dtype)


def _empty(rows: mx.array, capacity: int, powers: mx.array | None = None) -> mx.array:
    """Make a buffer for rows of the same dtype, without the zeros that nothing reads: 35 MB for 512 of SmolLM2-135M."""
    return _C.empty((*rows.shape[:2], capacity, rows.shape[3]), rows.dtype)


def _dense(rows: mx.array, capacity: int, powers: mx.array | None = None) -> mx.array:
    """Make a buffer that keeps float32 rows as int16 with a scale each: half the bytes that every later token reads.

    The error is at most 2^-16 of a row's largest magnitude, after channels that stand out are divided down to the
    others by their powers. float16 would be off by up to 2^-11 of each value, which on SmolLM2-135M moves logits by
    2e-3 of their standard deviation.
    """
    if rows.dtype != mx.float32:
        return _empty(rows, capacity)
    batch, heads, _, width = rows.shape
    header = mx.zeros((heads, width), dtype=mx.int16) if powers is None else powers
    return _C.empty((batch, heads, capacity + HEADER_ROWS, width + SCALE_COLUMNS), mx.int16, header)


def _powers(keys: mx.array, values: mx.array) -> Powers:
    """0 but for channels of more than twice the median channel's magnitude, which are divided down to that.

    So these few don't take the codes of all others. RoPE may turn a key's channel that stands out into the other half
    of its pair later, or never: half its power costs little there in either case.
    """
    found = _standing_out(keys)
    halves = (mx.roll(found, found.shape[1] // 2, 1) + 1) // 2
    return mx.maximum(found, halves).astype(mx.int16), _standing_out(values).astype(mx.int16)


def _standing_out(rows: mx.array) -> mx.array:
    """Int32 `[KV, D]`: how often each channel's largest magnitude must be halved to be at most twice the median one."""
    size = mx.abs(rows.astype(mx.float32))
    most = mx.max(mx.where(size < mx.inf, size, 0), axis=(0, 2))
    limit = 2 * mx.sort(most, axis=-1)[:, most.shape[1] // 2, None]
    halvings = mx.ceil(mx.log2(most / mx.maximum(limit, 1e-30)))
    return mx.where(limit > 0, mx.clip(halvings, 0, MOST_HALVINGS), 0).astype(mx.int32)


MOST_HALVINGS = 60
"""The largest power of a channel: its square still is a float32."""


def _attention_rows(
    query: mx.array,
    histories: Sequence[History],
    counts: Sequence[int],
    *,
    scale: float,
    sinks: mx.array | None = None,
    softcap: float | None = None,
) -> mx.array:
    seen = [
        (h.stored_keys, h.stored_values, h.length, h.window or 0, h.chunk or 0, h.start)
        if h.split is None
        else (h.keys, h.values, h.length, h.window or 0, h.chunk or 0, h.start)
        for h in histories
    ]
    return _C.attention_rows(query, seen, list(counts), scale=scale, sinks=sinks, softcap=softcap)


_ACTIVATIONS: dict[str, kernels.Activation] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_approx",
    "relu": "relu",
    "relu2": "relu2",
}
"""The kernels' names for activations that `runner.config.activations` lists; others have no kernel."""


def _glu(gate_up: mx.array, activation: str) -> mx.array:
    kernel = _ACTIVATIONS.get(ACTIVATIONS[activation])
    if kernel is not None:
        return _C.glu(gate_up, kernel)
    return PORTABLE.glu(gate_up, activation)


def _activate(x: mx.array, activation: str) -> mx.array:
    kernel = _ACTIVATIONS.get(ACTIVATIONS[activation])
    if kernel is not None:
        return _C.activate(x, kernel)
    return PORTABLE.activate(x, activation)


def _gated(x: mx.array, gate: mx.array) -> mx.array:
    """`gates.gated`, of whose operations a step can be recorded."""
    return x * _C.activate(gate, "silu") if _wide(x, gate) else gated(x, gate)


_FUSED: dict[Callable[..., mx.array], Callable[..., mx.array]] = {gated: _gated}


def _fused(function: Callable[..., mx.array], *arguments: Any) -> mx.array:
    return _FUSED.get(function, function)(*arguments)


def _short_conv(
    x: mx.array, rows: mx.array, weight: mx.array, bias: mx.array | None, activation: str | None
) -> mx.array:
    if _wide(x, rows) and activation in _CONV:
        return _C.short_conv(x, rows, weight, bias, activation)
    return PORTABLE.short_conv(x, rows, weight, bias, activation)


def _gated_delta(q: mx.array, k: mx.array, v: mx.array, gates: Gates, state: mx.array) -> Recurrence:
    if _wide(q, k, v, gates.a, gates.b):
        return _C.gated_delta(q, k, v, gates.a, gates.b, gates.a_log, gates.dt_bias, state)
    return PORTABLE.gated_delta(q, k, v, gates, state)


def _delta_step(
    slots: Slots, at: Sequence[int], mixed: mx.array, taps: Taps, gates: Gates, key_heads: int
) -> Stepped | None:
    if not _wide(mixed, gates.a, gates.b) or taps.activation not in _CONV:
        return None
    buffers = slots()
    *moved, out = _C.recurrent_step(
        _each(buffers, "conv"), _each(buffers, "delta"), at, mixed, *taps, gates.a, gates.b, gates.a_log,
        gates.dt_bias, None, key_heads, 0.0, 0.0,
    )  # fmt: skip
    return out, {"conv": moved[: len(at)], "delta": moved[len(at) :]}


def _state_space(mixed: mx.array, dt: mx.array, dynamics: Dynamics, state: mx.array) -> Scanned:
    if not _wide(mixed, dt):
        return PORTABLE.state_space(mixed, dt, dynamics, state)
    out, after = _C.state_space(
        mixed, dt, dynamics.a_log, dynamics.d, dynamics.dt_bias, state, dynamics.groups, *dynamics.limits
    )
    return out.flatten(2), after


def _space_step(
    slots: Slots, at: Sequence[int], mixed: mx.array, dt: mx.array, taps: Taps, dynamics: Dynamics
) -> Stepped | None:
    if not _wide(mixed, dt) or taps.activation not in _CONV:
        return None
    buffers = slots()
    *moved, out = _C.recurrent_step(
        _each(buffers, "conv"), _each(buffers, "states"), at, mixed, *taps, dt, None, dynamics.a_log, dynamics.dt_bias,
        dynamics.d, dynamics.groups, *dynamics.limits,
    )  # fmt: skip
    return out.flatten(2), {"conv": moved[: len(at)], "states": moved[len(at) :]}


def _selective_scan(told: Selective, state: mx.array) -> tuple[mx.array, mx.array]:
    if not _wide(*told):
        return PORTABLE.selective_scan(told, state)
    return _C.selective_scan(*told, state)


def _selective_step(slots: Slots, at: Sequence[int], told: Selective) -> Stepped | None:
    if not _wide(*told):
        return None
    *moved, out = _C.selective_step(_each(slots(), "states"), at, *told)
    return out, {"states": moved}


def _conv_step(slots: Slots, at: Sequence[int], x: mx.array, taps: Taps) -> Stepped | None:
    if not _wide(x) or taps.activation not in _CONV:
        return None
    *moved, out = _C.conv_step(_each(slots(), "conv"), at, x, *taps)
    return out, {"conv": moved}


def _each(buffers: Sequence[Mapping[str, mx.array]], name: str) -> list[mx.array]:
    return [own[name] for own in buffers]


def _gated_norm(x: mx.array, gate: mx.array, weight: mx.array, eps: float, groups: int, gate_first: bool) -> mx.array:
    kernel = _C.gated_norm if _wide(x, gate) and x.ndim == 3 else PORTABLE.gated_norm
    return kernel(x, gate, weight, eps, groups, gate_first)


def _gate(x: mx.array, gate: mx.array) -> mx.array:
    return (_C.gate if _wide(x, gate) else PORTABLE.gate)(x, gate)


def _add_gated(routed: mx.array, gate: mx.array, shared: mx.array) -> mx.array:
    if not _wide(routed, gate, shared) or shared.ndim != 3:
        return PORTABLE.add_gated(routed, gate, shared)
    whole = mx.broadcast_to(gate, shared.shape)
    return routed + mx.squeeze(_C.gate(mx.expand_dims(shared, 1), mx.expand_dims(whole, 1)), 1)


def _masked(logits: mx.array, bits: mx.array) -> mx.array:
    return (_C.masked if _wide(logits) else PORTABLE.masked)(logits, bits)


_CONV = (None, "silu")
"""Activations that the kernel for short convolutions has."""


def _wide(*arrays: mx.array) -> bool:
    """Whether all are float32, the only numbers that the kernels of recurrent layers take."""
    return all(array.dtype == mx.float32 for array in arrays)


KERNELS = Ops(
    name="cpu kernels",
    linear=_C.linear,
    linear_each=_C.linear_each,
    quantized_linear=_quantized_linear,
    embed=_embed,
    quantized_embed=_quantized_embed,
    rms_norm=_C.rms_norm,
    add_rms_norm=_C.add_rms_norm,
    layer_norm=_C.layer_norm,
    rope=_C.rope,
    attention_rows=_attention_rows,
    append_rows=_C.append_rows,
    attention=_C.attention,
    glu=_glu,
    activate=_activate,
    short_conv=_short_conv,
    gated_delta=_gated_delta,
    delta_step=_delta_step,
    space_step=_space_step,
    conv_step=_conv_step,
    fused=_fused,
    selective_scan=_selective_scan,
    selective_step=_selective_step,
    state_space=_state_space,
    gated_norm=_gated_norm,
    gate=_gate,
    add_gated=_add_gated,
    clamped_glu=_C.clamped_glu,
    window_mask=None,  # the kernel skips the keys before a window
    argmax=_C.argmax,
    greatest=_C.greatest,
    draw=_C.draw,
    log_probabilities=_C.log_probabilities,
    masked=_masked,
    schedule=kernels.schedule,
    recorder=Recorder(_C.slot, _C.record),
    one_form=True,
    gather_linear=_gather_linear,
    gather_quantized_linear=_gather_quantized_linear,
    gathers_by_expert=True,
    route=_route,
    mixture=_C.mixture,
    storage=Storage(_empty, _C.append, unpacked, write_rows=_C.append_rows),
)
"""The operations over `runner.ops.cpu`; those without a kernel are plain MLX."""

INT8 = dataclasses.replace(
    KERNELS,
    name="cpu kernels, int8 activations",
    quantized_linear=functools.partial(_quantized_linear, int8=True),
    gather_quantized_linear=functools.partial(_gather_quantized_linear, int8=True),
)
"""`KERNELS` for `activations="int8"`: quantized layers, experts and the head round what they multiply to 8 bits.

That is, where the weights are integers with scales. Sums of a group are exact, as with 16 bits, so that a row still has
the same bits whatever stands beside it.
"""

DENSE = Storage(_dense, _C.append, unpacked, powers=_powers, write_rows=_C.append_rows)
"""Storage that halves float32 caches; logits move by less than 1e-3 of their standard deviation.

Measured on SmolLM2-135M, over all logits of 300 tokens: 1.0e-4 in the root mean square, 7.6e-4 at worst, and the same
with one or three channels of keys and values made 100 or 1,000 times as large, as models have them (with one scale for
all channels, these took it to 3.7e-2 and 0.3). A channel that stands out must do so among the tokens that are fed
first: one that grows later takes codes from the others.
"""
