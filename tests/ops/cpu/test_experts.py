"""A mixture's kernels: products with an expert for each row, the choice of experts, and what they put out, added."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twins import numpy

from runner.ops import cpu as kernels
from runner.ops.cpu import _C
from runner.ops.quantized import QuantizedWeight
from runner.ops.routing import Routing
from runner.ops.table import PORTABLE, Ops

fast_settings = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
FORMS = ["float32", "float16", "bfloat16", *[f"affine{bits}" for bits in (2, 3, 4, 5, 6, 8)], "mxfp4", "mxfp8", "nvfp4"]
SMALL = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


def stack(form: str, shape: tuple[int, int, int], group: int, seed: int) -> mx.array | QuantizedWeight:
    """Matrices of experts, `[E, out, in]`, in one of the forms that weights come in."""
    weight = mx.random.normal(shape, key=mx.random.key(seed))
    if form in SMALL:
        bits, group = SMALL[form]
        return QuantizedWeight(*mx.quantize(weight, mode=form), None, group, bits, form)
    if form.startswith("affine"):
        bits = int(form[6:])
        packed, scales, shifts = mx.quantize(weight, group_size=group, bits=bits)
        kind = (mx.float32, mx.float16, mx.bfloat16)[seed % 3]
        return QuantizedWeight(packed, scales.astype(kind), shifts.astype(kind), group, bits, "affine")
    return weight.astype(getattr(mx, form))


def gathered(
    ops: Ops, x: mx.array, matrices: mx.array | QuantizedWeight, ids: mx.array, bias: mx.array | None
) -> mx.array:
    if isinstance(matrices, QuantizedWeight):
        return ops.gather_quantized_linear(x, matrices, ids, bias)
    return ops.gather_linear(x, matrices, ids, bias)


def alone(
    ops: Ops, row: mx.array, matrices: mx.array | QuantizedWeight, expert: int, bias: mx.array | None
) -> mx.array:
    """What `linear` makes of one row with the matrix of one expert."""
    own = None if bias is None else bias[expert]
    if not isinstance(matrices, QuantizedWeight):
        return ops.linear(row, matrices[expert], own)
    shifts = None if matrices.biases is None else matrices.biases[expert]
    part = matrices._replace(weight=matrices.weight[expert], scales=matrices.scales[expert], biases=shifts)
    return ops.quantized_linear(row, part, own)


@fast_settings
@given(
    st.sampled_from(FORMS),
    st.sampled_from([(1, 1), (1, 7), (40, 1), (3, 20), (90, 5)]),
    st.integers(1, 9),
    st.integers(1, 70),
    st.integers(1, 9),
    st.sampled_from([32, 64, 128]),
    st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
def test_a_row_gets_what_its_experts_matrix_makes_of_it(
    ops: Ops,
    form: str,
    pairs: tuple[int, int],
    experts: int,
    n: int,
    groups: int,
    group: int,
    dtype: mx.Dtype,
    shared: bool,
    biased: bool,
    threads: int,
    seed: int,
) -> None:
    """Bit for bit, whoever else chose that expert, and by definition within rounding."""
    if ops is PORTABLE:
        pytest.skip("MLX's own products promise nothing of the kind")
    tokens, chosen = pairs
    plain = form.startswith(("float", "bfloat"))
    k = groups * group - (seed % 7 if plain else 0)
    matrices = stack(form, (experts, n, k), group, seed)
    bias = mx.random.normal((experts, n), key=mx.random.key(seed + 2)) if biased else None
    values = numpy(mx.random.normal((tokens, 1 if shared else chosen, k), key=mx.random.key(seed + 1)))
    values[::3, :, seed % k] *= 40
    values[seed % tokens, 0, seed // 7 % k] = (np.nan, np.inf, 1e30, 0.5)[seed % 4]
    x = mx.array(values).astype(dtype)
    ids = np.random.default_rng(seed).integers(0, experts, (tokens, chosen))
    before = kernels.num_threads()
    wanted = mx.stack(
        [alone(ops, x[t, None, 0 if shared else c], matrices, int(ids[t, c]), bias) for t, c in np.ndindex(ids.shape)]
    )
    try:
        _C.set_num_threads(threads)
        found = gathered(ops, x[None, :, :, None], matrices, mx.array(ids[None].astype(np.int32)), bias)
        mx.eval(found)
    finally:
        _C.set_num_threads(before)
    assert found.shape == (1, tokens, chosen, 1, n) and found.dtype == dtype
    assert np.array_equal(numpy(found).ravel(), numpy(wanted).ravel(), equal_nan=True)


@pytest.mark.parametrize("form", ["float32", "affine4", "mxfp4"])
def test_gathered_products_against_numpy(ops: Ops, form: str) -> None:
    matrices, bias = stack(form, (5, 24, 96), 32, 3), mx.random.normal((5, 24), key=mx.random.key(4))
    whole = matrices.dequantize() if isinstance(matrices, QuantizedWeight) else matrices
    x = mx.random.normal((2, 3, 1, 1, 96), key=mx.random.key(5))
    ids = mx.random.randint(0, 5, (2, 3, 2), key=mx.random.key(6)).astype(mx.uint32)
    weights, rows, chosen = (np.array(a.astype(mx.float32), dtype=np.float64) for a in (whole, x, ids))
    wanted = np.stack(
        [weights[int(e)] @ rows[b, t, 0, 0] + np.array(bias)[int(e)] for (b, t, _), e in np.ndenumerate(chosen)]
    )
    found = numpy(gathered(ops, x, matrices, ids, bias)).reshape(-1, 24)
    assert np.allclose(found, wanted, atol=4e-4 * wanted.std(), rtol=0)


@pytest.mark.parametrize("form", ["float32", "affine4", "affine3"])
def test_more_rows_than_are_worked_on_at_a_time(ops: Ops, form: str) -> None:
    """Some 700 pairs, of which one expert has 500."""
    if ops is PORTABLE:
        pytest.skip("compared with itself")
    matrices = stack(form, (4, 40, 64), 32, 1)
    x = mx.random.normal((700, 1, 64), key=mx.random.key(2))
    ids = np.where(np.arange(700) < 500, 2, np.arange(700) % 4)
    np.random.default_rng(3).shuffle(ids)
    found = numpy(gathered(ops, x, matrices, mx.array(ids.astype(np.uint32)), None))[:, 0]
    for expert in range(4):
        rows = x[mx.array(np.flatnonzero(ids == expert)), 0]
        assert np.array_equal(found[ids == expert], numpy(alone(ops, rows, matrices, expert, None)))


@pytest.mark.parametrize("form", ["float32", "affine4"])
def test_no_such_expert(ops: Ops, form: str) -> None:
    if ops is PORTABLE:
        pytest.skip("MLX reads past the stack")
    x = mx.ones((4, 1, 32))
    found = numpy(gathered(ops, x, stack(form, (3, 8, 32), 32, 1), mx.array([0, 3, -1, 2]), None))
    assert np.array_equal(np.isnan(found[:, 0, 0]), [False, True, True, False])
    assert gathered(ops, x[:0], stack(form, (3, 8, 32), 32, 1), mx.zeros((0,), mx.int32), None).shape == (0, 1, 8)


def routed(logits: np.ndarray, correction: np.ndarray | None, how: Routing) -> tuple[list[int], np.ndarray]:
    """A row's experts and routing weights by definition."""
    wide = logits.astype(np.float64)
    scores = 1 / (1 + np.exp(-wide)) if how.scoring == "sigmoid" else np.exp(wide - wide.max())
    scores = scores if how.scoring == "sigmoid" else scores / scores.sum()
    ranks = scores if correction is None else scores + correction
    size = len(ranks) // how.groups
    best = [-np.sort(-ranks[g * size : (g + 1) * size])[: how.members].sum() for g in range(how.groups)]
    kept = sorted(range(how.groups), key=lambda g: -best[g])[: how.kept]
    left = [i for i in range(len(ranks)) if i // size in kept]
    chosen = sorted(left, key=lambda i: -ranks[i])[: how.chosen]
    weights = scores[chosen] / (scores[chosen].sum() + how.eps if how.normalized else 1)
    return chosen, weights * how.factor


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(
    ("experts", "count", "groups", "kept", "members"),
    [(128, 8, 1, 1, 1), (6, 1, 1, 1, 1), (6, 6, 1, 1, 1), (24, 4, 4, 2, 2), (27, 2, 3, 1, 3), (1, 1, 1, 1, 1)],
)
def test_experts_are_chosen_by_their_scores(
    ops: Ops, scoring: str, corrected: bool, experts: int, count: int, groups: int, kept: int, members: int
) -> None:
    how = Routing(count, scoring, corrected, 1e-20, 2.5, groups, kept, members)
    logits = mx.random.normal((2, 70, experts), key=mx.random.key(experts)) * 2
    correction = mx.random.normal((experts,), key=mx.random.key(1)) * 0.2 if corrected else None
    ids, weights = ops.route(logits, correction, how)
    assert ids.shape == weights.shape == (2, 70, count) and weights.dtype == mx.float32
    rows = zip(numpy(logits).reshape(-1, experts), np.array(ids).reshape(-1, count), strict=True)
    for (row, found), given_weights in zip(rows, numpy(weights).reshape(-1, count), strict=True):
        chosen, wanted = routed(row, None if correction is None else numpy(correction), how)
        order = np.argsort(found)
        assert found[order].tolist() == sorted(chosen)
        assert np.allclose(given_weights[order], wanted[np.argsort(chosen)], rtol=2e-6)


def test_equal_scores_and_those_that_are_none(ops: Ops) -> None:
    if ops is PORTABLE:
        pytest.skip("MLX's partition says nothing of equals")
    how = Routing(2, "softmax", True, 0.0, 1.0, 1, 1, 1)
    logits = mx.array([[1.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, mx.nan, 2.0], [-mx.inf, -mx.inf, 0, 1]])
    ids, weights = ops.route(logits, None, how)
    assert np.array(ids)[[0, 1, 3]].tolist() == [[1, 2], [0, 1], [3, 2]]
    assert np.isnan(numpy(weights)[2]).all() and np.allclose(numpy(weights)[:2], 0.5)
    sigmoid = how._replace(scoring="sigmoid")
    assert np.array(ops.route(logits[2], None, sigmoid)[0]).tolist() == [2, 3]  # so that a NaN shows


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize(("rows", "count", "width"), [(1, 8, 2048), (70, 3, 37), (2, 1, 5)])
def test_outputs_are_weighed_and_added(ops: Ops, dtype: mx.Dtype, rows: int, count: int, width: int) -> None:
    outputs = mx.random.normal((1, rows, count, width), key=mx.random.key(1)).astype(dtype)
    weights = mx.random.uniform(shape=(1, rows, count), key=mx.random.key(2))
    wanted = np.einsum("rkd,rk->rd", numpy(outputs)[0].astype(np.float64), numpy(weights)[0].astype(np.float64))
    found = ops.mixture(outputs, weights)
    assert found.shape == (1, rows, width) and found.dtype == dtype
    assert np.allclose(numpy(found)[0], wanted, atol={mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}[dtype])
    if ops is not PORTABLE:
        assert mx.array_equal(found[:, -1:], ops.mixture(outputs[:, -1:], weights[:, -1:]))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("width", [2880, 37])
def test_the_clamped_glu_and_a_gated_expert(ops: Ops, dtype: mx.Dtype, width: int) -> None:
    x = (mx.random.normal((2, 3, 2 * width), key=mx.random.key(1)) * 4).astype(dtype)
    gate, up = np.minimum(numpy(x)[..., :width], 7.0), np.clip(numpy(x)[..., width:], -7.0, 7.0)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == mx.float32 else {"rtol": 0.02, "atol": 0.02}
    assert np.allclose(
        numpy(ops.clamped_glu(x, 1.702, 7.0)), gate / (1 + np.exp(-1.702 * gate)) * (up + 1), **tolerance
    )
    routed, shared, opens = x[..., :width], x[..., width:], x[..., :1]
    wanted = numpy(routed) + numpy(shared) / (1 + np.exp(-numpy(opens)))
    assert np.allclose(numpy(ops.add_gated(routed, opens, shared)), wanted, **tolerance)


def test_what_does_not_fit_is_refused() -> None:
    x, ids, weight = mx.ones((1, 2, 1, 1, 64)), mx.zeros((1, 2, 3), mx.int32), mx.ones((4, 8, 64))
    packed = mx.quantize(weight, group_size=32, bits=4)
    logits = mx.zeros((2, 8))
    for call, message in (
        (lambda: kernels.gather_linear(x, weight, ids.astype(mx.float32)), "expected int32 or uint32"),
        (lambda: kernels.gather_linear(x[..., :32], weight, ids), "whose leading dimensions broadcast"),
        (lambda: kernels.gather_linear(x, weight[0], ids), "expected 3 dimensions"),
        (lambda: kernels.gather_linear(x, weight, ids, mx.ones((8,))), "one for each row of weight"),
        (lambda: kernels.gather_quantized_linear(x, *packed, ids, group_size=32, bits=7), "no kernel for 7 bits"),
        (lambda: kernels.gather_quantized_linear(x, *packed, ids, group_size=64, bits=4), "scales have shape"),
        (lambda: kernels.gather_quantized_linear(x, *packed, ids, group_size=32, bits=4, mode="mxfp4"), "uint8"),
        (lambda: kernels.route(logits, None, count=9), "9 experts cannot be chosen of 8"),
        (lambda: kernels.route(logits, mx.ones((7,)), count=1), "correction has shape"),
        (lambda: kernels.route(logits, None, count=1, groups=3), "cannot be kept"),
        (lambda: kernels.mixture(mx.ones((2, 3, 4)), mx.ones((2, 2))), "mixture: weights are"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
