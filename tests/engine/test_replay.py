"""A replayed step gives the result of a built step, and a step that cannot be replayed is built."""

from __future__ import annotations

import dataclasses
import json
import threading
from typing import cast

import mlx.core as mx
import numpy as np
import pytest
from decoding import decode
from places import TESTS

from runner.cache.caches import Caches
from runner.cache.kv import ChunkedKVCache, KVCache
from runner.cache.several import SeveralCaches
from runner.engine.loaded import Loaded, open_loaded
from runner.engine.prefill import prefill
from runner.engine.replay import KINDS, LEAST, OUTLINES, PATIENCE, Recordings, Spans, Steps
from runner.errors import RunnerError
from runner.families import Model
from runner.nn.batch import Batch, Segment
from runner.ops.device import current
from runner.ops.table import Ops, Outline

TOGETHER = [
    "llama/llama-gqa", "llama/mistral-window", "llama/llama-mlx-4bit", "families/qwen3_moe-base",
    "families/gpt_oss-base", "families/lfm2-base", "families/qwen3_next-base", "families/mamba2-base",
    "families/nemotron_h-base", "families/mamba-base",
]  # fmt: skip
FIXTURES = sorted(str(path.parent.relative_to(TESTS)) for path in TESTS.glob("fixtures/*/**/config.json"))
PROMPT = [1 + i % 30 for i in range(12)]
needs_recorder = pytest.mark.skipif(current().ops.recorder is None, reason="this device records nothing")


def built(ops: Ops) -> Ops:
    """The table of ops without a recorder: each step is built and computed by MLX."""
    return dataclasses.replace(ops, recorder=None, schedule=mx.async_eval)


def answer(engine: Loaded, ops: Ops, count: int, model: Model | None = None) -> list[tuple[int, np.ndarray]]:
    """Greedy tokens, and the logits from which they were picked."""
    model, caches = model or engine.model, engine.new_caches()
    logits = prefill(model, PROMPT, caches)
    steps = decode(model, logits, caches, lambda row: (ops.argmax(row), row), count, ops)
    return [(int(token.item()), np.array(row.astype(mx.float32))) for token, row in steps]


def same(one: list[tuple[int, np.ndarray]], other: list[tuple[int, np.ndarray]]) -> bool:
    return all(a[0] == b[0] and np.array_equal(a[1], b[1], equal_nan=True) for a, b in zip(one, other, strict=True))


def replayed(engine: Loaded) -> bool:
    """Whether this model's steps are recorded once they have been built a few times."""
    caches = engine.new_caches()
    token = engine.device.ops.argmax(prefill(engine.model, PROMPT, caches))
    steps = Steps(engine.model, caches, engine.device.ops)
    for _ in range(PATIENCE + 1):
        token = engine.device.ops.argmax(steps(token.reshape(1, 1)))
        engine.device.ops.schedule(token)
    return steps._program is not None


def answers(engine: Loaded, ops: Ops) -> tuple[list[np.ndarray], bool]:
    """Logits of two requests' steps side by side, one three tokens behind the other; whether they were recorded."""
    each = [engine.new_caches() for _ in range(2)]
    first = [ops.argmax(prefill(engine.model, PROMPT[3 * i :], caches)) for i, caches in enumerate(each)]
    tokens, steps = mx.stack(first).reshape(1, 2), Steps(engine.model, SeveralCaches(each, [1, 1]), ops)
    found = []
    for _ in range(PATIENCE + 4):
        logits = steps(tokens)
        tokens = ops.argmax(logits).reshape(1, 2)
        ops.schedule(logits, tokens)
        found.append(np.array(logits.astype(mx.float32)))
    return found, steps._program is not None


@pytest.mark.parametrize("path", FIXTURES)
def test_every_fixture(path: str) -> None:
    engine = open_loaded(TESTS / path)
    count = PATIENCE + 6
    assert same(answer(engine, engine.device.ops, count), answer(engine, built(engine.device.ops), count))


@needs_recorder
@pytest.mark.parametrize("path", FIXTURES)
def test_four_positions_speak_for_all(path: str) -> None:
    """No family decides by its position in a way that none of the four compared positions shows."""
    engine = open_loaded(TESTS / path)
    caches = engine.new_caches()
    mx.eval(prefill(engine.model, PROMPT, caches))
    # States lie in buffers from the first token on that a step moves in place, where there is a kernel for it.
    mx.eval(engine.model(Batch(mx.array([[5]]), 12), caches))
    recorder, room = engine.device.ops.recorder, min(512, *(cache.room for cache in caches))
    if room < LEAST:  # a state without such a kernel, or a chunk that ends soon: see the test of longer ones
        assert not replayed(engine)
        return
    assert recorder is not None
    slot = recorder.slot([1, 1])

    def recorded(ahead: list[int]) -> bool:
        assert recorder is not None
        try:
            steps = [engine.model(Batch(slot, 13 + n), caches.ahead(n)) for n in ahead]
            return (
                recorder.record(slot, [engine.model.logits(step)[:, -1] for step in steps], ahead, caches.arrays)
                is not None
            )
        except (RuntimeError, RunnerError):
            return False

    assert recorded([0, 1, room // 2, room - 1]) == recorded(list(range(room)))


REPLAYED = """
    afmoe arcee bamba codegen cohere cohere2 cohere2_moe cwm dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon
    falcon_mamba gemma gemma2 gemma3_text glm glm4 glm4_moe gpt_neox gpt_oss gptj granite granite_swa granitemoe
    granitemoehybrid helium hunyuan_v1_dense hunyuan_v1_moe hyperclovax internlm3 iquestcoder jais2 jamba lfm2
    lfm2_moe llama mamba mamba2 mellum mimo mimo_v2_flash mistral mixtral nanochat nemotron nemotron_h olmo
    persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3
    solar_open stablelm starcoder2
"""


@needs_recorder
def test_which_are_replayed() -> None:
    """A change that makes a family build every step (the slow way) without an error fails here."""
    found = set()
    for path in FIXTURES:
        engine = open_loaded(TESTS / path)
        if replayed(engine):
            found.add(json.loads((TESTS / path / "config.json").read_text())["model_type"])
    assert found == set(REPLAYED.split())


@needs_recorder
@pytest.mark.parametrize("path", TOGETHER)
def test_several_requests_are_replayed_as_they_are_built(path: str) -> None:
    """Each kind of memory and of layer: a step of two requests is one recording, with the bits of a built step."""
    engine = open_loaded(TESTS / "fixtures" / path)
    found, recorded = answers(engine, engine.device.ops)
    assert recorded
    for one, other in zip(found, answers(engine, built(engine.device.ops))[0], strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "llama-mlx-4bit"])
def test_longer_than_the_buffers(name: str) -> None:
    """Caches are laid out anew about four times, and a window moves to the front of its buffer."""
    engine = open_loaded(TESTS / "fixtures" / "llama" / name)
    assert same(answer(engine, engine.device.ops, 700), answer(engine, built(engine.device.ops), 700))


@pytest.mark.parametrize("table", [current().ops, built(current().ops)], ids=["recorded", "built"])
def test_a_recording_ends_with_its_chunk(table: Ops) -> None:
    """A Llama whose layers attend within chunks of 60: as one that is fed each token's chunk from its start."""
    engine = open_loaded(TESTS / "fixtures" / "llama" / "llama-gqa", dtype="float32")

    def caches() -> Caches:
        rows = [dataclasses.replace(engine.config.memory(0)[0], chunk=60)]
        return Caches.of([rows] * engine.config.num_hidden_layers, engine.storage)

    kept = caches()
    steps = decode(
        engine.model, prefill(engine.model, PROMPT, kept), kept, lambda row: (mx.argmax(row), row), 200, table
    )
    found = [(int(token.item()), np.array(row)) for token, row in steps]
    ids = [*PROMPT, *(token for token, _ in found)]
    whole = engine.model.logits(engine.model(Batch(mx.array([ids[:-1]])), caches()))[0, len(PROMPT) - 1 :]
    assert np.allclose([row for _, row in found], np.array(whole), atol=1e-4)
    assert isinstance(kept[0], ChunkedKVCache) and kept[0].nbytes < 2 * 2 * 60 * 32 * 4 * 8


@dataclasses.dataclass
class Odd:
    """A model that computes something else from a given position on, or where its token is even."""

    model: Model
    position: int | None = None

    def __call__(self, batch: Batch, caches: list[KVCache]) -> mx.array:
        return self.model(batch, caches)

    def logits(self, hidden: mx.array) -> mx.array:
        return self.model.logits(hidden)


class OddPosition(Odd):
    def __call__(self, batch: Batch, caches: list[KVCache]) -> mx.array:
        hidden = self.model(batch, caches)
        return hidden * 2 if isinstance(batch.offset, int) and batch.offset > 60 else hidden


class OddScale(Odd):
    def __call__(self, batch: Batch, caches: list[KVCache]) -> mx.array:
        return self.model(batch, caches) * (1.0 + 0.01 * caches[0].offset)


class OddToken(Odd):
    def __call__(self, batch: Batch, caches: list[KVCache]) -> mx.array:
        hidden = self.model(batch, caches)
        return hidden + hidden if batch.ids[0, -1].item() % 2 == 0 else hidden


@pytest.mark.parametrize("odd", [OddPosition, OddScale, OddToken])
def test_a_model_that_decides_for_itself(odd: type[Odd]) -> None:
    engine = open_loaded(TESTS / "fixtures" / "llama" / "llama-gqa")
    model = odd(engine.model)
    assert same(answer(engine, engine.device.ops, 80, model), answer(engine, built(engine.device.ops), 80, model))


def test_tokens_of_another_type() -> None:
    """A sampler may return tokens of any dtype; a step whose token a recording cannot take is built."""
    engine = open_loaded(TESTS / "fixtures" / "llama" / "llama-gqa")
    ops, caches = engine.device.ops, engine.new_caches()
    logits = prefill(engine.model, PROMPT, caches)
    steps = decode(engine.model, logits, caches, lambda row: (ops.argmax(row).astype(mx.int64),), 20, ops)
    assert [int(step[0].item()) for step in steps] == [token for token, _ in answer(engine, built(ops), 20)]


def test_two_answers_in_turn_and_from_two_threads() -> None:
    """Each answer has its own memory; a generator may be advanced by any of a server's threads."""
    engine = open_loaded(TESTS / "fixtures" / "llama" / "llama-gqa")
    ops = engine.device.ops
    expected = [token for token, _ in answer(engine, built(ops), 40)]
    generators = []
    for _ in range(2):
        caches = engine.new_caches()
        logits = prefill(engine.model, PROMPT, caches)
        generators.append(decode(engine.model, logits, caches, lambda row: (ops.argmax(row),), 40, ops))
    found: list[list[int]] = [[], []]

    def advance(which: int) -> None:
        found[which].append(int(next(generators[which])[0].item()))

    for index in range(40):
        for which in range(2):
            if index % 3 == 2:
                thread = threading.Thread(target=advance, args=(which,))
                thread.start()
                thread.join()
            else:
                advance(which)
    assert found == [expected, expected]


@needs_recorder
def test_refusals() -> None:
    engine = open_loaded(TESTS / "fixtures" / "llama" / "llama-gqa")
    caches = engine.new_caches()
    mx.eval(prefill(engine.model, PROMPT, caches))
    recorder = engine.device.ops.recorder
    assert recorder is not None
    slot = recorder.slot([1, 1])
    with pytest.raises(RuntimeError, match="reads its token"):
        slot.item()
    steps = [engine.model.logits(engine.model(Batch(slot, 12 + n), caches.ahead(n))) for n in (0, 1)]
    with pytest.raises(ValueError, match="0 and 1 first"):
        recorder.record(slot, steps, [0, 2], caches.arrays)
    program = recorder.record(slot, steps, [0, 1], caches.arrays)
    assert program is not None
    with pytest.raises(ValueError, match=r"expected 32-bit integers"):
        program.run(mx.array([[1, 2]]))
    for _ in range(2):
        program.run(mx.array([[1]]))
    with pytest.raises(ValueError, match="recorded for 2 positions"):
        program.run(mx.array([[1]]))


def together(engine: Loaded, lengths: list[int], recordings: Recordings | None, ops: Ops) -> tuple[np.ndarray, int]:
    """Logits of ten steps of requests of such lengths, and how many were built; the third one leaves after five."""
    caches, rows, built_steps = [], [], 0
    for length in lengths:
        caches.append(engine.new_caches())
        mx.eval(prefill(engine.model, [1 + i % 30 for i in range(length)], caches[-1]))
    for members in (caches, [*caches[:2], *caches[3:]]):
        steps = Steps(engine.model, SeveralCaches(members, [1] * len(members)), ops, recordings)
        for index in range(5):
            logits = steps(mx.array([[3 + (index + n) % 20 for n in range(len(members))]], mx.int32))
            ops.schedule(logits)
            rows.append(np.array(logits.astype(mx.float32))[:2])
        built_steps += steps._built
    return np.stack(rows), built_steps


@needs_recorder
@pytest.mark.parametrize("name", ["llama/llama-gqa", "llama/mistral-window", "llama/llama-mlx-4bit"])
def test_what_was_compared_is_recorded_at_once_for_others(name: str) -> None:
    """Other requests, as many of them: no step is built, whoever leaves, and the logits are those of built steps."""
    engine = open_loaded(TESTS / "fixtures" / name)
    ops, recordings, lengths = engine.device.ops, Recordings(), [30, 41, 27, 25]
    for count in (3, 4):  # compared between positions that cover those of the others
        members = [engine.new_caches() for _ in range(count)]
        for place, cache in enumerate(members):
            mx.eval(prefill(engine.model, [1 + i % 30 for i in range(10 + place)], cache))
        steps = Steps(engine.model, SeveralCaches(members, [1] * count), ops, recordings)
        for _ in range(PATIENCE + 1):
            mx.eval(steps(mx.array([[2] * count], mx.int32)))
        assert steps._program is not None
    naive, _ = together(engine, lengths, None, built(ops))
    found, built_steps = together(engine, lengths, recordings, ops)
    assert built_steps == 0
    assert np.array_equal(found, naive)


@needs_recorder
def test_a_step_that_is_another_one_now_is_built() -> None:
    """What was compared of one model is no step of a model that scales its rows; then nothing is known any more."""
    engine, recordings = open_loaded(TESTS / "fixtures" / "llama" / "llama-gqa"), Recordings()
    ops = engine.device.ops

    def steps(model: Model) -> Steps:
        caches = engine.new_caches()
        mx.eval(prefill(engine.model, PROMPT, caches))
        return Steps(model, caches, ops, recordings)

    first = steps(engine.model)
    for _ in range(PATIENCE + 1):
        mx.eval(first(mx.array([[2]], mx.int32)))
    for _ in range(2):  # before the positions that were compared, and between them
        again = steps(engine.model)
        mx.eval(again(mx.array([[2]], mx.int32)))
        assert again._built == 0
    odd, naive = steps(OddScale(engine.model)), steps(OddScale(engine.model))
    naive._recorder = None
    logits = [each(mx.array([[2]], mx.int32)) for each in (odd, naive)]
    assert odd._built == 1 and np.array_equal(*(np.array(each.astype(mx.float32)) for each in logits))
    assert recordings.find((False, (1, 1), None), [(13, 13)]) is None


def test_spans_meet_where_they_share_a_position() -> None:
    spans = Spans()
    for first, last in [(10, 19), (20, 29), (40, 49), (28, 33)]:
        spans.add((first, last))
    assert (20, 33) in spans and (10, 19) in spans and (42, 42) in spans
    assert (19, 20) not in spans and (33, 34) not in spans and (30, 45) not in spans


class Moving:
    """Stands for an outline: of one step, at one pace."""

    def __init__(self, pace: int = 1) -> None:
        self.pace = pace

    def same_as(self, other: Moving) -> bool:
        return self.pace == other.pace


def test_an_outline_holds_where_it_was_compared() -> None:
    """One that is compared at other positions takes over those of older ones of the same step, and of no others."""
    first, second, third, fourth = (cast("Outline", Moving(pace)) for pace in (0, 1, 0, 1))
    recordings = Recordings()
    recordings.add("one", first, [(0, 9), (30, 39)])
    recordings.add("one", second, [(50, 59)])
    assert recordings.find("one", [(2, 3), (31, 39)]) is first and recordings.find("one", [(50, 50)]) is second
    assert recordings.find("one", [(2, 3), (50, 51)]) is None and recordings.find("two", [(2, 3)]) is None
    recordings.add("one", third, [(45, 48)])
    assert recordings.find("one", [(0, 9), (30, 39), (45, 48)]) is third
    assert recordings.find("one", [(50, 59)]) is second
    recordings.add("one", fourth, [(39, 40)])  # where the third was compared too, and advanced in another way
    assert recordings.find("one", [(0, 9)]) is None and recordings.find("one", [(39, 40), (50, 59)]) is fourth
    for start in range(100, 100 + 2 * OUTLINES, 2):
        recordings.add("one", cast("Outline", Moving(start)), [(start, start)])
    assert recordings.find("one", [(50, 59)]) is None and recordings.find("one", [(100, 100)]) is not None
    recordings.drop("one")
    assert "one" not in recordings


def test_kinds_that_were_asked_for_longest_ago_are_forgotten() -> None:
    recordings = Recordings()
    for kind in range(KINDS):
        recordings.add(kind, cast("Outline", Moving()), [(0, 9)])
    assert recordings.find(0, [(0, 9)]) is not None
    recordings.add("more", cast("Outline", Moving()), [(0, 9)])
    assert 0 in recordings and 1 not in recordings and 2 in recordings


@needs_recorder
def test_outlines_are_the_same_where_they_do_the_same_at_one_pace() -> None:
    """And over the same arrays: another model's are others, though they hold the same numbers."""
    recorder = current().ops.recorder
    assert recorder is not None

    def outline(engine: Loaded, offset: int, ids: int) -> Outline:
        assert recorder is not None
        each = [engine.new_caches() for _ in range(ids)]
        for caches in each:
            mx.eval(prefill(engine.model, [1 + i % 30 for i in range(offset)], caches))
        caches = SeveralCaches(each, [1] * ids)
        caches.make_room(16)
        mx.eval(caches.arrays)
        slot = recorder.slot([1, ids])
        steps = []
        for ahead in (0, 1, 8):
            batch = Batch.of(slot, [Segment(1, offset + ahead)] * ids)
            steps.append(mx.squeeze(engine.model.logits(engine.model(batch, caches.ahead(ahead))), 0))
        program = recorder.record(slot, steps, [0, 1, 8], caches.arrays)
        assert program is not None
        return program.outline

    engine, other = (open_loaded(TESTS / "fixtures" / "llama" / "mistral-window") for _ in range(2))
    one = outline(engine, 12, 2)
    assert one.same_as(one) and one.same_as(outline(engine, 30, 2))
    assert not one.same_as(outline(engine, 12, 3)) and not one.same_as(outline(other, 12, 2))
