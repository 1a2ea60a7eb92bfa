"""Products of experts and capped attention against naive loops."""

from __future__ import annotations

import functools
import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.nn.fast import NO_MASK, scaled_dot_product_attention
from runner.nn.linear import PlainLinear
from runner.nn.mlp import GLU
from runner.nn.moe import SORTED_FROM, ExpertLinear, MoE, PlainExperts, QuantizedExperts
from runner.ops.device import CPU_WITHOUT_KERNELS, METAL, current
from runner.ops.quantized import QuantizedWeight
from runner.ops.routing import in_top_groups
from runner.ops.table import PORTABLE, Ops

TABLES = list({ops.name: ops for ops in (PORTABLE, CPU_WITHOUT_KERNELS, current().ops)}.values())
by_table = pytest.mark.parametrize("ops", TABLES, ids=lambda ops: ops.name)


def looped(x: mx.array, weight: mx.array, experts: mx.array) -> mx.array:
    """Products with the experts' matrices, one for each token and chosen expert."""
    whole = mx.broadcast_to(x, (*experts.shape, 1, x.shape[-1]))
    rows = whole.reshape(-1, x.shape[-1])
    results = [weight[int(e)] @ rows[i] for i, e in enumerate(np.array(experts).flatten())]
    return mx.stack(results).reshape(*experts.shape, 1, -1)


def rand(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


@by_table
@given(
    batch=st.integers(1, 3), length=st.integers(1, 9), chosen=st.integers(1, 4), spread=st.booleans(),
    per_choice=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_gathered_products(
    ops: Ops, batch: int, length: int, chosen: int, spread: bool, per_choice: bool, seed: int
) -> None:
    weight = rand(6, 48, 64, seed=seed)
    x = rand(batch, length, chosen if per_choice else 1, 1, 64, seed=seed + 1)
    ids = mx.random.randint(0, 6 if spread else 1, (batch, length, chosen), key=mx.random.key(seed)).astype(mx.uint32)
    wanted = looped(x, weight, ids)
    assert mx.allclose(ops.gather_linear(x, weight, ids), wanted, atol=1e-3)
    packed = mx.quantize(weight, group_size=32, bits=4)
    form = {"group_size": 32, "bits": 4, "mode": "affine"}
    found = ops.gather_quantized_linear(x, QuantizedWeight(*packed, **form), ids)
    wanted = looped(x, mx.dequantize(*packed, **form), ids)
    assert mx.allclose(found, wanted, atol=5e-3)


@by_table
@given(rows=st.integers(1, 40), spread=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_products_of_rows_in_order(ops: Ops, rows: int, spread: int, seed: int) -> None:
    """Passing `sorted_indices` for sorted experts changes no result."""
    weight, x = rand(6, 48, 64, seed=seed), rand(rows, 1, 64, seed=seed + 1)
    ids = mx.sort(mx.random.randint(0, spread, (rows,), key=mx.random.key(seed)).astype(mx.uint32))
    assert mx.allclose(ops.gather_linear(x, weight, ids, sorted_indices=True), looped(x, weight, ids), atol=1e-3)
    packed = mx.quantize(weight, group_size=32, bits=4)
    form = {"group_size": 32, "bits": 4, "mode": "affine"}
    found = ops.gather_quantized_linear(x, QuantizedWeight(*packed, **form), ids, sorted_indices=True)
    assert mx.allclose(found, looped(x, mx.dequantize(*packed, **form), ids), atol=5e-3)


@by_table
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 40), (2, 17)])
def test_sorting_by_expert_changes_nothing(ops: Ops, packed: bool, batch: int, length: int) -> None:
    def experts(out: int, width: int, seed: int) -> ExpertLinear:
        weight, bias = rand(6, out, width, seed=seed) / width**0.5, rand(6, out, seed=seed + 1)
        if not packed:
            return PlainExperts(weight, bias, ops=ops)
        return QuantizedExperts(
            *mx.quantize(weight, group_size=32, bits=8), bias, bits=8, group_size=32, mode="affine", ops=ops
        )

    layer = MoE(
        GLU(activation="silu", ops=ops), PlainLinear(rand(6, 64, seed=1), ops=ops), experts(64, 64, 2),
        experts(64, 32, 4), num_experts_per_tok=3, norm_topk_prob=True,
    )  # fmt: skip
    x = rand(batch, length, 64, seed=6)
    chosen, _ = layer.route(x)
    plain, sorted_indices = layer.feed(x[:, :, None, None], chosen), layer.sorted(x, chosen)
    assert plain.shape == sorted_indices.shape == (batch, length, 3, 1, 64)
    assert mx.allclose(plain, sorted_indices, atol=5e-3 if packed else 1e-5)


@pytest.mark.parametrize(("groups", "kept", "members"), [(4, 2, 1), (4, 1, 2), (3, 2, 2), (4, 4, 1)])
def test_only_experts_of_the_best_groups_are_left(groups: int, kept: int, members: int) -> None:
    scores = rand(2, 3, 12, seed=1)
    found = np.array(in_top_groups(scores, groups, kept, members))
    size = (-1, groups, 12 // groups)
    for row, left in zip(np.array(scores).reshape(size), found.reshape(size), strict=True):
        ranks = [sum(sorted(group)[-members:]) for group in row]
        best = sorted(range(groups), key=lambda index: ranks[index])[-kept:]
        for index in range(groups):
            assert np.array_equal(left[index], row[index] if index in best else np.full_like(row[index], -np.inf))


@pytest.mark.parametrize("ops", [PORTABLE, METAL], ids=lambda ops: ops.name)
@pytest.mark.parametrize("factor", [1.0, 2.5])
@pytest.mark.parametrize("normalizes", [True, False])
def test_routing_weights(ops: Ops, factor: float, normalizes: bool) -> None:
    matrix, stacked = PlainLinear(rand(6, 4, seed=0)), PlainExperts(rand(6, 4, 4, seed=0))
    layer = MoE(
        GLU(activation="silu", ops=ops), matrix, stacked, stacked, num_experts_per_tok=2, norm_topk_prob=normalizes,
        routed_scaling_factor=factor, ops=ops,
    )  # fmt: skip
    x = rand(2, 3, 4, seed=1)
    experts, found = layer.route(x)
    scores = mx.take_along_axis(mx.softmax(x @ matrix.weight.T, axis=-1), experts, axis=-1)
    wanted = scores / mx.sum(scores, axis=-1, keepdims=True) if normalizes else scores
    assert mx.allclose(found, wanted * factor, rtol=1e-5)


def test_many_rows_are_sorted_and_few_are_not() -> None:
    seen: list[bool] = []

    class Watched(MoE):
        def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
            experts = mx.zeros((*x.shape[:2], 2), dtype=mx.uint32)
            return experts, mx.ones(experts.shape)

        def feed(self, rows: mx.array, experts: mx.array, *, sorted_indices: bool = False) -> mx.array:
            seen.append(sorted_indices)
            return mx.broadcast_to(rows, (*experts.shape, 1, rows.shape[-1]))

    matrix, stacked = PlainLinear(rand(2, 4, seed=0)), PlainExperts(rand(2, 4, 4, seed=0))
    layer = Watched(GLU(activation="silu"), matrix, stacked, stacked, num_experts_per_tok=2, norm_topk_prob=False)
    for length in (1, SORTED_FROM // 2 - 1, SORTED_FROM // 2):
        x = rand(1, length, 4, seed=length)
        assert mx.allclose(layer(x), 2 * x)
    assert seen == [False, False, True]


def test_capped_attention_without_a_mask() -> None:
    q, k, v = rand(1, 4, 4, 8, seed=1), rand(1, 2, 11, 8, seed=2), rand(1, 2, 11, 8, seed=3)
    capped = functools.partial(scaled_dot_product_attention, q, k, v, scale=1.0, softcap=2.0)
    assert mx.allclose(capped(NO_MASK), capped(mx.ones((4, 11), dtype=mx.bool_)), atol=1e-6)


@pytest.mark.parametrize(
    ("queries", "keys", "window"), [(1, 1, None), (1, 9, None), (5, 5, None), (4, 11, 3), (7, 7, 2)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_capped_attention(queries: int, keys: int, window: int | None, masked: bool) -> None:
    q, k, v = rand(2, 6, queries, 8, seed=1), rand(2, 3, keys + 5, 8, seed=2), rand(2, 3, keys + 5, 4, seed=3)
    visible = np.zeros((2, 6, queries, keys), dtype=bool)
    wanted = np.zeros((2, 6, queries, 4))
    mask = mx.random.randint(0, 2, (2, 1, queries, keys), key=mx.random.key(5)).astype(mx.bool_) if masked else None
    for b, h, i in np.ndindex(2, 6, queries):
        position = keys - queries + i
        for j in range(keys):
            seen = j <= position and (window is None or j > position - window)
            visible[b, h, i, j] = bool(mask[b, 0, i, j]) or j == 0 if mask is not None else seen
        scores = np.array([float(mx.sum(q[b, h, i] * k[b, h // 2, j])) * 0.7 for j in range(keys)])
        scores = np.where(visible[b, h, i], 2.5 * np.tanh(scores / 2.5), -math.inf)
        routing_weights = np.exp(scores - scores.max())
        wanted[b, h, i] = (routing_weights / routing_weights.sum()) @ np.array(v[b, h // 2, :keys])
    given_mask = None if mask is None else mx.array(visible[:, :1])
    given_window = None if masked else window
    found = scaled_dot_product_attention(
        q,
        k,
        v,
        given_mask,
        scale=0.7,
        softcap=2.5,
        window=given_window,
        length=keys,  # of buffers with room for five
    )
    assert np.allclose(np.array(found), wanted, atol=1e-5)
