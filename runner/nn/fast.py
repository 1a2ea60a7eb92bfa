"""Basic layers over the device's fast ops: attention, `LayerNorm`, `RMSNorm`, `RoPE`.

Each layer computes with the device's table (`runner.ops.table.Ops`), which the loader passes in; a model file calls
`self.norm(x, eps)` and never learns which table that is. Layers built by hand, without the loader, use `PORTABLE`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import mlx.core as mx

from runner.cache.storage import capacity, row_width
from runner.config import rope as frequencies
from runner.config.rope import RopeScaling
from runner.errors import UsageError
from runner.ops.table import PORTABLE, Ops
from runner.weights.module import Module
from runner.weights.tags import setting, tensor

NO_MASK: Literal["none"] = "none"
"""The mask that hides nothing: every query sees every key."""

Mask = mx.array | Literal["none"] | None
T = TypeVar("T")


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
    softcap: float | None = None,
    start: int = 0,
    ops: Ops = PORTABLE,
) -> mx.array:
    """softmax(scale * query key^T + mask) value, with grouped queries and without repeating keys or values.

    Args:
        query: `[B, H, L, D]`.
        key: `[B, KV, S, D]`; H is a multiple of KV.
        value: `[B, KV, S, Dv]`.
        mask: None: causal, aligned to the last key (query `i` sees keys up to `S - L + i`). `NO_MASK`: every key is
            seen. A boolean array: True is seen; any other array: added to the scores. Broadcast to `[B, H, L, S]`.
        scale: `1 / sqrt(D)` in most models.
        window: causal, and only the last `window` keys are seen, the query's own included.
        sinks: `[H]` extra logits that take part in the softmax but have no value.
        length: S, if `key` and `value` are a cache's buffers with room for more.
        softcap: scores pass `softcap * tanh(score / softcap)` (Gemma 2, arXiv:2408.00118) before the mask.
        start: position of the first key in its sequence. Devices that add up keys in blocks begin these at fixed
            positions, so that a query gets the same bits whatever rows a cache has dropped.

    Returns:
        `[B, H, L, Dv]` in `query`'s dtype.

    Raises:
        UsageError: a rank, head count or length does not fit; the message gives the shapes.
    """
    q, k, v = query.shape, key.shape, value.shape
    if not len(q) == len(k) == len(v) == 4:
        raise UsageError(f"attention needs query [B, H, L, D], key and value [B, KV, S, D]; got {_shapes(q, k, v)}")
    keys = capacity(key) if length is None else length
    # Rows of a quantized cache end with a scale; `row_width` is the head size without it.
    if k[:3] != v[:3] or q[0] != k[0] or q[3] != row_width(key):
        raise UsageError(f"attention: batch, key-value heads, lengths or head sizes differ: {_shapes(q, k, v)}")
    if q[1] % k[1]:
        raise UsageError(f"attention: {q[1]} query heads are not a multiple of {k[1]} key-value heads")
    # What the device's op gets: an array, "causal", or None where every key is seen.
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
    return ops.attention(
        query, key, value, rule, scale=scale, window=window, sinks=sinks, length=keys, softcap=softcap, start=start
    )


def _shapes(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> str:
    return f"query {query}, key {key}, value {value}"


def _check_mask(mask: mx.array, query: mx.array, keys: int) -> None:
    target = (*query.shape[:3], keys)
    padded = (1,) * (4 - mask.ndim) + tuple(mask.shape)  # as broadcasting pads: in front
    if len(padded) != 4 or any(size not in (1, full) for size, full in zip(padded, target, strict=True)):
        raise UsageError(f"attention: mask {mask.shape} does not broadcast to [B, H, L, S] = {list(target)}")


def provided_ops() -> Any:
    """Declare a field that the loader fills with the device's `Ops`."""
    return setting("ops", default=PORTABLE)


@dataclass
class LayerNorm(Module):
    """Layer normalization over the last axis (arXiv:1607.06450)."""

    weight: mx.array = tensor("weight", "$0")
    bias: mx.array | None = field(default=None, metadata=tensor("bias", "$0").metadata)
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, eps: float) -> mx.array:
        """`(x - mean) / sqrt(var + eps) * weight + bias`; same shape and dtype as `x`.

        Built by hand, the layer needs no bias. A checkpoint without the bias is refused: such families use
        `ScaledLayerNorm`.
        """
        _check_width("LayerNorm", x, self.weight)
        return self.ops.layer_norm(x, self.weight, self.bias, eps)


@dataclass
class ScaledLayerNorm(Module):
    """Layer normalization with a weight and without a bias."""

    weight: mx.array = tensor("weight", "$0")
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, eps: float) -> mx.array:
        """`(x - mean) / sqrt(var + eps) * weight`; same shape and dtype as `x`."""
        _check_width("LayerNorm", x, self.weight)
        return self.ops.layer_norm(x, self.weight, None, eps)


@dataclass
class PlainLayerNorm(Module):
    """Layer normalization with neither weight nor bias; reads no tensor."""

    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, eps: float) -> mx.array:
        """`(x - mean) / sqrt(var + eps)`; same shape and dtype as `x`."""
        return self.ops.layer_norm(x, None, None, eps)


@dataclass
class RMSNorm(Module):
    """Root mean square normalization over the last axis (arXiv:1910.07467)."""

    weight: mx.array = tensor("weight", "$0")
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, eps: float) -> mx.array:
        """`x / sqrt(mean(x^2) + eps) * weight`; same shape and dtype as `x`."""
        _check_width("RMSNorm", x, self.weight)
        return self.ops.rms_norm(x, self.weight, eps)

    def add(self, x: mx.array, residual: mx.array, eps: float) -> tuple[mx.array, mx.array]:
        """`(x + residual, norm(x + residual))`: the step between two sublayers, in one pass where it is fused."""
        return self.ops.add_rms_norm(x, residual, self.weight, eps)


@dataclass
class PlainRMSNorm(Module):
    """Root mean square normalization without a weight; reads no tensor."""

    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, eps: float) -> mx.array:
        """`x / sqrt(mean(x^2) + eps)`; same shape and dtype as `x`."""
        return self.ops.rms_norm(x, None, eps)


def _check_width(name: str, x: mx.array, weight: mx.array) -> None:
    if x.ndim == 0 or x.shape[-1] != weight.shape[0]:
        raise UsageError(
            f"{name}: the last axis of x {x.shape} must have {weight.shape[0]} elements, as the weight has"
        )


class Once(Protocol):
    """Makes something, or finds what it made of the same name."""

    def __call__(self, name: Hashable, make: Callable[[], T], /) -> T: ...


def each_time(name: Hashable, make: Callable[[], T], /) -> T:
    """The `Once` of a layer that is called alone: makes everything anew."""
    return make()


def soft_capped(x: mx.array, cap: float) -> mx.array:
    """`x` squeezed into -cap to cap; small values stay what they are."""
    return mx.tanh(x / cap) * cap


def last_offset(offset: int | mx.array | tuple[int, ...]) -> int:
    """The largest offset of a batch's rows; waits for the device if `offset` is an array."""
    if isinstance(offset, tuple):
        return max(offset)
    value = mx.max(offset).item() if isinstance(offset, mx.array) else offset
    assert isinstance(value, int)
    return value


@dataclass
class RoPE(Module):
    """Rotary position embedding (arXiv:2104.09864), with the published scalings of its frequencies.

    The first `dims` elements of each head are rotated, the rest stay. `traditional` rotates pairs (2i, 2i+1), the
    default pairs (i, i + dims/2), as Hugging Face's checkpoints need. Positions are multiplied by `scale`. With
    `dims` 0 (a layer without positions) nothing is rotated.
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
        # Fixed frequencies are computed once; plain RoPE leaves them to the op, which needs only the base.
        if self.dims and self.scaling is not None and self.scaling.kind != "default":
            limit = self.max_position_embeddings
            self.factor = frequencies.attention_factor(self.scaling, max_position_embeddings=limit)
            self.freqs = self._freqs(0)

    @property
    def _settings(self) -> tuple[object, ...]:
        """All that frequencies depend on, besides the length."""
        return (self.scaling, self.dims, self.base, self.max_position_embeddings)

    def _freqs(self, length: int) -> mx.array:
        scaling = self.scaling or RopeScaling()
        inverse = frequencies.inverse_frequencies(
            scaling, dims=self.dims, base=self.base, max_position_embeddings=self.max_position_embeddings, length=length
        )
        # mx.fast.rope divides by them, so that an infinite one leaves its plane where it is.
        return mx.array([1.0 / f if f else math.inf for f in inverse], dtype=mx.float32)

    def __call__(
        self,
        x: mx.array,
        offset: int | mx.array | tuple[int, ...],
        length: int | tuple[int, ...] | None = None,
        *,
        once: Once = each_time,
    ) -> mx.array:
        """Rotate `x` `[B, H, L, D]`; its first token has position `offset` (a number, or `[B]` with one for each row).

        Where `offset` is a tuple, `x` is `[1, H, T, D]`, it holds the position of each of the T tokens, and `length`,
        if it is given, one for each.

        Args:
            length: tokens of the whole sequence, which `dynamic` and `longrope` frequencies depend on; the default is
                the last position of `x` plus one. A prompt that is fed in chunks passes its full length.
            once: makes frequencies for a length once for all layers of a pass: `Batch.once`.

        Raises:
            UsageError: `x` is not of rank 4, its heads are smaller than `dims`, or `offset` has another shape.
        """
        if x.ndim != 4 or x.shape[-1] < self.dims:
            raise UsageError(f"RoPE needs x [B, H, L, D] with D >= {self.dims}; got {x.shape}")
        if isinstance(offset, mx.array) and offset.size != 1 and offset.shape != (x.shape[0],):
            raise UsageError(f"RoPE: offset must be one number or [{x.shape[0]}], one for each row; got {offset.shape}")
        if self.dims == 0:
            return x
        if self.scaling is None or not frequencies.depends_on_length(self.scaling):
            return self._turned(x, offset, 0, once)
        if isinstance(offset, tuple):
            return self._several(x, offset, length if isinstance(length, tuple) else [p + 1 for p in offset], once)
        if length is None:
            length = last_offset(offset) + x.shape[2]
        assert isinstance(length, int), "lengths of several sequences, but one offset"
        return self._turned(x, offset, self._stretched(length), once)

    def _stretched(self, length: int) -> int:
        """What frequencies depend on: `length` beyond the original context, 0 within it."""
        original = self.scaling.original_max_position_embeddings if self.scaling else None
        return length if length > (original or self.max_position_embeddings) else 0

    def _several(self, x: mx.array, offset: tuple[int, ...], lengths: Sequence[int], once: Once) -> mx.array:
        """`x` `[1, H, T, D]` of several sequences of these `lengths`: those of equal frequencies at once."""
        kinds = [self._stretched(length) for length in lengths]
        starts = [i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]]
        pieces = zip(mx.split(x, starts, 2), itertools.pairwise([0, *starts, len(kinds)]), strict=True)
        turned = [self._turned(piece, offset[a:b], kinds[a], once) for piece, (a, b) in pieces]
        return turned[0] if len(turned) == 1 else mx.concatenate(turned, axis=2)

    def _turned(self, x: mx.array, offset: int | mx.array | tuple[int, ...], length: int, once: Once) -> mx.array:
        """`x` rotated by the frequencies for a `length` beyond the original context; 0: for any within it."""
        freqs, factor = self.freqs, self.factor
        if length:
            freqs = once(("freqs", self._settings, length), functools.partial(self._freqs, length))
            factor = frequencies.attention_factor(
                self.scaling or RopeScaling(), max_position_embeddings=self.max_position_embeddings, length=length
            )
        if factor != 1.0:
            x = self._scaled(x, factor)
        base = self.base if freqs is None else None  # mx.fast.rope takes one of the two
        return self.ops.rope(
            x, offset, dims=self.dims, traditional=self.traditional, base=base, scale=self.scale, freqs=freqs
        )

    def _scaled(self, x: mx.array, factor: float) -> mx.array:
        """Scale the part of `x` that is rotated by `factor`: YaRN and LongRoPE scale sine and cosine."""
        if self.dims == x.shape[-1]:
            return x * factor
        return mx.concatenate([x[..., : self.dims] * factor, x[..., self.dims :]], axis=-1)
