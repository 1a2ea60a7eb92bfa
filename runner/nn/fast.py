"""The fast ops every model is made of, over `mx.fast`, and the seam where a device brings its own.

`Ops` is the table of what a device computes with. One is picked when a model is loaded and handed to each of these
dataclasses by the weight walker; a model file calls `self.norm(x, eps)` and never learns which one it got. Built by
hand, without a loader, they use `PORTABLE`: plain MLX, right on every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import mlx.core as mx

from runner.cache.storage import PLAIN, Storage, row_width
from runner.config import rope as frequencies
from runner.config.activations import ACTIVATIONS
from runner.config.rope import RopeScaling
from runner.errors import UsageError
from runner.weights.tags import setting, tensor

NO_MASK: Literal["none"] = "none"
"""The mask that hides nothing: every query sees every key."""

Mask = mx.array | Literal["none"] | None


def _linear(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)


def _quantized_linear(
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
    y = mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=group_size, bits=bits, mode=mode)
    return y if bias is None else y + bias


def _embed(ids: mx.array, weight: mx.array, dtype: mx.Dtype | None) -> mx.array:
    rows = weight[ids]
    return rows if dtype is None else rows.astype(dtype)


def _quantized_embed(
    ids: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    dtype: mx.Dtype | None,
    *,
    group_size: int,
    bits: int,
    mode: str,
) -> mx.array:
    if mode == "nvfp4" and ids.size % 4:  # MLX's CPU decodes these scales four at a time, and no rest
        padded = mx.concatenate([ids.flatten(), mx.zeros(-ids.size % 4, ids.dtype)])
        rows = _quantized_embed(padded, weight, scales, biases, dtype, group_size=group_size, bits=bits, mode=mode)
        return rows[: ids.size].reshape(*ids.shape, -1)
    shifts, sizes = None if biases is None else biases[ids], scales[ids]
    if dtype is not None and shifts is not None:
        sizes, shifts = sizes.astype(dtype), shifts.astype(dtype)
    rows = mx.dequantize(weight[ids], sizes, shifts, group_size=group_size, bits=bits, mode=mode)
    return rows if dtype is None else rows.astype(dtype)


def _rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    return mx.fast.rms_norm(x, weight, eps).astype(x.dtype)  # MLX gives a float32 weight's dtype to the result


def _add_rms_norm(x: mx.array, residual: mx.array, weight: mx.array | None, eps: float) -> tuple[mx.array, mx.array]:
    total = x + residual
    return total, _rms_norm(total, weight, eps)


def _layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    return mx.fast.layer_norm(x, weight, bias, eps).astype(x.dtype)


def _attention(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    mask: mx.array | Literal["causal"] | None,
    *,
    scale: float,
    window: int | None,
    sinks: mx.array | None,
    length: int | None = None,
) -> mx.array:
    if length is not None and length < key.shape[2]:
        key, value = key[:, :, :length], value[:, :, :length]
    if window is not None and window < key.shape[2]:
        if isinstance(mask, mx.array):
            raise UsageError("attention: a window and a mask array at once; put the window into the array")
        mask = window_mask(query.shape[2], key.shape[2], window)
    return mx.fast.scaled_dot_product_attention(query, key, value, scale=scale, mask=mask, sinks=sinks)


def window_mask(queries: int, keys: int, window: int) -> mx.array:
    """Boolean `[queries, keys]`, True where a query sees a key: not later than itself, and one of the last `window`."""
    row = mx.arange(keys - queries, keys)[:, None]
    column = mx.arange(keys)[None]
    return (column <= row) & (column > row - window)


def _rope(
    x: mx.array, offset: int | mx.array, *, dims: int, traditional: bool, base: float | None, scale: float, freqs: Any
) -> mx.array:
    return mx.fast.rope(x, dims, traditional=traditional, base=base, scale=scale, offset=offset, freqs=freqs)


def _glu(gate_up: mx.array, activation: str) -> mx.array:
    gate, up = mx.split(gate_up, 2, axis=-1)
    return ACTIVATIONS[activation](gate) * up


def _activate(x: mx.array, activation: str) -> mx.array:
    return ACTIVATIONS[activation](x)


def _gather_linear(x: mx.array, weight: mx.array, experts: mx.array, *, in_order: bool = False) -> mx.array:
    matrices = weight.swapaxes(-1, -2).astype(x.dtype)
    return mx.gather_mm(x, matrices, rhs_indices=experts, sorted_indices=in_order)


def _gather_quantized_linear(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    experts: mx.array,
    *,
    group_size: int,
    bits: int,
    mode: str,
    in_order: bool = False,
) -> mx.array:
    return mx.gather_qmm(
        x,
        weight,
        scales,
        biases,
        rhs_indices=experts,
        transpose=True,
        sorted_indices=in_order,
        group_size=group_size,
        bits=bits,
        mode=mode,
    )


def _argmax(x: mx.array) -> mx.array:
    return mx.argmax(x, axis=-1)


class Program(Protocol):
    """A step that was recorded: `run(token)` starts it for the next token, int32 or uint32 `[B, 1]`."""

    def run(self, token: mx.array) -> mx.array: ...


@dataclass(frozen=True)
class Recorder:
    """Records what a step does, to do it again without building its graph; see `runner.engine.replay`.

    `slot(shape)`: ids that stand for any token. `record(slot, outputs, ahead)`: `outputs[i]` is the step's result over
    them, `ahead[i]` positions after the first one's; None where the steps differ in more than such positions.
    """

    slot: Callable[[list[int]], mx.array]
    record: Callable[[mx.array, list[mx.array], list[int]], Program | None]


@dataclass(frozen=True, kw_only=True)
class Ops:
    """What a device computes a model with. Each entry has `PORTABLE`'s signature and, within rounding, its result.

    `glu(gate_up, activation)` and `activate(x, activation)` take `hidden_act`'s names; `attention` gets `mask` as an
    array, "causal" (aligned to the last key) or None for all keys, may read `key` and `value` where they lie, and takes
    their first `length` rows (None: all), in whatever form `storage` keeps them. `schedule(*arrays)` starts to compute
    them, as `mx.async_eval` does.
    """

    name: str
    linear: Callable[[mx.array, mx.array, mx.array | None], mx.array] = _linear
    quantized_linear: Callable[..., mx.array] = _quantized_linear
    embed: Callable[[mx.array, mx.array, mx.Dtype | None], mx.array] = _embed
    quantized_embed: Callable[..., mx.array] = _quantized_embed
    rms_norm: Callable[[mx.array, mx.array | None, float], mx.array] = _rms_norm
    add_rms_norm: Callable[[mx.array, mx.array, mx.array | None, float], tuple[mx.array, mx.array]] = _add_rms_norm
    layer_norm: Callable[[mx.array, mx.array | None, mx.array | None, float], mx.array] = _layer_norm
    rope: Callable[..., mx.array] = _rope
    attention: Callable[..., mx.array] = _attention
    glu: Callable[[mx.array, str], mx.array] = _glu
    activate: Callable[[mx.array, str], mx.array] = _activate
    argmax: Callable[[mx.array], mx.array] = _argmax
    schedule: Callable[..., None] = mx.async_eval
    recorder: Recorder | None = None
    gather_linear: Callable[..., mx.array] = _gather_linear
    gather_quantized_linear: Callable[..., mx.array] = _gather_quantized_linear
    storage: Storage = PLAIN


PORTABLE = Ops(name="mlx")


def scaled_dot_product_attention(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    mask: Mask = None,
    *,
    scale: float,
    window: int | None = None,
    sinks: mx.array | None = None,
    length: int | None = None,
    ops: Ops = PORTABLE,
) -> mx.array:
    """softmax(scale * query key^T + mask) value, with grouped queries and without repeating keys or values.

    Args:
        query: `[B, H, L, D]`.
        key: `[B, KV, S, D]`; H is a multiple of KV.
        value: `[B, KV, S, Dv]`.
        mask: None: causal, aligned to the last key (query `i` sees keys up to `S - L + i`). `NO_MASK`: every key.
            A boolean array: True is seen; any other: added to the scores. Broadcast to `[B, H, L, S]`.
        scale: `1 / sqrt(D)` in most models.
        window: causal, and only the last `window` keys, the query's own included.
        sinks: `[H]` extra logits that take part in the softmax and select nothing.
        length: S, where `key` and `value` are a cache's buffers with room for more.

    Returns:
        `[B, H, L, Dv]` in `query`'s dtype.

    Raises:
        UsageError: a rank, head count or length does not fit; the message names both shapes.
    """
    q, k, v = query.shape, key.shape, value.shape
    if not len(q) == len(k) == len(v) == 4:
        raise UsageError(f"attention needs query [B, H, L, D], key and value [B, KV, S, D]; got {_shapes(q, k, v)}")
    keys = k[2] if length is None else length
    if k[:3] != v[:3] or q[0] != k[0] or q[3] != row_width(key):
        raise UsageError(f"attention: batch, key-value heads, lengths or head sizes differ: {_shapes(q, k, v)}")
    if q[1] % k[1]:
        raise UsageError(f"attention: {q[1]} query heads are no multiple of {k[1]} key-value heads")
    rule: mx.array | Literal["causal"] | None
    if mask is None:
        if q[2] > keys:
            raise UsageError(f"causal attention has more queries ({q[2]}) than keys ({keys})")
        # One query, being the last position, sees every key: no mask to apply.
        rule = "causal" if q[2] > 1 else None
    elif isinstance(mask, mx.array):
        _check_mask(mask, query, keys)
        rule = mask
    elif mask != NO_MASK:
        raise UsageError(f"attention: mask must be an array, NO_MASK or None (causal), not {mask!r}")
    elif window is not None:
        raise UsageError("attention: NO_MASK and a window exclude each other")
    else:
        rule = None
    return ops.attention(query, key, value, rule, scale=scale, window=window, sinks=sinks, length=keys)


def _shapes(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> str:
    return f"query {query}, key {key}, value {value}"


def _check_mask(mask: mx.array, query: mx.array, keys: int) -> None:
    target = (*query.shape[:3], keys)
    padded = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if len(padded) != 4 or any(size not in (1, full) for size, full in zip(padded, target, strict=True)):
        raise UsageError(f"attention: mask {mask.shape} does not broadcast to [B, H, L, S] = {list(target)}")


def provided_ops() -> Any:
    """The field that takes the device's `Ops` from the loader."""
    return setting("ops", default=PORTABLE)


@dataclass
class LayerNorm:
    """Layer normalisation over the last axis (arXiv:1607.06450)."""

    weight: mx.array = tensor("weight", "$0")
    bias: mx.array | None = field(default=None, metadata=tensor("bias", "$0").metadata)
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, eps: float) -> mx.array:
        """`(x - mean) / sqrt(var + eps) * weight + bias`; same shape and dtype as `x`.

        Built by hand it needs no bias; a checkpoint that lacks it is refused, unless the family has `ScaledLayerNorm`.
        """
        _check_width("LayerNorm", x, self.weight)
        return self.ops.layer_norm(x, self.weight, self.bias, eps)


@dataclass
class ScaledLayerNorm:
    """The same without a bias."""

    weight: mx.array = tensor("weight", "$0")
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, eps: float) -> mx.array:
        """`(x - mean) / sqrt(var + eps) * weight`; same shape and dtype as `x`."""
        _check_width("LayerNorm", x, self.weight)
        return self.ops.layer_norm(x, self.weight, None, eps)


@dataclass
class PlainLayerNorm:
    """The same with nothing learnt; takes no tensor."""

    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, eps: float) -> mx.array:
        """`(x - mean) / sqrt(var + eps)`; same shape and dtype as `x`."""
        return self.ops.layer_norm(x, None, None, eps)


@dataclass
class RMSNorm:
    """Root mean square normalisation over the last axis (arXiv:1910.07467)."""

    weight: mx.array = tensor("weight", "$0")
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, eps: float) -> mx.array:
        """`x / sqrt(mean(x^2) + eps) * weight`; same shape and dtype as `x`."""
        _check_width("RMSNorm", x, self.weight)
        return self.ops.rms_norm(x, self.weight, eps)

    def add(self, x: mx.array, residual: mx.array, eps: float) -> tuple[mx.array, mx.array]:
        """`(x + residual, norm(x + residual))`: the step between two sublayers, one pass over memory where fused."""
        return self.ops.add_rms_norm(x, residual, self.weight, eps)


def _check_width(name: str, x: mx.array, weight: mx.array) -> None:
    if x.ndim == 0 or x.shape[-1] != weight.shape[0]:
        raise UsageError(f"{name}: the last axis of x {x.shape} must have the {weight.shape[0]} elements of its weight")


def last_offset(offset: int | mx.array) -> int:
    """The largest offset of a batch's rows; reads it from the device."""
    value = mx.max(offset).item() if isinstance(offset, mx.array) else offset
    assert isinstance(value, int)
    return value


@dataclass
class RoPE:
    """Rotary position embedding (arXiv:2104.09864), with the published stretchings of its frequencies.

    `dims` of each head are rotated, the rest pass; `traditional` pairs neighbours (2i, 2i+1), the default pairs
    (i, i + dims/2) as Hugging Face's checkpoints do; positions are multiplied by `scale`. With `dims` 0 (a layer
    without positions) everything passes.
    """

    dims: int = setting("rotary_dim", default=0)
    traditional: bool = setting(default=False)
    base: float = setting("rope_theta", default=10000.0)
    scale: float = setting("rope_scale", default=1.0)
    scaling: RopeScaling | None = setting("rope_scaling", default=None)
    max_position_embeddings: int = setting("max_position_embeddings", default=2048)
    ops: Ops = provided_ops()
    freqs: mx.array | None = field(init=False, default=None, repr=False)
    factor: float = field(init=False, default=1.0)

    def __post_init__(self) -> None:
        if self.dims < 0 or self.dims % 2:
            raise UsageError(f"RoPE: dims must be even and not negative, not {self.dims}")
        if self.dims and self.scaling is not None and self.scaling.kind != "default":
            limit = self.max_position_embeddings
            self.factor = frequencies.attention_factor(self.scaling, max_position_embeddings=limit)
            self.freqs = self._freqs(0)

    def _freqs(self, length: int) -> mx.array:
        scaling = self.scaling or RopeScaling()
        inverse = frequencies.inverse_frequencies(
            scaling, dims=self.dims, base=self.base, max_position_embeddings=self.max_position_embeddings, length=length
        )
        return mx.array([1.0 / f for f in inverse], dtype=mx.float32)  # mx.fast.rope divides by them

    def __call__(self, x: mx.array, offset: int | mx.array, length: int | None = None) -> mx.array:
        """Rotate `x` `[B, H, L, D]`, whose first row stands at position `offset` (an int, or one for each of the B).

        Args:
            length: tokens of the whole sequence, which `dynamic` and `longrope` frequencies depend on; the default is
                the last position of `x` plus one. A prompt that is fed in chunks passes its full length.

        Raises:
            UsageError: `x` has another rank, too small a head, or `offset` another shape.
        """
        if x.ndim != 4 or x.shape[-1] < self.dims:
            raise UsageError(f"RoPE needs x [B, H, L, D] with D >= {self.dims}; got {x.shape}")
        if isinstance(offset, mx.array) and offset.size != 1 and offset.shape != (x.shape[0],):
            raise UsageError(f"RoPE: offset must be one number or [{x.shape[0]}], one for each row; got {offset.shape}")
        if self.dims == 0:
            return x
        freqs = self.freqs
        if self.scaling is not None and frequencies.depends_on_length(self.scaling):
            if length is None:
                length = last_offset(offset) + x.shape[2]
            original = self.scaling.original_max_position_embeddings or self.max_position_embeddings
            freqs = self._freqs(length) if length > original else freqs
        if self.factor != 1.0:
            x = self._scaled(x)
        base = self.base if freqs is None else None
        return self.ops.rope(
            x, offset, dims=self.dims, traditional=self.traditional, base=base, scale=self.scale, freqs=freqs
        )

    def _scaled(self, x: mx.array) -> mx.array:
        """YaRN and LongRoPE multiply the sine and cosine, hence the rotated part of `x` only."""
        if self.dims == x.shape[-1]:
            return x * self.factor
        return mx.concatenate([x[..., : self.dims] * self.factor, x[..., self.dims :]], axis=-1)
