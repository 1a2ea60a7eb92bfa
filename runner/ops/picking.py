"""Picking a token from each row of logits in plain MLX: the greatest, a draw after filters, and log-probabilities.

Devices whose sort is slow have kernels instead, and these are their twins. All filters share one order: the greatest
logit first, of equal ones the lowest id. What comes of a row depends on no other row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx


class Draw(NamedTuple):
    """How to draw the token of one row.

    Attributes:
        chance: from 0 up to but not including 1.
        temperature: at least the smallest normal float32; 0: take the greatest, and read nothing else.
        top_k: keep that many; 0: all.
        top_p: keep the fewest whose weights add up to this share of what top-k left, at least one; from 1 on: all.
        min_p: keep tokens that weigh at least this share of the greatest; 0: all.
    """

    chance: float
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def greatest(logits: mx.array) -> tuple[mx.array, mx.array]:
    """The index (uint32) of the greatest of logits `[.., V]`, the lowest of equal ones, and its value.

    The value is NaN where a row holds NaN; the index is then any.
    """
    return mx.argmax(logits, axis=-1), mx.max(logits, axis=-1)


def draw(logits: mx.array, rows: Sequence[Draw]) -> tuple[mx.array, mx.array]:
    """Draw a token from each row of logits float32 `[R, V]` after top-k, top-p and min-p, in this order.

    A token weighs exp((logit - greatest) / temperature), rounded to float32. Those left by the filters share [0, 1) in
    the order of their ids, each by its weight, and the token in whose share the chance lies is drawn. Which tokens the
    filters leave is exact for these weights, but for the rounding of their sum where it meets `top_p`: 1e-7 of it in a
    kernel, up to 2^-24 for each token summed here.

    Returns:
        The tokens (uint32) and the greatest logits, both `[R]`; NaN where a row has any: no token can be drawn from it
        unless its greatest logit is finite.
    """
    size = logits.shape[-1]
    ids, peak = mx.arange(size), mx.max(logits, axis=-1, keepdims=True)
    # Relative to the greatest, so that no temperature makes a logit overflow to plus infinity.
    scaled = (logits - peak) / _column([row.temperature or 1.0 for row in rows])
    weights = mx.exp(scaled)
    kept = [row.top_k if 0 < row.top_k < size else size for row in rows]
    if min(kept) < size or any(row.top_p < 1 for row in rows):
        # The ranks that any row's filters look at. A row that keeps all needs none.
        ranks = max(keep for keep, row in zip(kept, rows, strict=True) if keep < size or row.top_p < 1)
        order = mx.argsort(-logits, axis=-1)[:, :ranks]
        count = mx.broadcast_to(mx.array(_column([min(keep, ranks) for keep in kept])), peak.shape)
        if any(row.top_p < 1 for row in rows):
            ordered = mx.where(mx.arange(ranks) < count, mx.take_along_axis(weights, order, axis=-1), 0)
            before = mx.cumsum(ordered, axis=-1, inclusive=False)
            # A token stays while those before it have not reached top_p: the first always stays.
            goal = _column([row.top_p for row in rows]) * (before[:, -1:] + ordered[:, -1:])
            stay = mx.sum((before < goal) & (mx.arange(ranks) < count), axis=-1, keepdims=True)
            nucleus = mx.array(_column([row.top_p < 1 for row in rows]))
            count = mx.where(nucleus, mx.maximum(stay, 1), count)
        last = mx.take_along_axis(order, count - 1, axis=-1)
        bound = mx.take_along_axis(logits, last, axis=-1)
        every = mx.array(_column([keep == size and row.top_p >= 1 for keep, row in zip(kept, rows, strict=True)]))
        stays = (logits > bound) | ((logits == bound) & (ids <= last)) | every
        weights = mx.where(stays, weights, 0)
    # p >= min_p * max(p), in logits.
    if any(row.min_p > 0 for row in rows):
        floor = _column([math.log(row.min_p) if row.min_p > 0 else -math.inf for row in rows])
        weights = mx.where(scaled >= floor, weights, 0)
    # Where each token's share ends. Rounded to float32, a chance could be 1, at which no share ends later.
    ends = mx.where(weights > 0, mx.cumsum(weights, axis=-1), 0)
    goal = _column([min(row.chance, 1 - 2.0**-24) for row in rows]) * mx.max(ends, axis=-1, keepdims=True)
    token = mx.argmax(ends > goal, axis=-1)
    if any(row.temperature == 0 for row in rows):
        greedy = mx.array([row.temperature == 0 for row in rows])
        token = mx.where(greedy, mx.argmax(logits, axis=-1), token)
    return token, peak[:, 0]


def log_probabilities(logits: mx.array, tokens: mx.array, tops: Sequence[int]) -> list[mx.array]:
    """The log-probability of a token (`[R]`, uint32) by each row of logits float32 `[R, V]`, and of the likeliest.

    Args:
        tops: for each row, how many of the likeliest are wanted as well; -1: nothing is wanted of this row.

    Returns:
        One array `[R]`; where any are wanted, ids (uint32) and log-probabilities `[R, most]` of the tokens with the
        greatest logits follow, in descending order, of equal ones the lowest id first (all tokens where there are
        fewer). What is not wanted of a row can be anything.
    """
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    picked = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    most = max(0, *tops)
    if most == 0:
        return [picked]
    ids = mx.argsort(-logits, axis=-1)[:, :most]
    return [picked, ids, mx.take_along_axis(logprobs, ids, axis=-1)]


def masked(logits: mx.array, bits: mx.array) -> mx.array:
    """Logits `[R, V]` with minus infinity where a bit is 0.

    Args:
        bits: uint32 `[R, ceil(V / 32)]`; bit j of word i stands for token 32 i + j.
    """
    each = (bits[:, :, None] >> mx.arange(32, dtype=mx.uint32)) & 1
    allowed = each.reshape(bits.shape[0], -1)[:, : logits.shape[1]].astype(mx.bool_)
    return mx.where(allowed, logits, mx.array(-math.inf, logits.dtype))


def _column(values: Sequence[float]) -> Any:
    """One number where all rows have the same, as a rule, else a column of theirs."""
    return values[0] if len(set(values)) == 1 else mx.array(list(values))[:, None]
