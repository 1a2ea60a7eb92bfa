"""The table of operations that a device computes a model with, and the portable table over `mx.fast`.

A table is chosen when a model is loaded, and the weight walker hands it to each layer; a layer calls
`self.ops.linear(x, weight, bias)` and never learns which table it got. `PORTABLE` is plain MLX, right on every backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import mlx.core as mx

from runner.cache.recurrent import Slots, Stepped
from runner.cache.storage import PLAIN, Storage
from runner.config.activations import ACTIVATIONS as NAMES
from runner.ops import attention as attending
from runner.ops import picking, side_by_side
from runner.ops.picking import Draw
from runner.ops.quantized import QuantizedWeight

if TYPE_CHECKING:
    from runner.ops.delta_rule import Gates, Recurrence
    from runner.ops.routing import Routing
    from runner.ops.selective import Selective
    from runner.ops.state_space import Dynamics, Scanned


def _silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


def _gelu(x: mx.array) -> mx.array:
    return x * (1 + mx.erf(x / 2**0.5)) / 2


def _gelu_tanh(x: mx.array) -> mx.array:
    # (1 + tanh(y)) / 2 is sigmoid(2 y). Written so that MLX, which fuses chains of up to 11 steps, makes one
    # kernel of it, and of a GLU with it.
    twice = 2 * (2 / mx.pi) ** 0.5
    return x * mx.sigmoid(twice * x + (twice * 0.044715 * x) * (x * x))


ACTIVATIONS: Mapping[str, Callable[[mx.array], mx.array]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: mx.maximum(x, 0),
    "relu2": lambda x: mx.square(mx.maximum(x, 0)),
}
"""The activation functions, by the names in `runner.config.activations`."""


def _linear(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)


def _linear_each(x: mx.array, weight: mx.array) -> mx.array:
    return x @ weight.swapaxes(-1, -2)


def _quantized_linear(x: mx.array, matrix: QuantizedWeight, bias: mx.array | None) -> mx.array:
    weight, scales, biases, group_size, bits, mode = matrix
    y = mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=group_size, bits=bits, mode=mode)
    return y if bias is None else y + bias


def _embed(ids: mx.array, weight: mx.array, dtype: mx.Dtype | None) -> mx.array:
    rows = weight[ids]
    return rows if dtype is None else rows.astype(dtype)


def _quantized_embed(ids: mx.array, table: QuantizedWeight, dtype: mx.Dtype | None) -> mx.array:
    if table.mode == "nvfp4" and ids.size % 4:  # MLX's CPU decodes these scales four at a time and refuses a remainder
        padded = mx.concatenate([ids.flatten(), mx.zeros(-ids.size % 4, ids.dtype)])
        return unpacked_rows(padded, table, dtype)[: ids.size].reshape(*ids.shape, -1)
    return unpacked_rows(ids, table, dtype)


def unpacked_rows(ids: mx.array, table: QuantizedWeight, dtype: mx.Dtype | None) -> mx.array:
    """The rows `ids` of a packed table as numbers: `Ops.quantized_embed` of devices that take any number of rows."""
    found = table.rows(ids)
    # Affine rows are computed in the dtype of their scales: convert these, so that rows are rounded once.
    if dtype is not None and found.biases is not None:
        found = found._replace(scales=found.scales.astype(dtype), biases=found.biases.astype(dtype))
    rows = found.dequantize()
    return rows if dtype is None else rows.astype(dtype)


def _rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    return mx.fast.rms_norm(x, weight, eps).astype(x.dtype)  # MLX gives a float32 weight's dtype to the result


def _add_rms_norm(x: mx.array, residual: mx.array, weight: mx.array | None, eps: float) -> tuple[mx.array, mx.array]:
    total = x + residual
    return total, _rms_norm(total, weight, eps)


def _layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    return mx.fast.layer_norm(x, weight, bias, eps).astype(x.dtype)


def _fused(function: Callable[..., mx.array], *arguments: Any) -> mx.array:
    return function(*arguments)


_attention = functools.partial(attending.attention, _fused)
_attention_rows = functools.partial(side_by_side.attention_rows, _fused)


def _rope(
    x: mx.array,
    offset: int | mx.array | tuple[int, ...],
    *,
    dims: int,
    traditional: bool,
    base: float | None,
    scale: float,
    freqs: Any,
) -> mx.array:
    if isinstance(offset, tuple):
        return side_by_side.rope(
            _rope, x, offset, dims=dims, traditional=traditional, base=base, scale=scale, freqs=freqs
        )
    return mx.fast.rope(x, dims, traditional=traditional, base=base, scale=scale, offset=offset, freqs=freqs)


def _glu_of(act: Callable[[mx.array], mx.array], gate: mx.array, up: mx.array) -> mx.array:
    return act(gate) * up


GATES: Mapping[str, Callable[[mx.array, mx.array], mx.array]] = {
    name: functools.partial(_glu_of, act) for name, act in ACTIVATIONS.items()
}
"""`act(gate) * up` for each activation function, as functions that stay the same: `Ops.fused` knows them again."""


def _glu(gate_up: mx.array, activation: str) -> mx.array:
    return GATES[NAMES[activation]](*mx.split(gate_up, 2, axis=-1))


def _activate(x: mx.array, activation: str) -> mx.array:
    return ACTIVATIONS[NAMES[activation]](x)


def _short_conv(
    x: mx.array, rows: mx.array, weight: mx.array, bias: mx.array | None, activation: str | None
) -> mx.array:
    return convolved(_fused, x, rows, weight, bias, activation)


def _selective_scan(told: Selective, state: mx.array) -> tuple[mx.array, mx.array]:
    from runner.ops import selective

    return selective.token_by_token(_fused, told, state)


def _state_space(mixed: mx.array, dt: mx.array, dynamics: Dynamics, state: mx.array) -> Scanned:
    from runner.ops import state_space  # for those who need it: most families don't

    return state_space.token_by_token(_fused, mixed, dt, dynamics, state)


def _gated_delta(q: mx.array, k: mx.array, v: mx.array, gates: Gates, state: mx.array) -> Recurrence:
    from runner.ops import delta_rule  # for those who need it: most families don't

    return delta_rule.token_by_token(_fused, q, k, v, gates, state)


def _gated_norm(x: mx.array, gate: mx.array, weight: mx.array, eps: float, groups: int, gate_first: bool) -> mx.array:
    from runner.ops import gates  # for those who need it: most families don't

    return gates.gated_norm(_fused, x, gate, weight, eps, groups, gate_first)


def _gate(x: mx.array, gate: mx.array) -> mx.array:
    from runner.ops import gates  # for those who need it: most families don't

    return gates.opened(x, gate)


def _add_gated(routed: mx.array, gate: mx.array, shared: mx.array) -> mx.array:
    from runner.ops import gates  # for those who need it: most families don't

    return gates.add_gated(routed, gate, shared)


def _clamped_glu(gate_up: mx.array, alpha: float, limit: float) -> mx.array:
    from runner.ops import gates  # for those who need it: most families don't

    gate, up = mx.split(gate_up, 2, axis=-1)
    return gates.clamped(gate, up, alpha, limit)


def convolved(
    fused: Callable[..., mx.array],
    x: mx.array,
    rows: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    activation: str | None,
) -> mx.array:
    """`Ops.short_conv` for a device that computes functions element by element with `fused`."""
    taps, length = weight.shape[0], x.shape[1]
    both = mx.concatenate([rows, x], axis=1)
    inputs = [both[:, tap : tap + length] for tap in range(taps)]
    weights = [weight[tap] for tap in range(taps)]
    total = fused(tapped, *inputs, *weights) if bias is None else fused(tapped_from, bias, *inputs, *weights)
    if activation is not None:
        total = fused(ACTIVATIONS[NAMES[activation]], total)
    return total.astype(x.dtype)


def tapped(*inputs_and_weights: mx.array) -> mx.array:
    """The sum of products of the inputs and as many weights behind them, in float32 and in their order."""
    taps = len(inputs_and_weights) // 2
    total = inputs_and_weights[0].astype(mx.float32) * inputs_and_weights[taps]
    for tap in range(1, taps):
        total = total + inputs_and_weights[tap].astype(mx.float32) * inputs_and_weights[taps + tap]
    return total


def tapped_from(bias: mx.array, *inputs_and_weights: mx.array) -> mx.array:
    """`tapped`, plus a bias."""
    return tapped(*inputs_and_weights) + bias


def _gather_linear(
    x: mx.array, weight: mx.array, experts: mx.array, bias: mx.array | None = None, *, sorted_indices: bool = False
) -> mx.array:
    matrices = weight.swapaxes(-1, -2).astype(x.dtype)
    return biased(mx.gather_mm(x, matrices, rhs_indices=experts, sorted_indices=sorted_indices), bias, experts)


def _gather_quantized_linear(
    x: mx.array,
    matrices: QuantizedWeight,
    experts: mx.array,
    bias: mx.array | None = None,
    *,
    sorted_indices: bool = False,
) -> mx.array:
    weight, scales, biases, group_size, bits, mode = matrices
    y = mx.gather_qmm(
        x,
        weight,
        scales,
        biases,
        rhs_indices=experts,
        transpose=True,
        sorted_indices=sorted_indices,
        group_size=group_size,
        bits=bits,
        mode=mode,
    )
    return biased(y, bias, experts)


def biased(y: mx.array, bias: mx.array | None, experts: mx.array) -> mx.array:
    """Products y `[..., 1, out]` with matrices of `experts` `[...]`, plus the experts' bias `[E, out]`."""
    return y if bias is None else y + bias[experts][..., None, :].astype(y.dtype)


def _route(logits: mx.array, correction: mx.array | None, how: Routing) -> tuple[mx.array, mx.array]:
    from runner.ops import routing  # for those who need it: most families don't

    return routing.route(_fused, logits, correction, how)


def _mixture(outputs: mx.array, weights: mx.array) -> mx.array:
    from runner.ops import routing  # for those who need it: most families don't

    return routing.mixture(_fused, outputs, weights)


def _take_rows(x: mx.array, ids: mx.array) -> mx.array:
    return x[ids]


def _put_rows(x: mx.array, ids: mx.array) -> mx.array:
    # Sorting an order gives its inverse.
    return x[mx.argsort(ids)]


def _argmax(x: mx.array) -> mx.array:
    return mx.argmax(x, axis=-1)


class Outline(Protocol):
    """What a recorded step does, whatever caches it does it over.

    `record(slot, output, caches, count)` makes a program for `count` tokens of the step's graph over other caches. None
    where that differs in more than caches and positions. Positions advance as in the first recording: that they do so
    for all of `count` is for the caller to know. `same_as` says whether another is of the same step, whose positions
    advance alike.
    """

    def record(self, slot: mx.array, output: mx.array, caches: list[mx.array], count: int) -> Program | None: ...
    def same_as(self, other: Any, /) -> bool: ...


class Program(Protocol):
    """A recorded step: `run(token)` starts it for the next token, int32 or uint32 `[B, 1]`."""

    def run(self, token: mx.array) -> mx.array: ...
    @property
    def outline(self) -> Outline: ...


@dataclass(frozen=True)
class Recorder:
    """Records a step, to run it again without building its graph; see `runner.engine.replay`.

    Attributes:
        slot: `slot(shape)` makes ids that stand for any token.
        record: `record(slot, outputs, ahead, caches)` makes a program from graphs of the step over `slot` and the
            arrays `caches`: `outputs[i]` is its result `ahead[i]` positions after the first. None where the graphs
            differ in more than positions.
    """

    slot: Callable[[list[int]], mx.array]
    record: Callable[[mx.array, list[mx.array], list[int], list[mx.array]], Program | None]


class Taps(NamedTuple):
    """A short convolution: weight `[taps, C]`, bias `[C]`, and the activation of what comes out, each None for none."""

    weight: mx.array
    bias: mx.array | None
    activation: str | None


def _no_step(*arguments: Any) -> Stepped | None:
    return None


def _no_attention_step(*arguments: Any, **how: Any) -> mx.array | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Ops:
    """The operations for a device. Each entry has the signature of `PORTABLE`'s and, within rounding, the same result.

    `glu(gate_up, activation)` and `activate(x, activation)` take `hidden_act`'s names; `attention` gets `mask` as
    an array, "causal" (aligned to the last key) or None for all keys, may read `key` and `value` where they lie,
    and takes their first `length` rows (None: all), the first of which has the position `start`, in whatever form
    `storage` keeps them; `softcap` c makes a score `c * tanh(score / c)` before the mask. `attention_rows` and
    `append_rows` are attention and a cache's `write` for the newest tokens of several sequences side by side
    (`runner.ops.side_by_side`); `rope` takes a tuple of T positions for their queries and keys `[1, H, T, D]`, one
    for each token. `schedule(*arrays)` starts computing the arrays, as `mx.async_eval` does; from so many
    tokens of a pass on as `eager` says, layers are begun so while later ones are still built. `fused(function,
    *arguments)` is `function(*arguments)`, where the device can in one kernel: the function stands at the top of a
    module and works element by element. `window_mask` makes the array that `attention` gets as the mask of several
    queries under a window; None: it gets the window and no array. `short_conv(x, rows, weight, bias, activation)`
    convolves each channel of `x` `[B, L, C]`, behind `rows` `[B, taps - 1, C]`, with its `weight` `[taps, C]`, in
    float32. `selective_scan(told, state)` is the recurrence of Mamba, from a state `[B, C, N]`: outputs `[B, L, C]` and
    the state behind them, in float32. `state_space(mixed, dt, dynamics, state)` is Mamba 2's over x, B and C side by
    side, `mixed` `[B, L, H * P + 2 * groups * N]`, and steps `dt` `[B, L, H]`, from a state `[B, H, P, N]` in float32.
    `gated_delta(q, k, v, gates, state)` applies the gated delta rule to queries and keys `[B, L, key heads, dk]` of
    any length, values `[B, L, heads, dv]` and `gates`, from a state `[B, heads, dv, dk]` in float32. `gated_norm(x,
    gate, weight, eps, groups, gate_first)` normalizes `groups` parts of `x` `[B, L, C]`, each by itself, and
    multiplies by SiLU of the gate before or after that. `gate(x, gate)` is `x` times the sigmoid of its gate, both
    `[B, H, L, D]`. `add_gated(routed, gate, shared)` is `routed` plus `shared`, both `[..., D]`, times the sigmoid of a
    gate `[..., 1]`. `clamped_glu(gate_up, alpha, limit)` is gpt-oss's `gate * sigmoid(alpha * gate) * (up + 1)`, with
    the gate held below `limit`, and up to both sides of it.

    `attention_step(query, new, counts, steps, scale=, sinks=, softcap=)` is `append_rows` and `attention_rows` at once
    for what is `new` (`runner.cache.several.New`); `steps` says which sequences have one decoded token. None, with
    nothing written: the device has no such step for these.

    `linear_each(x, weight)` is a product for each of G groups, of x `[G, M, K]` and weight `[G, N, K]`: `[G, M, N]`.
    With `one_form`, what a token gets is the same bits however many tokens stand beside it: layers that could compute
    it in several ways must take one of them for any number of tokens.

    `gather_linear(x, weight, experts, bias, sorted_indices=False)` and `gather_quantized_linear`, whose `weight` is a
    `QuantizedWeight`, are products with a matrix of a stack `[E, out, in]` for each row: x `[..., 1, in]`, whose
    leading dimensions broadcast to those of `experts` `[...]`, to `[..., 1, out]`, with a bias `[E, out]`. With
    `gathers_by_expert` they bring the rows of an expert together by themselves, so that nobody needs to sort them.
    `route(logits, correction, how)` chooses experts `[..., count]` by the router's logits `[..., E]` and a correction
    `[E]` of their scores, in float32, and gives them routing weights (`runner.ops.routing`); `mixture(outputs,
    weights)` is the weighted sum of outputs `[..., count, D]`. `take_rows(x, ids)` are the rows `ids` `[N]` of x
    `[R, ..]`; `put_rows(x, ids)` puts each row of x `[N, ..]` to its place of `ids`, which are all of 0 to N - 1.

    A step moves states in place by one token of each of N sequences, `[1, N, ..]`, or of B that go in step and share
    their buffers, `[B, 1, ..]`: `delta_step(slots, at, mixed, taps, gates, key_heads)` convolves and then applies the
    delta rule, with the i-th one's states before its token `at[i]` in slot `at[i] % 2` of the i-th buffers "conv" and
    "delta" that `slots()` makes. It returns what is put out, and all buffers; None where the device has no such step.
    In the same way, `space_step(slots, at, mixed, dt, taps, dynamics)` applies Mamba 2's recurrence to the buffers
    "conv" and "states", and `conv_step(slots, at, x, taps)` only convolves; `selective_step(slots, at, told)` moves
    Mamba's "states". A sequence's bits are those it has alone.
    """

    name: str
    linear: Callable[[mx.array, mx.array, mx.array | None], mx.array] = _linear
    linear_each: Callable[[mx.array, mx.array], mx.array] = _linear_each
    quantized_linear: Callable[[mx.array, QuantizedWeight, mx.array | None], mx.array] = _quantized_linear
    embed: Callable[[mx.array, mx.array, mx.Dtype | None], mx.array] = _embed
    quantized_embed: Callable[[mx.array, QuantizedWeight, mx.Dtype | None], mx.array] = _quantized_embed
    rms_norm: Callable[[mx.array, mx.array | None, float], mx.array] = _rms_norm
    add_rms_norm: Callable[[mx.array, mx.array, mx.array | None, float], tuple[mx.array, mx.array]] = _add_rms_norm
    layer_norm: Callable[[mx.array, mx.array | None, mx.array | None, float], mx.array] = _layer_norm
    rope: Callable[..., mx.array] = _rope
    attention: Callable[..., mx.array] = _attention
    attention_rows: Callable[..., mx.array] = _attention_rows
    attention_step: Callable[..., mx.array | None] = _no_attention_step
    append_rows: Callable[..., list[side_by_side.Buffers]] = side_by_side.append_rows
    glu: Callable[[mx.array, str], mx.array] = _glu
    activate: Callable[[mx.array, str], mx.array] = _activate
    fused: Callable[..., mx.array] = _fused
    short_conv: Callable[..., mx.array] = _short_conv
    state_space: Callable[[mx.array, mx.array, Dynamics, mx.array], Scanned] = _state_space
    selective_scan: Callable[[Selective, mx.array], tuple[mx.array, mx.array]] = _selective_scan
    gated_delta: Callable[[mx.array, mx.array, mx.array, Gates, mx.array], Recurrence] = _gated_delta
    delta_step: Callable[[Slots, Sequence[int], mx.array, Taps, Gates, int], Stepped | None] = _no_step
    space_step: Callable[[Slots, Sequence[int], mx.array, mx.array, Taps, Dynamics], Stepped | None] = _no_step
    conv_step: Callable[[Slots, Sequence[int], mx.array, Taps], Stepped | None] = _no_step
    selective_step: Callable[[Slots, Sequence[int], Selective], Stepped | None] = _no_step
    gated_norm: Callable[[mx.array, mx.array, mx.array, float, int, bool], mx.array] = _gated_norm
    gate: Callable[[mx.array, mx.array], mx.array] = _gate
    add_gated: Callable[[mx.array, mx.array, mx.array], mx.array] = _add_gated
    clamped_glu: Callable[[mx.array, float, float], mx.array] = _clamped_glu
    window_mask: Callable[[int, int, int], mx.array] | None = attending.window_mask
    argmax: Callable[[mx.array], mx.array] = _argmax
    greatest: Callable[[mx.array], tuple[mx.array, mx.array]] = picking.greatest
    draw: Callable[[mx.array, Sequence[Draw]], tuple[mx.array, mx.array]] = picking.draw
    log_probabilities: Callable[[mx.array, mx.array, Sequence[int]], list[mx.array]] = picking.log_probabilities
    masked: Callable[[mx.array, mx.array], mx.array] = picking.masked
    schedule: Callable[..., None] = mx.async_eval
    eager: int | None = None
    recorder: Recorder | None = None
    one_form: bool = False
    gather_linear: Callable[..., mx.array] = _gather_linear
    gather_quantized_linear: Callable[..., mx.array] = _gather_quantized_linear
    gathers_by_expert: bool = False
    route: Callable[[mx.array, mx.array | None, Routing], tuple[mx.array, mx.array]] = _route
    mixture: Callable[[mx.array, mx.array], mx.array] = _mixture
    take_rows: Callable[[mx.array, mx.array], mx.array] = _take_rows
    put_rows: Callable[[mx.array, mx.array], mx.array] = _put_rows
    storage: Storage = PLAIN

    def __repr__(self) -> str:
        return f"Ops({self.name!r})"


PORTABLE = Ops(name="mlx")
"""Plain MLX for every operation."""
