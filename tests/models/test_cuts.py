"""The kernels' promise for whole models: a token's logits and what is kept of it are the same bits, however it is read.

At once with the prompt, in pieces, or decoded one by one; on one thread or two. Frequencies of RoPE that depend on the
length of the sequence are no part of it: there the same token is another number in a longer prompt.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from places import TESTS

from runner.cache.caches import Caches
from runner.cache.kv import KVCache
from runner.config.rope import depends_on_length
from runner.engine.loaded import Loaded, open_loaded
from runner.nn.batch import Batch
from runner.ops import cpu as kernels
from runner.ops.device import current

FAMILIES = {path.parent.name: path.parent for path in (TESTS / "fixtures" / "families").glob("*/config.json")}
FEW = [
    "gemma2-base", "qwen3_next-base", "deepseek_v2-grouped", "gpt_oss-base", "llama4_text-base", "falcon_h1-base",
    "bloom-base", "gemma3n_text-base",
]  # fmt: skip
"""One of each kind: windows, soft-capping, latents, sinks, chunks, experts, the delta rule, Mamba, ALiBi, AltUp."""

LONG = [1 + (7 * i + i // 5) % 30 for i in range(100)]
PROMPT = LONG[:37]

pytestmark = pytest.mark.skipif(not current().ops.one_form, reason="a promise of the CPU kernels")


def read(engine: Loaded, cuts: list[int], prompt: list[int] = PROMPT) -> tuple[mx.array, Caches]:
    """Logits `[T, V]` of the prompt read in pieces of these sizes, and the caches behind it."""
    caches, rows = engine.new_caches(), []
    for count in cuts:
        start = caches.offset
        hidden = engine.model(Batch(mx.array([prompt[start : start + count]], dtype=mx.int32), start), caches)
        rows.append(engine.model.logits(hidden)[0])
        mx.eval(rows[-1], *caches.arrays)
    return mx.concatenate(rows), caches


def kept(one: Caches, other: Caches) -> list[tuple[mx.array, mx.array]]:
    """Pairs of what should be equal: rows that both hold, and states."""
    found: list[tuple[mx.array, mx.array]] = []
    for a, b in zip(one, other, strict=True):
        if isinstance(a, KVCache) and isinstance(b, KVCache):
            first = max(cache.offset - cache.arrays[0].shape[2] for cache in (a, b)) if a.forgets else 0
            first = max(first, 0, *(cache._start for cache in (a, b)))
            mine, its = a.rows(first, a.offset), b.rows(first, b.offset)
        else:
            like = mx.zeros((1, 1))
            mine, its = a.read(like), b.read(like)
        found += [(mine[name], its[name]) for name in mine]
    return found


def pieces(size: int) -> list[int]:
    return [min(size, len(PROMPT) - at) for at in range(0, len(PROMPT), size)]


def check(path: Path) -> None:
    engine = open_loaded(path)
    scaling: Any = getattr(engine.config, "rope_scaling", None)
    if scaling is not None and depends_on_length(scaling):
        pytest.skip("its positions depend on the length of the sequence")
    chance = random.Random(3)
    some: list[int] = []
    while sum(some) < len(PROMPT):
        some.append(min(chance.randint(1, 12), len(PROMPT) - sum(some)))
    threads = kernels.num_threads()
    whole, behind = read(engine, [len(PROMPT)])
    for count, cuts in [(1, pieces(1)), (2, pieces(7)), (1, pieces(16)), (2, some)]:
        from runner.ops.cpu import _C

        _C.set_num_threads(count)
        logits, caches = read(engine, cuts)
        _C.set_num_threads(threads)
        assert mx.array_equal(logits, whole), cuts
        assert all(mx.array_equal(*pair) for pair in kept(behind, caches)), cuts


@pytest.mark.parametrize("family", FEW)
def test_a_token_is_the_same_bits_however_it_is_read(family: str) -> None:
    check(FAMILIES[family])


@pytest.mark.parametrize("family", ["llama4_text-base", "mixtral-window"])
def test_rows_that_a_cache_has_dropped_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind position 64 there are several blocks of keys: they begin where they would with all rows there."""
    monkeypatch.setattr("runner.cache.kv.STEP", 4)
    engine = open_loaded(FAMILIES[family])
    whole, _ = read(engine, [100], LONG)
    for cuts in ([50, 50], [7] * 14 + [2]):
        assert mx.array_equal(read(engine, cuts, LONG)[0], whole), cuts


@pytest.mark.long
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(FEW)))
def test_every_family(family: str) -> None:
    check(FAMILIES[family])
