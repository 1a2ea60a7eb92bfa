"""How a mixture's experts are chosen and weighed, and what they put out is added, as operations of MLX.

Sources: Mixtral arXiv:2401.04088; groups of experts: DeepSeek V2 arXiv:2405.04434, V3 arXiv:2412.19437. Top-k of the
logits, then softmax (Granite) equals softmax, top-k, then normalization to a sum of one (Mixtral), so there is only the
second form here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx


class Routing(NamedTuple):
    """How `chosen` experts are picked for a token.

    Their routing weights are their scores, `normalized` to a sum of one (but for `eps`) or not, times `factor`. Of
    `groups` equal groups of experts the `kept` best are left to choose from: a group's rank is the sum of its `members`
    best scores.
    """

    chosen: int
    scoring: str  # softmax or sigmoid
    normalized: bool
    eps: float
    factor: float
    groups: int
    kept: int
    members: int


def route(
    fused: Callable[..., mx.array], logits: mx.array, correction: mx.array | None, how: Routing
) -> tuple[mx.array, mx.array]:
    """`Ops.route` for a device that computes functions element by element with `fused`."""
    scores = mx.sigmoid(logits) if how.scoring == "sigmoid" else mx.softmax(logits, axis=-1)
    # Ranks choose the experts; the scores without correction weigh them.
    ranks = scores if correction is None else scores + correction
    experts = top_k(in_top_groups(ranks, how.groups, how.kept, how.members), how.chosen)
    weights = mx.take_along_axis(scores, experts, axis=-1)
    if how.normalized:
        total = mx.sum(weights, axis=-1, keepdims=True)
        return experts, fused(normalized, weights, total, how.eps, how.factor)
    return experts, weights if how.factor == 1.0 else weights * how.factor


def mixture(fused: Callable[..., mx.array], outputs: mx.array, weights: mx.array) -> mx.array:
    """`Ops.mixture` for a device that computes functions element by element with `fused`."""
    return mx.sum(fused(weighed, outputs, weights[..., None]), axis=-2)


def normalized(weights: mx.array, total: mx.array, eps: float, factor: float) -> mx.array:
    """Routing weights that add up to `factor`, but for `eps`, from some that add up to `total`."""
    return weights / (total + eps) * factor


def weighed(outputs: mx.array, weights: mx.array) -> mx.array:
    """Outputs times their routing weights, in the dtype of the outputs."""
    return outputs * weights.astype(outputs.dtype)


def top_k(scores: mx.array, count: int) -> mx.array:
    """Indices `[..., count]` of the largest scores `[..., E]`, in any order."""
    first = scores.shape[-1] - count
    return mx.argpartition(scores, kth=first, axis=-1)[..., first:]


def in_top_groups(scores: mx.array, groups: int, kept: int, members: int) -> mx.array:
    """Scores `[..., E]` with minus infinity outside the `kept` best of `groups` equal groups; see `Routing`."""
    if groups == kept:
        return scores
    grouped = scores.reshape(*scores.shape[:-1], groups, -1)
    ranks = mx.sum(mx.topk(grouped, members, axis=-1), axis=-1)
    lowest = mx.argpartition(ranks, kth=groups - kept, axis=-1)[..., : groups - kept, None]
    return mx.put_along_axis(grouped, lowest, mx.array(-mx.inf, grouped.dtype), axis=-2).reshape(scores.shape)
