"""Picking a token from logits in plain MLX: the greatest, a draw after filters, and log-probabilities.

Devices whose sort is slow have kernels instead, and these are their twins. All filters share one order: the greatest
logit first, of equal ones the lowest id.
"""

from __future__ import annotations

import math

import mlx.core as mx


def greatest(logits: mx.array) -> tuple[mx.array, mx.array]:
    """The index (uint32) of the greatest of logits `[.., V]`, the lowest of equal ones, and its value.

    The value is NaN where a row holds NaN; the index is then any.
    """
    return mx.argmax(logits, axis=-1), mx.max(logits, axis=-1)


def draw(
    logits: mx.array, chance: float, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[mx.array, mx.array]:
    """Draw a token from logits float32 `[V]` after top-k, top-p and min-p, in this order.

    A token weighs exp((logit - greatest) / temperature), rounded to float32. Those left by the filters share [0, 1) in
    the order of their ids, each by its weight, and the token in whose share `chance` lies is drawn. Which tokens the
    filters leave is exact for these weights, but for the rounding of their sum where it meets `top_p`: 1e-7 of it in a
    kernel, up to 2^-24 for each token summed here.

    Args:
        chance: from 0 up to but not including 1.
        temperature: positive, at least the smallest normal float32.
        top_k: keep that many; 0: all.
        top_p: keep the fewest whose weights add up to this share of what top-k left, at least one; from 1 on: all.
        min_p: keep tokens that weigh at least this share of the greatest; 0: all.

    Returns:
        The token (uint32) and the greatest logit, NaN where there is any: no token can be drawn unless it is finite.
    """
    ids, peak = mx.arange(logits.shape[0]), mx.max(logits)
    # Relative to the greatest, so that no temperature makes a logit overflow to plus infinity.
    scaled = (logits - peak) / temperature
    weights = mx.exp(scaled)
    few = 0 < top_k < logits.shape[0]
    if few or top_p < 1:
        order = mx.argsort(-logits)[: top_k if few else None]
        last = order[-1]
        if top_p < 1:
            before = mx.cumsum(weights[order], inclusive=False)
            # A token stays while those before it have not reached top_p: the first always stays.
            goal = top_p * (before[-1] + weights[last])
            last = order[mx.maximum(mx.sum(before < goal), 1) - 1]
        stays = (logits > logits[last]) | ((logits == logits[last]) & (ids <= last))
        weights = mx.where(stays, weights, 0)
    # p >= min_p * max(p), in logits.
    if min_p > 0:
        weights = mx.where(scaled >= math.log(min_p), weights, 0)
    # Where each token's share ends. Rounded to float32, a chance could be 1, at which no share ends later.
    ends = mx.where(weights > 0, mx.cumsum(weights), 0)
    goal = min(chance, 1 - 2.0**-24) * mx.max(ends)
    return mx.argmax(ends > goal), peak


def log_probabilities(logits: mx.array, token: mx.array, top: int) -> list[mx.array]:
    """The log-probability of `token` (a scalar, uint32) by logits float32 `[V]`, and those of the `top` likeliest.

    Returns:
        One array, a scalar; with `top`, ids (uint32) and log-probabilities of the tokens with the greatest logits
        follow, in descending order, of equal ones the lowest id first (all tokens where there are fewer).
    """
    logprobs = logits - mx.logsumexp(logits)
    if top == 0:
        return [logprobs[token]]
    ids = mx.argsort(-logits)[:top]
    return [logprobs[token], ids, logprobs[ids]]
