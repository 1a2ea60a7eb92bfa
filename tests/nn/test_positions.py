"""ALiBi against loops over heads, queries and keys; learned positions, and the end of their table."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from runner.errors import UsageError
from runner.nn.batch import Batch
from runner.nn.fast import scaled_dot_product_attention
from runner.nn.positions import Alibi, alibi_slopes, positions


def batch(rows: int, length: int, offset: int | mx.array = 0, mask: mx.array | None = None) -> Batch:
    return Batch(mx.zeros((rows, length), dtype=mx.int32), offset, mask=mask)


def looped(heads: int, length: int, keys: int, scale: float) -> mx.array:
    """ALiBi biases `[heads, length, keys]`, computed one by one."""
    slopes = alibi_slopes(heads)
    rows = [
        [[-scale * slope * (q - k) if k <= q else -math.inf for k in range(keys)] for q in range(keys - length, keys)]
        for slope in slopes
    ]
    return mx.array(rows)


def test_slopes_of_the_paper() -> None:
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]  # arXiv:2108.12409, section 3
    # Another number than a power of two, by hand: four heads' slopes, then the first and third of eight heads'.
    assert alibi_slopes(6) == [2**-2.0, 2**-4.0, 2**-6.0, 2**-8.0, 2**-1.0, 2**-3.0]


@pytest.mark.parametrize(("length", "keys"), [(1, 1), (1, 9), (5, 5), (3, 11)])
@pytest.mark.parametrize("heads", [4, 6])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_alibi_against_loops(length: int, keys: int, heads: int, scale: float) -> None:
    mask = Alibi(num_attention_heads=heads, scale=scale)(batch(2, length, keys - length), keys, mx.float32).mask
    assert mask is not None and mask.shape == (1, heads, length, keys)
    assert mx.allclose(mask[0], looped(heads, length, keys, scale), atol=1e-6)


def test_bfloat16_keeps_what_is_near_exact() -> None:
    """At position 4000 an absolute bias (250) rounds to integers in bfloat16; distances in sixteenths are exact."""
    mask = Alibi(num_attention_heads=2)(batch(1, 1, 4000), 4001, mx.bfloat16).mask
    assert mask is not None and mask.dtype == mx.bfloat16
    wanted = [-(2.0**-4) * back for back in range(8, -1, -1)]
    assert mask[0, 0, 0, -9:].astype(mx.float32).tolist() == wanted


def test_terms_rounded_as_in_training() -> None:
    """Falcon rounds the position, and slope times position, to bfloat16 (8 bits of precision)."""
    mask = Alibi(num_attention_heads=4, dtype=mx.bfloat16)(batch(1, 1, 300), 301, mx.float32).mask
    assert mask is not None
    # The first slope is 1/4: 300 is a bfloat16 and 257 is not (256 is nearest): 75 - 64, where 75 - 64.25 is exact.
    assert -mask[0, 0, 0, 257].item() == 75 - 64


def test_rows_with_padding_are_as_alone() -> None:
    """A row of three tokens behind two columns of padding, and one of five tokens, give what each gives alone."""
    q, k, v = (mx.random.normal((2, 4, n, 8), key=mx.random.key(n)) for n in (2, 5, 6))
    k, v = k[:, :, :5], v[:, :, :5]
    visible = mx.array([[False, False, True, True, True], [True] * 5])[:, None, None]
    causal = mx.arange(5)[None] <= mx.arange(3, 5)[:, None]
    alibi = Alibi(num_attention_heads=4, dtype=mx.bfloat16)
    masked = alibi(batch(2, 2, mx.array([1, 3]), visible & causal), 5, mx.float32).mask
    together = scaled_dot_product_attention(q, k, v, masked, scale=0.3)
    for row, first in ((0, 2), (1, 0)):
        mask = alibi(batch(1, 2, 3 - first), 5 - first, mx.float32).mask
        alone = scaled_dot_product_attention(
            q[row : row + 1], k[row : row + 1, :, first:], v[row : row + 1, :, first:], mask, scale=0.3
        )
        assert mx.allclose(together[row], alone[0], atol=1e-6)


def test_an_additive_mask_is_added() -> None:
    extra = mx.array([0.5, -1.0, -mx.inf])
    mask = Alibi(num_attention_heads=4)(batch(1, 1, 2, extra), 3, mx.float32).mask
    assert mask is not None and mx.allclose(mask[0], looped(4, 1, 3, 1.0) + extra)


def test_positions_of_each_row() -> None:
    assert positions(batch(1, 3, 5), 8).tolist() == [5, 6, 7]
    assert positions(batch(2, 2, mx.array([4, 0])), 8).tolist() == [[4, 5], [0, 1]]


@pytest.mark.parametrize("offset", [6, mx.array([0, 6])])
def test_positions_end_with_their_table(offset: int | mx.array) -> None:
    with pytest.raises(UsageError, match="positions for 8 tokens; position 8 is"):
        positions(batch(2, 3, offset), 8)
