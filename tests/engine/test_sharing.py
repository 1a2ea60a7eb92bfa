"""An engine's requests that begin alike are read once, and answered as if each had been alone."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
from engine_requests import DRAWN, KINDS, chunked, idle, ids, naive, opened, prompts
from places import TESTS

from runner.engine.engine import Engine
from runner.engine.loaded import Loaded, open_loaded
from runner.engine.passes import Passes
from runner.errors import BackendError, UsageError


@pytest.mark.parametrize("kind", KINDS)
def test_a_turn_reads_only_what_is_new(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat whose third turn asks the second one anew, beside another that begins with the same."""
    loaded = opened(kind)
    chunked(monkeypatch, loaded, 24)
    monkeypatch.setattr("runner.cache.kv.STEP", 8)
    border = loaded.config.rope_border
    first, *new = prompts(loaded, (20, 3, 4, 5, 6))
    with Engine(loaded) as engine:
        prompt, asked = first, []
        for turn in range(4):
            other = engine.submit([*first, 7, turn + 1], max_tokens=3)
            ticket = engine.submit(prompt, DRAWN, max_tokens=5, turns=[len(prompt) - 2])
            answer = ids(ticket)
            assert answer == naive(loaded, prompt, 5, DRAWN) and ids(other) == naive(loaded, [*first, 7, turn + 1], 3)
            asked.append((ticket, len(prompt)))
            prompt = [*first, *new[0]] if turn == 2 else [*prompt, *answer, *new[turn]]
        idle(engine)
        stats = engine.status().prefixes
    for ticket, length in asked[1:]:
        assert ticket.reused + ticket.read == length
        # Marks lie at a prompt's end; what was answered since is read again, at most.
        assert ticket.read <= 12 or (border is not None and length > border)
    assert stats.nbytes > 0 and stats.reused + stats.read == stats.tokens


@pytest.mark.parametrize("kind", ["rows", "window", "delta rule", "chunks"])
def test_several_answers_to_one_prompt_read_it_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = opened(kind)
    chunked(monkeypatch, loaded, 16)
    monkeypatch.setattr("runner.engine.sharing.WORTH", 4)
    prompt, other = prompts(loaded, (50, 50))
    with Engine(loaded) as engine:
        tickets = [engine.submit(prompt, DRAWN, max_tokens=6, choice=choice) for choice in range(5)]
        beside = engine.submit([*prompt[:40], *other[:10]], max_tokens=6)  # parts from it while it is being read
        found = [ids(ticket) for ticket in tickets]
        assert ids(beside) == naive(loaded, [*prompt[:40], *other[:10]], 6)
    assert found[0] == naive(loaded, prompt, 6, DRAWN) and len({tuple(answer) for answer in found}) > 1
    assert [ticket.reused // 4 for ticket in tickets] == [0, 12, 12, 12, 12]
    assert beside.reused == 40


def test_who_waits_for_a_prompt_goes_on_where_its_reader_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = opened("rows")
    chunked(monkeypatch, loaded, 4)
    (prompt,) = prompts(loaded, (60,))
    with Engine(loaded) as engine:
        for _ in range(5):
            reader = engine.submit(prompt, max_tokens=1)
            waiter = engine.submit([*prompt, 5], max_tokens=2)
            next(reader.events())
            reader.cancel()
            assert ids(waiter) == naive(loaded, [*prompt, 5], 2)
            prompt = prompt[1:]


@pytest.fixture
def small() -> Iterator[tuple[Loaded, Engine]]:
    """An engine in whose memory two sequences of 200 tokens have room."""
    loaded = opened("rows")
    with Engine(loaded) as probe:
        one = probe._workers[""].loaded.footprint.of(200 + 128)
    with Engine(loaded, memory=loaded.nbytes + 2 * one + 1000, prefixes=1 << 40) as engine:
        yield loaded, engine


def test_kept_prefixes_make_room_for_requests(small: tuple[Loaded, Engine]) -> None:
    loaded, engine = small
    asked = prompts(loaded, [40 + 10 * index for index in range(12)])
    for prompt in asked:
        assert ids(engine.submit(prompt, max_tokens=20)) == naive(loaded, prompt, 20)
        idle(engine)
        assert engine.status().prefixes.nbytes + engine.status().nbytes <= engine.budget.room
    assert engine.status().prefixes.evicted > 0
    again = engine.submit([*asked[-1], 3], max_tokens=1)
    assert ids(again) and again.reused == len(asked[-1])  # what was used last is still there


def test_a_conversation_that_fills_the_memory_is_not_let_go_for_its_own_next_turn(
    small: tuple[Loaded, Engine],
) -> None:
    loaded, engine = small
    (prompt,) = prompts(loaded, (200,))
    ids(engine.submit(prompt, max_tokens=2))
    for _ in range(3):
        prompt = [*prompt, 4, 5]
        ticket = engine.submit(prompt, max_tokens=2)
        assert ids(ticket) == naive(loaded, prompt, 2) and ticket.reused >= len(prompt) - 2


def test_adapters_weights_part_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows computed with other weights are others, whatever the ids."""
    loaded = opened("rows")
    weights = {"style": 1.0}
    monkeypatch.setattr(Loaded, "adapter_weights", property(lambda self: dict(weights)))
    (prompt,) = prompts(loaded, (30,))
    with Engine(loaded) as engine:
        ids(engine.submit(prompt, max_tokens=1))
        weights["style"] = 0.5
        other = engine.submit(prompt, max_tokens=1)
        assert ids(other) and other.reused == 0
        weights["style"] = 1.0
        again = engine.submit(prompt, max_tokens=1)
        assert ids(again) and again.reused == 29


def test_longrope_shares_within_a_side_of_its_border() -> None:
    loaded = opened("two lengths")
    border = loaded.config.rope_border
    assert border is not None
    (prompt,) = prompts(loaded, (border + 12,))
    with Engine(loaded) as engine:
        for length, reused in (
            (border - 8, 0), (border - 6, border - 8), (border + 4, 0), (border + 8, border + 4), (border, border - 6)
        ):  # fmt: skip
            ticket = engine.submit(prompt[:length], max_tokens=1)
            assert ids(ticket) == naive(loaded, prompt[:length], 1) and ticket.reused == reused
        crossing = engine.submit(prompt[:border], max_tokens=6)
        assert ids(crossing) == naive(loaded, prompt[:border], 6)


def test_frequencies_that_change_with_the_length_share_nothing() -> None:
    loaded = open_loaded(TESTS / "fixtures" / "llama" / "llama-rope-dynamic", dtype="float32")
    (prompt,) = prompts(loaded, (30,))
    with Engine(loaded) as engine:
        tickets = [engine.submit(prompt, max_tokens=1) for _ in range(2)]
        assert [ids(ticket) for ticket in tickets] == [naive(loaded, prompt, 1)] * 2
        assert [ticket.reused for ticket in tickets] == [0, 0]


def test_the_scores_of_a_prompt_need_all_of_it() -> None:
    loaded = opened("rows")
    (prompt,) = prompts(loaded, (30,))
    with Engine(loaded) as engine:
        ids(engine.submit(prompt, max_tokens=1))
        scored = engine.submit(prompt, max_tokens=0, scores=2)
        assert not ids(scored) and scored.reused == 0 and len(scored.scores) == 30
        after = engine.submit([*prompt, 4], max_tokens=1)
        assert ids(after) and after.reused == 30


def test_nothing_is_kept_where_nothing_may_be() -> None:
    loaded = opened("delta rule")
    with Engine(loaded, prefixes=0) as engine:
        for _ in range(2):
            ticket = engine.submit([1, 2, 3, 4], max_tokens=2)
            assert ids(ticket) and ticket.reused == 0
        idle(engine)
        assert engine.status().prefixes.nbytes == 0
    for wrong in (-1, 1.5, True):
        with pytest.raises(UsageError, match="prefixes must be"):
            Engine(loaded, prefixes=wrong)  # type: ignore[arg-type]


def test_a_failed_pass_leaves_no_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = opened("rows")
    with Engine(loaded) as engine:
        ids(engine.submit([1, 2, 3], max_tokens=2))
        monkeypatch.setattr(Passes, "launch", lambda *_: (_ for _ in ()).throw(RuntimeError("device lost")))
        with pytest.raises((RuntimeError, BackendError)):
            ids(engine.submit([1, 2, 3, 4], max_tokens=2))
        assert engine.status().prefixes.nbytes == 0


@pytest.mark.parametrize("kind", ["rows", "window", "delta rule"])
def test_many_conversations_side_by_side(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty requests in little memory: cancelled, timed out, paused and continued, from conversations at random."""
    loaded = opened(kind)
    chunked(monkeypatch, loaded, 16)
    monkeypatch.setattr("runner.cache.kv.STEP", 8)
    with Engine(loaded) as probe:
        room = probe._workers[""].loaded.footprint.of(150) * 4
    pick = random.Random(kind)
    talks = [prompts(loaded, (25,))[0]]
    with Engine(loaded, memory=loaded.nbytes + room, rows=3) as engine:
        for _ in range(8):
            batch = []
            for _ in range(5):
                before = pick.choice(talks)
                edited = before[: pick.randint(10, len(before))]
                prompt = [*edited, *(pick.randrange(1, loaded.config.vocab_size) for _ in range(pick.randint(1, 9)))]
                prompt = prompt[:80]
                timeout = 0.0 if pick.random() < 0.1 else None
                batch.append((prompt, engine.submit(prompt, DRAWN, max_tokens=pick.randint(1, 9), timeout=timeout)))
            for prompt, ticket in batch:
                if pick.random() < 0.15:
                    time.sleep(0.002)
                    ticket.cancel()
                answer = ids(ticket)
                assert answer == naive(loaded, prompt, 9, DRAWN)[: len(answer)]
                talks.append([*prompt, *answer])
        idle(engine)
        status = engine.status()
        assert status.prefixes.reused > 0 and status.prefixes.nbytes <= engine.budget.room
