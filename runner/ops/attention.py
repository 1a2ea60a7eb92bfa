"""Attention of plain MLX: `mx.fast`'s op, or matrix products where scores are soft-capped; and the masks it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import mlx.core as mx

from runner.errors import UsageError

MaskRule = mx.array | Literal["causal"] | None
"""An array, boolean (True is seen) or added to the scores; "causal", aligned to the last key; None: all are seen."""


def attention(
    fused: Callable[..., mx.array],
    query: mx.array,
    key: mx.array,
    value: mx.array,
    mask: MaskRule,
    *,
    scale: float,
    window: int | None,
    sinks: mx.array | None,
    length: int | None = None,
    softcap: float | None = None,
    start: int = 0,
) -> mx.array:
    """`Ops.attention` for a device that computes functions element by element with `fused`.

    What it returns does not depend on `start` but within rounding.
    """
    keys = key.shape[2] if length is None else length
    first = 0
    if window is not None and window < keys:
        if isinstance(mask, mx.array):
            raise UsageError("attention takes a window or a mask array, not both: apply the window to the array")
        if query.shape[2] == 1:  # the last position: it sees the last keys, and all of them
            first = keys - window
        else:
            mask = window_mask(query.shape[2], keys, window)
    if first > 0 or keys < key.shape[2]:
        key, value = key[:, :, first:keys], value[:, :, first:keys]
    if softcap is not None:
        return capped(fused, query, key, value, mask, scale=scale, softcap=softcap, sinks=sinks)
    if query.shape[2] == key.shape[1] == 1 and key.shape[3] > value.shape[3] and mask is None and sinks is None:
        # MLX has no kernel for keys wider than values (latents), and would read them again for each head. As rows of
        # one query each, which see the same keys, all heads take part in one product.
        rows = query.swapaxes(1, 2)
        return mx.fast.scaled_dot_product_attention(rows, key, value, scale=scale).swapaxes(1, 2)
    sinks = None if sinks is None else sinks.astype(query.dtype)
    return mx.fast.scaled_dot_product_attention(query, key, value, scale=scale, mask=mask, sinks=sinks)


def capped(
    fused: Callable[..., mx.array],
    query: mx.array,
    key: mx.array,
    value: mx.array,
    mask: MaskRule,
    *,
    scale: float,
    softcap: float,
    sinks: mx.array | None,
) -> mx.array:
    """Attention whose scores pass `softcap * tanh(score / softcap)` (Gemma 2, arXiv:2408.00118) before the mask.

    No fused op soft-caps, so the scores are computed in full, `[B, H, L, S]`.
    """
    queries, keys = query.shape[2], key.shape[2]
    grouped = query.reshape(query.shape[0], key.shape[1], -1, *query.shape[2:])  # [B, KV, H / KV, L, D]
    # Scaled before the product where that has 16 bits, which large scores would leave; capped in float32 always.
    small = query.dtype != mx.float32
    products = (grouped * scale if small else grouped) @ key[:, :, None].swapaxes(-1, -2)
    scores = fused(capped_scores, products, 1.0 if small else scale, softcap)
    # A boolean mask hides, any other is added; None leaves the scores as they are.
    if isinstance(mask, str):
        mask = window_mask(queries, keys, keys)
    if mask is not None:
        whole = mx.broadcast_to(mask, (*query.shape[:3], keys)).reshape(scores.shape)
        scores = mx.where(whole, scores, -mx.inf) if whole.dtype == mx.bool_ else scores + whole
    if sinks is not None:
        column = sinks.astype(scores.dtype).reshape(1, key.shape[1], -1, 1, 1)
        scores = mx.concatenate([scores, mx.broadcast_to(column, (*scores.shape[:-1], 1))], axis=-1)
    probabilities = mx.softmax(scores, axis=-1)[..., :keys].astype(value.dtype)
    return (probabilities @ value[:, :, None]).reshape(*query.shape[:3], -1)


def capped_scores(products: mx.array, scale: float, cap: float) -> mx.array:
    """Soft-capped scores in float32, from the products of queries and keys."""
    return mx.tanh(products.astype(mx.float32) * scale / cap) * cap


def window_mask(queries: int, keys: int, window: int) -> mx.array:
    """Boolean `[queries, keys]`, True where a query sees a key: one of the last `window` up to its own position."""
    row = mx.arange(keys - queries, keys)[:, None]
    column = mx.arange(keys)[None]
    return (column <= row) & (column > row - window)


def chunk_mask(queries: int, keys: int, chunk: int) -> mx.array:
    """The causal mask `[queries, keys]` of chunks of `chunk` keys, the first key being the first of one.

    The queries are at the last positions.
    """
    k = mx.arange(keys)
    q = k[keys - queries :, None]
    return (k <= q) & (k // chunk == q // chunk)
