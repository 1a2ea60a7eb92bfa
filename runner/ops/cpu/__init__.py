"""Fast CPU kernels: MLX primitives in a small C++ extension, for machines where MLX's own CPU backend is slow.

The extension (`_C`) is optional. `unavailable()` says whether it can be used; every other function needs it.
All functions return lazy arrays, compute in float32 and round once to the type of their first argument. They run on
the calling thread's default CPU stream, over one pool of threads shared by the process. None has gradients.

Shapes: B batch, H query heads, KV key/value heads, L new positions, S keys, D head size, I hidden size.
"float" below means float32, bfloat16 or float16. Wrong shapes or types raise ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import mlx.core as mx

from runner.errors import BackendError

from ._load import Unavailable, load_extension

if TYPE_CHECKING:
    from . import _C

__all__ = [
    "activate",
    "add_rms_norm",
    "append",
    "append_rows",
    "argmax",
    "attention",
    "attention_rows",
    "clamped_glu",
    "draw",
    "embed",
    "empty",
    "gate",
    "gated_delta",
    "gated_norm",
    "gather_linear",
    "gather_quantized_linear",
    "glu",
    "greatest",
    "isa",
    "layer_norm",
    "linear",
    "linear_each",
    "log_probabilities",
    "masked",
    "mixture",
    "num_threads",
    "quantized_embed",
    "quantized_linear",
    "read_seconds",
    "rms_norm",
    "rope",
    "route",
    "schedule",
    "short_conv",
    "small_float_linear",
    "state_space",
    "unavailable",
]

Activation = Literal["silu", "gelu", "gelu_approx", "relu", "relu2"]

if not TYPE_CHECKING:
    _C = load_extension()


def unavailable() -> Unavailable | None:
    """None if the extension works with the installed MLX, else the reason why not and the fix."""
    return _C if isinstance(_C, Unavailable) else None


def require() -> None:
    """Raise `BackendError` if the extension cannot be used."""
    why = unavailable()
    if why is not None:
        raise BackendError(str(why))


def num_threads() -> int:
    """Thread count of the kernels: RUNNER_NUM_THREADS, else the cores this process may use (affinity, cgroup quota)."""
    return _C.num_threads()


def isa() -> str:
    """The instruction set in use: "amx", "avx512", "avx2" or "scalar".

    RUNNER_KERNELS_ISA selects another that the CPU has; "none" loads no kernels. "amx" is "avx512" with AMX's products
    of bytes for the rows of prompts: the same bits, where Linux lets a process use them.
    """
    return _C.isa()


def read_seconds(size: int, passes: int) -> float:
    """Seconds that all threads take to read a buffer of `size` bytes, the fastest of `passes`: memory bandwidth."""
    return _C.read_seconds(size, passes)


def linear(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """x @ weight.T + bias, without a float32 copy of the weights.

    x float [..., in]; weight float [out, in]; bias float [out]. Returns [..., out] of x's type.
    """
    return _C.linear(x, weight, bias)


def linear_each(x: mx.array, weight: mx.array) -> mx.array:
    """A product for each of G groups: x float [G, M, K] @ weight float [G, N, K].T is [G, M, N], of x's type."""
    return _C.linear_each(x, weight)


def quantized_linear(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    bias: mx.array | None = None,
    *,
    group_size: int,
    bits: int,
    int8: bool = False,
) -> mx.array:
    """x @ dequantize(weight).T + bias for MLX's affine layout (`mx.quantize`): w = scale * q + shift per group.

    x float [..., in]; weight uint32 [out, in * bits / 32]; scales and biases (the shifts) one float type,
    [out, in / group_size]; bias float [out]; bits 2 to 6 or 8; group_size 32, 64 or 128. Returns [..., out] of
    x's type. On x86, x is rounded to integers of 16 bits with a scale per group, of 24 bits where a value stands out
    (over four times the row's root mean square); rows with NaN or infinity, and other CPUs, use floats. A row of the
    result depends on that row of x alone, as in `linear`: it has the same bits whatever stands beside it.

    With `int8`, x is rounded to integers from -127 to 127 with a scale per group, on any CPU: one product of bytes
    where it has those of AVX-512 VNNI, and an error of up to 1/254 of a group's largest value.
    """
    return _C.quantized_linear(x, weight, scales, biases, bias, group_size, bits, int8)


def small_float_linear(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    bias: mx.array | None = None,
    *,
    mode: str,
    int8: bool = False,
) -> mx.array:
    """x @ dequantize(weight).T + bias for matrices of small floats: `mx.quantize`'s modes mxfp4, mxfp8 and nvfp4.

    x float [..., in]; weight uint32 [out, in * bits / 32], bits 4, 8 and 4; scales uint8 [out, in / group], groups of
    32, 32 and 16; bias float [out]. Returns [..., out] of x's type. For mxfp4, x86 uses integers, as `quantized_linear`
    does, and `int8` means what it means there; mxfp8 and nvfp4 are multiplied in floats, whatever `int8` says.
    """
    return _C.small_float_linear(x, weight, scales, bias, mode, int8)


def gather_linear(x: mx.array, weight: mx.array, experts: mx.array, bias: mx.array | None = None) -> mx.array:
    """`linear` with a matrix of a stack for each row, which `experts` chooses: the same bits of each row.

    x float [..., 1, in], whose leading dimensions broadcast to those of `experts`, int32 or uint32; weight float
    [E, out, in]; bias float [E, out]. Returns [..., 1, out] of x's type: NaN where an expert is not one of the E.
    """
    return _C.gather_linear(x, weight, experts, bias)


def gather_quantized_linear(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    experts: mx.array,
    bias: mx.array | None = None,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
    int8: bool = False,
) -> mx.array:
    """`gather_linear` for stacks [E, ..] of what `quantized_linear` ("affine") and `small_float_linear` take."""
    return _C.gather_quantized_linear(x, weight, scales, biases, experts, bias, group_size, bits, mode, int8)


def route(
    logits: mx.array,
    correction: mx.array | None,
    *,
    count: int,
    sigmoid: bool = False,
    groups: int = 1,
    kept: int = 1,
    members: int = 1,
    normalized: bool = False,
    eps: float = 0.0,
    factor: float = 1.0,
) -> tuple[mx.array, mx.array]:
    """Choose experts by the router's logits: `runner.ops.routing.route`, the best first, the lower index on a tie.

    logits float32 [..., E]; correction float [E]. Returns uint32 and float32 [..., count]. A NaN counts as the best.
    """
    return _C.route(logits, correction, count, sigmoid, groups, kept, members, normalized, eps, factor)


def mixture(outputs: mx.array, weights: mx.array) -> mx.array:
    """Sum of outputs float [..., count, D] times weights float32 [..., count], one after the other: [..., D]."""
    return _C.mixture(outputs, weights)


def embed(ids: mx.array, weight: mx.array, dtype: mx.Dtype) -> mx.array:
    """weight[ids] in `dtype`: ids int32 or uint32 [...], weight float [V, dim]. Returns [..., dim].

    A negative id counts from the end; an id outside the table gives NaN.
    """
    return _C.embed(ids, weight, dtype)


def quantized_embed(
    ids: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    *,
    group_size: int,
    bits: int,
    dtype: mx.Dtype,
) -> mx.array:
    """`embed` from a quantized table, in the layout of `quantized_linear`'s weight."""
    return _C.quantized_embed(ids, weight, scales, biases, group_size, bits, dtype)


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. x float [..., dim], weight float [dim]."""
    return _C.rms_norm(x, weight, eps)


def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension. x float [..., dim]."""
    return _C.layer_norm(x, weight, bias, eps)


def add_rms_norm(x: mx.array, residual: mx.array, weight: mx.array | None, eps: float) -> tuple[mx.array, mx.array]:
    """(h, rms_norm(h, weight, eps)) for h = x + residual, rounded to their common type; both [..., dim]."""
    return _C.add_rms_norm(x, residual, weight, eps)


def rope(
    x: mx.array,
    offset: int | mx.array | tuple[int, ...],
    *,
    dims: int,
    traditional: bool = False,
    freqs: mx.array | None = None,
    base: float | None = None,
    scale: float = 1.0,
) -> mx.array:
    """Rotary position embedding with the meaning of `mx.fast.rope`.

    x float [B, H, L, D], any strides; offset: position of the first of the L, one for all or an integer array [B]; or,
    for a B of 1, a tuple with the position of each of the L. The first `dims` values are rotated in pairs, pair i by
    the angle (offset + l) * scale / freqs[i], with freqs [dims / 2] or base^(2 i / dims). Pairs are (i, i + dims / 2),
    or (2 i, 2 i + 1) if `traditional`. Returns [B, H, L, D], contiguous.
    """
    return _C.rope(x, offset, dims=dims, traditional=traditional, base=base, scale=scale, freqs=freqs)


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: Literal["causal"] | mx.array | None = None,
    window: int | None = None,
    sinks: mx.array | None = None,
    length: int | None = None,
    softcap: float | None = None,
    start: int = 0,
) -> mx.array:
    """Softmax attention with grouped heads; builds no L x S matrix and reads k and v where they lie.

    q float [B, H, L, D]; k [B, KV, S, D] and v [B, KV, S, DV] of one float type, H a multiple of KV; any strides, and
    no copy is made if the last dimension is contiguous. Both may be int16 [.., S + 1, D + 2] as `append` writes it;
    `length` is S where there are more rows. Query l has the position of key S - L + l: "causal" hides the keys after
    it, `window` also those before the last `window` keys up to it. An array mask broadcasts to [B, H, L, S]: bool
    (True = visible) or float (added to the scores). sinks float [H]: one more score per head, which takes its share of
    the softmax and adds nothing; softcap c makes a score c * tanh(score / c) before the mask. A query that sees no key
    gives zeros. Returns [B, H, L, DV] of q's type.

    What a query gets depends on itself, on the keys and values that it sees and on their positions alone, `start` being
    that of the first key: the same bits however many queries a call has, and whatever stands in rows that are hidden.
    """
    return _C.attention(
        q, k, v, mask, scale=scale, window=window, sinks=sinks, length=length, softcap=softcap, start=start
    )


def empty(shape: Sequence[int], dtype: mx.Dtype, powers: mx.array | None = None) -> mx.array:
    """Take memory for an array of `shape` whose numbers are whatever was there: for buffers that `append` fills.

    With `powers`, int16 [KV, D], they are put into the last row of a buffer int16 [B, KV, C + 1, D + 2].

    Raises:
        ValueError: a size is negative, or the powers don't fit.
    """
    return _C.empty(shape, dtype, powers)


def append(keys: mx.array, values: mx.array, k: mx.array, v: mx.array, at: int) -> tuple[mx.array, mx.array]:
    """Write k and v float [B, KV, L, D] into the rows from `at` on of keys and values [B, KV, C, ..], in place.

    A buffer is float [.., C, D], or int16 [.., C + 1, D + 2]: codes and, in the bytes of the last two, a float32 scale
    for the row's largest magnitude (NaN where the row holds NaN or infinity); value = code * scale * 2^power, with the
    powers of the D channels from the last row. A row's codes depend on nothing but itself and the powers. The results
    share the buffers' memory, even where others still hold the buffers: rows before `at` stay as they are.
    """
    return _C.append(keys, values, k, v, at)


def append_rows(
    buffers: Sequence[tuple[mx.array, mx.array]], k: mx.array, v: mx.array, at: Sequence[int], counts: Sequence[int]
) -> list[tuple[mx.array, mx.array]]:
    """`append` to several pairs of buffers: the i-th counts[i] rows of k and v to the i-th, from row at[i] on."""
    return _C.append_rows(buffers, k, v, at, counts)


def attention_rows(
    q: mx.array,
    histories: Sequence[tuple[mx.array, mx.array, int, int, int, int]],
    counts: Sequence[int],
    *,
    scale: float,
    sinks: mx.array | None = None,
    softcap: float | None = None,
) -> mx.array:
    """Causal attention of several sequences side by side: q float [1, H, T, D], the next counts[i] of the T for each.

    A history is (k, v, length, window, chunk, start) with what `attention` takes, 0 for no window or chunk; its queries
    have the last positions of its `length` keys. Returns [1, H, T, DV], the same bits as each gets alone.
    """
    return _C.attention_rows(q, histories, counts, scale=scale, sinks=sinks, softcap=softcap)


def short_conv(
    x: mx.array, rows: mx.array, weight: mx.array, bias: mx.array | None, activation: Literal["silu"] | None
) -> mx.array:
    """Convolve each channel with its last inputs: x float32 [B, L, C] behind rows float32 [B, taps - 1, C].

    weight float [taps, C], the tap of the oldest input first; bias float [C]. Returns float32 [B, L, C]. As in the two
    recurrences below, no number depends on how many tokens come at once.
    """
    return _C.short_conv(x, rows, weight, bias, activation)


def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    a_log: mx.array,
    dt_bias: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    """The gated delta rule (`runner.ops.delta_rule`), token by token.

    q and k float32 [B, L, groups, dk] of any length; v float32 [B, L, H, dv], H a multiple of the groups; b float32
    [B, L, H]; a the same or [B, L, H, dk]; a_log float [H]; dt_bias float [H] or [H, dk]; state float32 [B, H, dv, dk].
    Returns float32 [B, L, H, dv] and the new state.
    """
    return _C.gated_delta(q, k, v, a, b, a_log, dt_bias, state)


def state_space(
    mixed: mx.array,
    dt: mx.array,
    a_log: mx.array,
    d: mx.array,
    dt_bias: mx.array,
    state: mx.array,
    *,
    groups: int,
    limits: tuple[float, float],
) -> tuple[mx.array, mx.array]:
    """Mamba 2's recurrence (`runner.ops.state_space`), token by token.

    mixed float32 [B, L, H P + 2 groups N]; dt float32 [B, L, H]; a_log, d and dt_bias float [H]; state float32
    [B, H, P, N]. Returns float32 [B, L, H, P] and the new state.
    """
    return _C.state_space(mixed, dt, a_log, d, dt_bias, state, groups, *limits)


def gated_norm(
    x: mx.array, gate: mx.array, weight: mx.array, eps: float, *, groups: int = 1, gate_first: bool = False
) -> mx.array:
    """RMS norm of each of `groups` parts of x float32 [B, L, C], times SiLU of gate [B, L, C] before or after it.

    weight float [C], or [C / groups] for all parts. Returns float32 [B, L, C].
    """
    return _C.gated_norm(x, gate, weight, eps, groups, gate_first)


def gate(x: mx.array, gate: mx.array) -> mx.array:
    """x times the sigmoid of gate, both float32 [B, H, L, D]."""
    return _C.gate(x, gate)


def glu(gate_up: mx.array, activation: Activation = "silu") -> mx.array:
    """activation(gate) * up for gate_up float [..., 2 I] = gate then up. Returns [..., I].

    "gelu" is exact (erf, to 2e-7), "gelu_approx" the tanh form.
    """
    return _C.glu(gate_up, activation)


def clamped_glu(gate_up: mx.array, alpha: float, limit: float) -> mx.array:
    """gate * sigmoid(alpha * gate) * (up + 1) for gate_up as in `glu`: gate held below `limit`, up within +-limit."""
    return _C.clamped_glu(gate_up, alpha, limit)


def activate(x: mx.array, activation: Activation) -> mx.array:
    """activation(x), as in `glu`, for x float [..., I]."""
    return _C.activate(x, activation)


def argmax(x: mx.array) -> mx.array:
    """Index (uint32) of the largest value along the last dimension, the lowest index on a tie. NaN never wins."""
    return _C.argmax(x)


def greatest(x: mx.array) -> tuple[mx.array, mx.array]:
    """`argmax(x)`, and the maximum in float32: NaN where the row holds NaN."""
    return _C.greatest(x)


def draw(logits: mx.array, rows: Sequence[tuple[float, float, int, float, float]]) -> tuple[mx.array, mx.array]:
    """Draw a token from each row of logits float32 [R, V], without sorting them: `runner.ops.picking.draw`."""
    return _C.draw(logits, rows)


def log_probabilities(logits: mx.array, tokens: mx.array, tops: Sequence[int]) -> list[mx.array]:
    """Log-probabilities of a token a row and of the likeliest, unsorted: see `runner.ops.picking.log_probabilities`."""
    return _C.log_probabilities(logits, tokens, tops)


def masked(logits: mx.array, bits: mx.array) -> mx.array:
    """Logits float32 [R, V] with minus infinity where a bit is 0: `runner.ops.picking.masked`."""
    return _C.masked(logits, bits)


def schedule(*arrays: mx.array) -> None:
    """`mx.async_eval(*arrays)`, but the extension's operations reach the CPU stream as one task, not one by one."""
    _C.schedule(list(arrays))
