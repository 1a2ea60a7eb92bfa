"""Naive float32 versions (NumPy) of the kernels, to compare with them, and ways to make awkward arrays."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

FLOATS = st.sampled_from([mx.float32, mx.bfloat16, mx.float16])
EPSILON = {mx.float32: 1e-6, mx.bfloat16: 2**-8, mx.float16: 2**-11}
Layout = st.sampled_from(["plain", "sliced", "transposed", "reversed"])


def rand(*shape: int, seed: int, dtype: mx.Dtype = mx.float32, layout: str = "plain") -> mx.array:
    """Random normal values of a shape, stored in memory in the given `layout`."""
    key = mx.random.key(seed)
    if layout == "sliced":  # a window of a larger buffer
        x = mx.random.normal([n + 3 for n in shape], key=key).astype(dtype)
        return x[tuple(slice(2, n + 2) for n in shape)]
    if layout == "transposed":
        order = list(range(len(shape)))[::-1]
        return mx.random.normal(list(shape)[::-1], key=key).astype(dtype).transpose(order)
    x = mx.random.normal(list(shape), key=key).astype(dtype)
    return x[..., ::-1] if layout == "reversed" else x


def numpy(x: mx.array) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(x.astype(mx.float32))


def assert_close(found: mx.array, expected: Any, *, rounded_to: mx.Dtype, tolerance: float) -> None:
    """Assert that errors are at most `tolerance` times the expected values' size plus one rounding; NaN equals NaN."""
    got, want = numpy(found), np.asarray(expected, dtype=np.float32)
    assert got.shape == want.shape
    if rounded_to == mx.float16:
        want = np.where(np.abs(want) > 65519, np.copysign(np.inf, want), want)
    finite = np.isfinite(want)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    assert np.array_equal(got[~finite & ~np.isnan(want)], want[~finite & ~np.isnan(want)])
    if finite.any():
        got, want = got[finite].astype(np.float64), want[finite].astype(np.float64)
        scale = np.sqrt(np.mean(want**2)) + 1e-30
        error = np.abs(got - want)
        assert np.all(error <= tolerance * scale + EPSILON[rounded_to] * np.abs(want)), error.max() / scale


def linear(x: mx.array, weight: mx.array, bias: mx.array | None) -> Any:
    with np.errstate(all="ignore"):
        y = numpy(x).astype(np.float64) @ numpy(weight).T.astype(np.float64)
    return y if bias is None else y + numpy(bias)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
"""Magnitudes of the 4-bit floats E2M1 by code (OCP Microscaling 1.0, 5.3.3)."""


def e4m3(codes: Any) -> Any:
    """Decode 8-bit floats E4M3 (5.3.1): bias 7, subnormals, no infinity, NaN where all lower bits are set."""
    exponent, fraction = codes.astype(int) >> 3 & 15, codes & 7
    size = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    return np.where(codes & 127 == 127, np.nan, np.where(codes & 128, -size, size))


def small_floats(packed: mx.array, scales: mx.array, mode: str) -> Any:
    """Dequantize MLX's `packed` codes (lowest bits first) and `scales` of a floating-point `mode`."""
    octets = np.array(packed).view(np.uint8)
    if mode == "mxfp8":
        codes = e4m3(octets)
    else:
        nibbles = np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(octets), -1)
        codes = np.where(nibbles & 8, -1, 1) * E2M1[nibbles & 7]
    powers = np.array(scales)
    factors = e4m3(powers) if mode == "nvfp4" else 2.0 ** (powers.astype(float) - 127)
    return codes * np.repeat(factors, codes.shape[1] // factors.shape[1], axis=1)


def norm(x: Any, weight: Any, bias: Any, eps: float, mean: bool) -> Any:
    x = x.astype(np.float64)
    if mean:
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def rope(x: Any, offsets: Any, dims: int, traditional: bool, freqs: Any, scale: float) -> Any:
    x, half = x.astype(np.float64), dims // 2
    positions = (np.asarray(offsets, dtype=np.float32).reshape(-1, 1) + np.arange(x.shape[2])) * np.float32(scale)
    angles = (positions[..., None].astype(np.float32) / freqs.astype(np.float32))[:, None]  # [B or 1, 1, L, half]
    cos, sin = np.cos(angles, dtype=np.float64), np.sin(angles, dtype=np.float64)
    out = x.copy()
    first, second = (slice(0, dims, 2), slice(1, dims, 2)) if traditional else (slice(0, half), slice(half, dims))
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def attention(
    q: Any, k: Any, v: Any, *, scale: float, visible: Any, added: Any = 0.0, sinks: Any = None, softcap: Any = None
) -> Any:
    repeats = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, repeats, axis=1).astype(np.float64), np.repeat(v, repeats, axis=1).astype(np.float64)
    scores = q.astype(np.float64) @ k.swapaxes(2, 3) * scale
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    scores = np.where(visible, scores + added, -np.inf)
    if sinks is not None:
        column = np.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
        scores = np.concatenate([scores, column], axis=-1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    return weights[..., : k.shape[2]] @ v


def activation(name: str, x: Any) -> Any:
    x = x.astype(np.float64)
    with np.errstate(all="ignore"):
        if name == "silu":
            return x / (1 + np.exp(-x))
        if name in ("relu", "relu2"):
            return np.maximum(x, 0) ** (2 if name == "relu2" else 1)
        if name == "gelu":
            return 0.5 * x * np.vectorize(math.erfc, otypes=[np.float64])(-x / math.sqrt(2))
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
