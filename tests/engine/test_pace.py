"""Pieces of prompts last as long as they may, on machines that are simulated: a step's time, and one for each token."""

from __future__ import annotations

import math

import pytest

from runner.engine.pace import FEW, LEAST, LONG, PIECES, SHORT, Pace

TOKEN = 0.0005


def passes(pace: Pace, step: float, rows: int, requests: int, left: int = 64, *, token: float = TOKEN) -> float:
    """Seconds of a pass that reads a piece, after some of them among steps of `rows` that take `step` seconds."""
    for _ in range(20):
        read = pace.room(rows, requests, left)
        pace.took(step + token * read, read, rows)
        pace.took(step, 0, rows)
    return step + token * pace.room(rows, requests, left)


def test_a_pass_takes_as_long_as_if_requests_took_turns() -> None:
    """Four steps of one alone for four requests, and so on between the limits."""
    pace = Pace()
    assert pace.room(4, 5, 64) == LEAST, "nothing is known"
    passes(pace, 0.006, 1, 1)
    assert passes(pace, 0.008, 3, 4) == pytest.approx(4 * 0.006, abs=2 * TOKEN)
    assert passes(pace, 0.012, 9, 10) == pytest.approx(10 * 0.006, abs=2 * TOKEN)
    assert passes(pace, 0.02, 30, 40) == pytest.approx(LONG, abs=2 * TOKEN)
    assert passes(pace, 0.006, 1, 2) == pytest.approx(SHORT, abs=2 * TOKEN)


def test_half_of_a_pass_is_the_piece_where_a_step_takes_long() -> None:
    pace = Pace()
    assert passes(pace, 0.3, 4, 5, 100_000, token=0.01) == pytest.approx(0.6, abs=0.021)
    assert passes(pace, 0.01, 4, 5) == pytest.approx(5 * 0.005, abs=2 * TOKEN), (
        "and the steps that took longer are over"
    )


def test_a_device_has_a_pause_of_its_own() -> None:
    assert passes(Pace(0.05), 0.004, 1, 2) == pytest.approx(0.054, abs=2 * TOKEN)
    assert passes(Pace(0.05), 0.08, 4, 5) == pytest.approx(0.16, rel=0.05)


def test_a_long_prompt_is_cut_into_few_pieces() -> None:
    pace = Pace()
    passes(pace, 0.004, 1, 2)
    assert pace.room(1, 2, 3200) == pytest.approx(3200 / PIECES, abs=2)
    assert 0.004 + TOKEN * pace.room(1, 2, 100_000) == pytest.approx(LONG, abs=2 * TOKEN)
    assert 0.004 + TOKEN * pace.room(1, 2, 100) == pytest.approx(SHORT, abs=2 * TOKEN)


def test_a_step_of_other_rows_is_between_those_that_were_seen() -> None:
    """Where prompts are read one after the other, rows become more and no step tells what that costs."""
    pace, few = Pace(), Pace()
    pace.took(TOKEN * 512, 512, 0)
    few.took(TOKEN * 512, 512, 0)
    for one in (pace, few):
        one.took(0.025, 0, 4)
    assert pace.room(16, 1, 64) == int(0.05 / TOKEN), "twice as long for four times as many"
    pace.took(0.03, 0, 20)
    assert pace.room(16, 1, 64) == int(0.03 / TOKEN), "no longer than one of more rows"
    few.took(0.03, 0, 2)  # contexts are longer now
    assert few.room(4, 1, 64) == int(0.03 * math.sqrt(2) / TOKEN)


def test_a_slow_machine_reads_a_few_tokens_at_a_time() -> None:
    pace = Pace()
    passes(pace, 0.3, 4, 5, token=0.1)
    assert pace.room(4, 5, 64) == LEAST


def test_short_prompts_and_steps_that_took_longer_teach_nothing_wrong() -> None:
    """A pass that was shorter than a step is not taken for one that cost nothing."""
    pace = Pace()
    pace.took(0.1, FEW - 1, 1)
    assert pace.room(1, 2, 64) == LEAST
    pace.took(1.0, 0, 1)
    pace.took(0.05, 50, 1)
    assert pace.room(1, 2, 64) <= 2 * 1.0 / (0.05 / 2 / 50)
