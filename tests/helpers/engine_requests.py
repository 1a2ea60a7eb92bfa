"""Requests to an engine over small models of every kind of memory, and the naive answers to hold them against."""

from __future__ import annotations

import dataclasses
import functools
import random
import time
from collections.abc import Sequence

import pytest
from decoding import decode
from places import TESTS

from runner.engine.engine import Engine
from runner.engine.loaded import Loaded, open_loaded
from runner.engine.prefill import prefill
from runner.engine.sampler import Sampler, SamplingState
from runner.engine.sampling import SamplingParams
from runner.engine.ticket import Ticket

FAMILIES = TESTS / "fixtures" / "families"
KINDS = {
    "rows": TESTS / "fixtures" / "llama" / "llama-gqa",
    "window": FAMILIES / "gemma3_text-base",
    "latent": FAMILIES / "deepseek_v3-base",
    "indexed": FAMILIES / "deepseek_v32-base",
    "shared": FAMILIES / "gemma3n_text-base",
    "delta rule": FAMILIES / "qwen3_next-base",
    "Mamba": FAMILIES / "mamba-base",
    "Mamba 2 beside rows": FAMILIES / "falcon_h1-base",
    "mixture": FAMILIES / "mixtral-base",
    "chunks": FAMILIES / "llama4_text-base",
    "two lengths": FAMILIES / "phi3-longrope",
}
DRAWN = SamplingParams(temperature=0.9, top_k=20, seed=5)


def naive(loaded: Loaded, ids: Sequence[int], count: int, params: SamplingParams | None = None) -> list[int]:
    """An answer by itself, token by token, with nothing kept or shared."""

    def job() -> list[int]:
        sampler = Sampler(loaded.device.ops)
        state = SamplingState(params or SamplingParams(temperature=0.0), loaded.config.vocab_size, ids)
        caches, found, known = loaded.new_caches(), [], list(ids)
        border, made = loaded.config.rope_border, 0
        while made < count:
            logits = prefill(loaded.model, known[caches.offset :], caches)
            stop = count - made if border is None or len(known) > border else min(count - made, border - len(known) + 1)
            for sampled in decode(loaded.model, logits, caches, lambda row: sampler(row[None], [state]), stop):
                found.append(int(sampled.tokens.item()))
                known.append(found[-1])
                made += 1
            caches = loaded.new_caches()
        return found

    return loaded.run(job)


def prompts(loaded: Loaded, lengths: Sequence[int], seed: int = 1) -> list[list[int]]:
    draw = random.Random(seed)
    return [[1 + draw.randrange(loaded.config.vocab_size - 1) for _ in range(length)] for length in lengths]


def ids(ticket: Ticket) -> list[int]:
    return [token.id for token in ticket]


def idle(engine: Engine, model: str = "") -> None:
    """Wait until there are no requests."""
    for _ in range(2000):
        if not engine.status(model).running and not engine.status(model).waiting:
            return
        time.sleep(0.005)
    raise AssertionError("there are requests still")


@functools.cache
def opened(kind: str) -> Loaded:
    return open_loaded(KINDS[kind], dtype="float32")


def chunked(monkeypatch: pytest.MonkeyPatch, loaded: Loaded, chunk: int) -> None:
    """Passes of so many tokens."""
    monkeypatch.setattr(loaded, "device", dataclasses.replace(loaded.device, chunk=chunk))
