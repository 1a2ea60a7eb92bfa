"""Logits of several kinds, and each token's share of a draw, in float64 and by sorting everything."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

KINDS = ["normal", "sharp", "tied", "equal", "mostly impossible", "one possible", "far apart"]


def made(kind: str, size: int, seed: int) -> Any:
    """Logits float32 `[size]` of a kind."""
    random = np.random.default_rng(seed)
    x = random.normal(size=size) * {"sharp": 12, "far apart": 1e30}.get(kind, 2)
    if kind == "tied":
        x = np.round(x)
    if kind == "equal":
        x[:] = x[0]
    if kind == "mostly impossible":
        x[random.permutation(size)[: size * 9 // 10]] = -math.inf
    if kind == "one possible":
        x[np.arange(size) != random.integers(size)] = -math.inf
    return x.astype(np.float32)


def in_order(x: Any) -> Any:
    """Ids, the greatest value first, of equal ones the lowest."""
    return np.lexsort((np.arange(len(x)), -x))


def shares(x: Any, temperature: float, top_k: int, top_p: float, min_p: float) -> Any:
    """Probabilities float64 after the filters, one step after the other."""
    scaled = ((x - x.max()) / np.float32(temperature)).astype(np.float32)
    weights = np.exp(scaled.astype(np.float64))
    order = in_order(x)
    if top_k:
        weights[order[top_k:]] = 0
    if top_p < 1:
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[(before >= top_p * weights.sum()) & (np.arange(len(x)) > 0)]] = 0
    if min_p:
        weights[scaled < np.float32(math.log(min_p))] = 0
    return weights / weights.sum()
