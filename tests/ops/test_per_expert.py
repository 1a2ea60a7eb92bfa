"""Products with one matrix per expert: equal to plain MLX's, and without copies of the matrices."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from runner.ops import per_expert as per_expert
from runner.ops.table import PORTABLE


def test_an_experts_matrix_is_read_where_it_lies() -> None:
    stacked = mx.random.normal((4, 256, 1024))
    mx.eval(stacked)
    before = mx.get_active_memory()
    parts = [per_expert.matrix(stacked, expert) for expert in (2, 0, 3)]
    mx.eval(parts)
    assert mx.get_active_memory() - before < stacked.nbytes // 16
    assert mx.array_equal(parts[1], stacked[0]) and mx.array_equal(parts[2], stacked[3])


@pytest.mark.parametrize("sorted_indices", [False, True])
def test_products_by_expert_are_the_gathered_ones(*, sorted_indices: bool) -> None:
    x, weight = mx.random.normal((7, 1, 32)), mx.random.normal((5, 24, 32))
    chosen = np.random.default_rng(1).integers(0, 5, 7).astype(np.int32)
    experts = mx.array(np.sort(chosen) if sorted_indices else chosen)
    found = per_expert.gather_linear(PORTABLE.linear)(x, weight, experts, sorted_indices=sorted_indices)
    wanted = mx.stack([x[i] @ weight[expert].T for i, expert in enumerate(np.array(experts).tolist())])
    assert found.shape == (7, 1, 24) and mx.allclose(found, wanted, rtol=1e-5, atol=1e-5)
