"""Draws by the kernel on an NVIDIA GPU, against shares in float64 after sorting everything."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from draws import KINDS, in_order, made, shares

from runner.ops.device import current
from runner.ops.picking import Draw

needs_gpu = pytest.mark.skipif(not current().compiles, reason="there is no kernel for this device")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 0.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.01},
    {"top_k": 1000, "top_p": 0.5},
]


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 31, 1000, 4099, 128256])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 50.0])
def test_each_token_is_drawn_in_its_share(kind: str, size: int, temperature: float) -> None:
    from runner.ops.cuda.draw import draw

    x = made(kind, size, size)
    wanted: list[tuple[Draw, int, Any]] = []
    for options in OPTIONS:
        # The sum that top_p is compared with is rounded: try what stays just below it and just above.
        full = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
        with np.errstate(over="ignore", invalid="ignore"):
            fewer, more = (shares(x, **{**full, "top_p": full["top_p"] * (1 + sign * 4e-7)}) for sign in (-1, 1))
        ends, sure = np.cumsum(more), np.array_equal(fewer, more)
        kept = [token for token in in_order(x) if more[token] > 0]
        for token in {*kept[:3], *kept[-3:], *kept[:: len(kept) // 4 + 1]}:
            chance = float(min(ends[token] - more[token] / 2, 1 - 2**-53))
            wanted.append((Draw(chance, **full), token if sure and more[token] > 2e-6 else -1, more))
    rows = mx.broadcast_to(mx.array(x), (len(wanted), size))
    tokens, peaks = draw(rows, [one for one, _, _ in wanted])
    assert tokens.dtype == mx.uint32 and (np.array(peaks) == x.max()).all()
    for found, (_, token, more) in zip(np.array(tokens).tolist(), wanted, strict=True):
        assert found == token if token >= 0 else more[found] > 0


@needs_gpu
def test_rows_of_all_sorts_beside_each_other() -> None:
    from runner.ops.cuda.draw import draw

    random = np.random.default_rng(0)
    logits = random.normal(size=(9, 5000)).astype(np.float32) * 3
    logits[6, 17], logits[7, 3], logits[8, :] = math.nan, math.inf, -math.inf
    rows = [Draw(random.random(), 0.7 + 0.1 * row, top_k=row * 9, top_p=1 - 0.1 * row) for row in range(9)]
    rows[2] = Draw(0.0, 0.0)
    tokens, peaks = draw(mx.array(logits), rows)
    alone = [draw(mx.array(logits[row : row + 1]), rows[row : row + 1])[0].item() for row in range(9)]
    assert np.array(tokens).tolist() == alone and tokens[2].item() == logits[2].argmax()
    assert math.isnan(peaks[6].item()) and peaks[7].item() == math.inf and peaks[8].item() == -math.inf  # type: ignore[arg-type]
