"""With kept prefixes, models of every kind of memory give a cold start's logits: bit for bit with the CPU kernels.

Random conversations with edits, side by side, while memory is taken away; see `test_prefixes` for the tree alone.
"""

from __future__ import annotations

import random
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from places import TESTS

from runner.engine.loaded import Loaded, open_loaded
from runner.engine.prefill import prefill
from runner.engine.prefix_files import PrefixFiles
from runner.engine.prefixes import Prefixes
from runner.ops.device import current

FAMILIES = TESTS / "fixtures" / "families"
MODELS = {
    "rows": TESTS / "fixtures" / "llama" / "llama-gqa",
    "window": TESTS / "fixtures" / "llama" / "mistral-window",
    "chunk": FAMILIES / "llama4_text-base",
    "latent": FAMILIES / "deepseek_v2-grouped",
    "indexed": FAMILIES / "deepseek_v32-base",
    "shared": FAMILIES / "gemma3n_text-base",
    "delta rule": FAMILIES / "qwen3_5_text-base",
    "mamba": FAMILIES / "mamba2-base",
    "mamba 1 and rows": FAMILIES / "jamba-base",
    "both in a layer": FAMILIES / "falcon_h1-base",
    "short convolution": FAMILIES / "lfm2-base",
}

DTYPES = ["float32", None] if current().ops.one_form else ["float32"]
"""Rows as they come, and in the device's own form. Other devices have none of their own, and their 16-bit sums are not
the same in any cut of a prompt: of a row too few they would tell no more than of rounding."""


def answer(loaded: Loaded, prefixes: Prefixes, ids: list[int], pick: random.Random) -> list[int]:
    """Read a prompt and answer it by a few ids picked at random; every row of logits is that of a cold start."""
    kept = prefixes.take(ids)
    logits: mx.array | None = None
    chunk = pick.randint(3, 16)
    for cut in sorted({*kept.places, len(ids)}):
        logits = prefill(loaded.model, ids[kept.caches.offset : cut], kept.caches, chunk=chunk)
        if cut in kept.places:
            prefixes.mark(kept)
    ids = list(ids)
    for _ in range(pick.randint(0, 5)):
        assert logits is not None
        check(loaded, ids, logits)
        ids.append(pick.randrange(1, 30))
        logits = prefill(loaded.model, ids[-1:], kept.caches)
    assert logits is not None
    check(loaded, ids, logits)
    # As often as not the last token was not fed, or one was that nobody saw.
    prefixes.give(kept, ids if pick.random() < 0.7 else ids[:-1])
    return ids


def check(loaded: Loaded, ids: list[int], logits: mx.array) -> None:
    wanted, found = (
        np.array(each.astype(mx.float32)) for each in (prefill(loaded.model, ids, loaded.new_caches()), logits)
    )
    if current().ops.one_form:  # a row's sums are the same in any cut of a prompt
        assert np.array_equal(found, wanted)
    else:
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kept_prefix_gives_the_logits_of_a_cold_start(
    kind: str, dtype: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("runner.cache.kv.STEP", 8)
    monkeypatch.setattr("runner.engine.prefixes.SPACING", 12)
    loaded = open_loaded(MODELS[kind], dtype=dtype)

    def begun() -> Prefixes:
        return Prefixes(loaded.new_caches, 1 << 30, PrefixFiles(tmp_path, 1 << 30, "a" * 64, loaded.new_caches()))

    prefixes = begun()
    pick = random.Random(kind)
    talks = [[1, 5, 9, 13]]
    for turn in range(14):
        before = pick.choice(talks)
        edited = before[: pick.randint(1, len(before))] if turn % 3 == 2 else before
        new = [pick.randrange(1, 30) for _ in range(pick.randint(1, 9))]
        talks.append(answer(loaded, prefixes, [*edited, *new][-loaded.config.context_length + 8 :], pick))
        if turn % 4 == 3:
            prefixes.evict(prefixes.stats.nbytes // 3)
        if turn == 9:  # another process
            assert prefixes.stats.reused > prefixes.stats.tokens // 4
            prefixes.flush()
            prefixes = begun()
    assert prefixes.stats.restored > 0
