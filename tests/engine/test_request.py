"""What surrounds an answer on a Mac: the wired limit, put back however it ends; chunks; freed buffers."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import pytest
from apple import Limit, metal, on_a_mac
from places import TESTS

import runner
from runner.engine import loaded as engines
from runner.errors import NumericsError
from runner.language_model import LanguageModel, device_notes
from runner.ops.memory import Memory
from runner.ops.owner import OWNER

MODEL = TESTS / "fixtures" / "llama" / "llama-gqa"
PROMPT = [5, 6, 7, 8]


def mac(limit: Limit, **settings: Any) -> LanguageModel:
    """A model on a Mac, to which no bytes are few."""
    lm = runner.load(MODEL)
    return dataclasses.replace(lm, engine=on_a_mac(lm.engine, metal(limit=limit), **settings))


@pytest.fixture(autouse=True)
def every_model_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "LARGE", 1)


def settled(limit: Limit) -> int:
    """The limit once the jobs that wait are done."""
    OWNER.run(lambda: None)
    return limit.now


def answer(lm: LanguageModel, **more: Any) -> Iterator[runner.Chunk]:
    bias = dict.fromkeys(lm.eos_token_ids, -1e9)
    return iter(lm.stream(PROMPT, **{"temperature": 0, "max_tokens": 20, "logit_bias": bias, **more}))


def test_an_answer_has_weights_and_cache_wired_and_puts_back_what_was_set() -> None:
    limit = Limit(start=7)
    lm = mac(limit)
    chunks = answer(lm)
    assert limit.said == []  # nothing before the first token is wanted
    next(chunks)
    rows = lm.config.memory(0)[0]
    cache = lm.config.num_hidden_layers * rows.numbers(len(PROMPT) + 20) * lm.engine.dtype.size
    assert cache > 0 and limit.now >= lm.nbytes + cache + engines.MARGIN
    assert len(list(chunks)) == 19
    assert settled(limit) == 7 and len(limit.said) == 2


def closed(chunks: Any) -> None:
    next(chunks)
    chunks.close()


def dropped(chunks: Any) -> None:
    next(chunks)


def thrown(chunks: Any) -> None:
    next(chunks)
    with pytest.raises(KeyboardInterrupt):
        chunks.throw(KeyboardInterrupt)


@pytest.mark.parametrize("end", [closed, dropped, thrown])
def test_a_broken_off_answer_puts_the_limit_back(end: Callable[[Any], None]) -> None:
    limit = Limit()
    lm = mac(limit)
    end(answer(lm))
    gc.collect()
    assert settled(limit) == 0 and len(limit.said) == 2


def test_an_answer_that_raises_puts_the_limit_back(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Limit()
    lm = mac(limit)
    monkeypatch.setattr(type(lm.model), "logits", lambda self, hidden: mx.full((1, 1, lm.config.vocab_size), mx.nan))
    with pytest.raises(NumericsError):
        list(answer(lm))
    assert settled(limit) == 0 and len(limit.said) == 2


def test_a_cancelled_prompt_puts_the_limit_back() -> None:
    limit = Limit()
    asked = iter([False, True])  # before the first of two chunks, and before the second
    (chunk,) = answer(mac(limit, chunk=2), cancelled=lambda: next(asked))
    assert chunk.finish_reason == "cancelled"
    assert settled(limit) == 0 and len(limit.said) == 2


def test_answers_side_by_side_share_the_limit() -> None:
    limit = Limit()
    lm = mac(limit)
    one, two = answer(lm), answer(lm)
    next(one), next(two)
    list(one)
    assert settled(limit) > 0
    list(two)
    assert settled(limit) == 0


def test_nothing_is_wired_for_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Limit()
    lm = mac(limit)
    monkeypatch.setattr(engines, "LARGE", lm.nbytes + 1)
    list(answer(lm))
    assert settled(limit) == 0 and limit.said == []


def test_the_tokens_are_those_of_another_device() -> None:
    """In chunks of another size, with buffers given back: greedy tokens do not change."""
    lm = runner.load(MODEL)
    there = mac(Limit(), chunk=3)
    wanted, found = ([chunk.token for chunk in answer(each)] for each in (lm, there))
    assert wanted == found


def test_a_prompt_is_read_in_the_devices_chunks_and_buffers_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    settles: list[int | None] = []
    monkeypatch.setattr(Memory, "settle", lambda self: settles.append(self.keeps))
    monkeypatch.setattr("runner.engine.scheduler.SETTLED_EVERY", 8)
    monkeypatch.setattr("runner.engine.scheduler.LEAST", 3)
    seen: list[tuple[int, int]] = []
    lm = mac(Limit(), chunk=5)
    bias = dict.fromkeys(lm.eos_token_ids, -1e9)
    lm.generate([3 + i for i in range(12)], max_tokens=17, logit_bias=bias, on_prefill=lambda *at: seen.append(at))
    assert seen == [(5, 12), (10, 12), (12, 12)]
    assert settles == [0] * 4  # after two chunks that are not the last, and after 8 and 16 tokens


def test_peak_memory_counts_freed_buffers() -> None:
    lm = runner.load(MODEL)
    mx.clear_cache()
    mx.reset_peak_memory()
    freed = [mx.zeros(1 << 20, dtype=mx.float32) for _ in range(4)]
    mx.eval(freed)
    del freed
    mx.reset_peak_memory()
    held = mx.get_cache_memory()
    if mx.cuda.is_available():
        pytest.skip("there the driver keeps freed buffers, and MLX none")
    timings = lm.generate(PROMPT, max_tokens=2).timings
    assert timings.peak_memory >= held > 1 << 23 > mx.get_peak_memory()
    mx.clear_cache()


def test_load_has_the_macs_notes() -> None:
    lm = mac(Limit())
    engine = dataclasses.replace(lm.engine, dtype=mx.bfloat16)
    raw = {"model_type": "llama"}
    (note,) = device_notes(engine, raw, None)
    assert note == "Apple M2 has no bfloat16 in hardware: dtype float16 is faster"
    assert device_notes(engine, raw, "bfloat16") == []  # who asks for it has it
    assert device_notes(engine, {"model_type": "gemma3_text"}, None) == []
    assert device_notes(runner.load(MODEL).engine, raw, None) == []
