"""Pieces of prompts last as long as they may, on machines that are simulated: a step's time, and one for each token."""

from __future__ import annotations

import pytest

from runner.engine.pace import FEW, LEAST, PAUSE, Pace


def piece(pace: Pace, step: float, token: float, rows: int = 4, *, passes: int = 20) -> int:
    """Tokens of a piece after so many passes among rows whose step takes `step` seconds, each followed by a step."""
    for _ in range(passes):
        read = pace.room(rows)
        pace.took(step + token * read, read, rows)
        pace.took(step, 0, rows)
    return pace.room(rows)


@pytest.mark.parametrize(("step", "token"), [(0.004, 0.0005), (0.04, 0.0005), (0.01, 0.0001)])
def test_a_piece_takes_its_time(step: float, token: float) -> None:
    """That is a pause, or as long as a step where that is longer, whatever was known before."""
    pace = Pace()
    assert pace.room(4) == LEAST
    for seconds in (step, step * 10, step):  # it was another step in between: longer histories, and shorter again
        found = piece(pace, seconds, token) * token
        assert found == pytest.approx(max(PAUSE, seconds), abs=3 * token + seconds / 20)


def test_more_rows_have_longer_pieces_before_a_step_of_theirs_was_seen() -> None:
    """A pass is as long as was said: a step that grows with the rows, and as much for the piece."""
    pace, token = Pace(), 0.0005
    piece(pace, 0.01, token, 4)
    for _ in range(20):
        read = pace.room(16)
        seconds = 0.02 + token * read
        pace.took(seconds, read, 16)
    assert seconds == pytest.approx(0.04 + 0.04, rel=0.05)
    pace.took(0.02, 0, 16)
    assert piece(pace, 0.02, token, 16) * token == pytest.approx(0.02, abs=3 * token)


def test_what_a_prompt_took_alone_is_known_beside_others() -> None:
    pace = Pace()
    pace.took(0.256, 512, 0)
    assert pace.room(2) == int(PAUSE / 0.0005)


def test_a_slow_machine_reads_a_few_tokens_at_a_time() -> None:
    assert piece(Pace(), 0.3, 0.1) == LEAST


def test_short_prompts_and_steps_that_took_longer_teach_nothing_wrong() -> None:
    """A pass that was shorter than a step is not taken for one that cost nothing."""
    pace = Pace()
    pace.took(0.1, FEW - 1, 1)
    assert pace.room(1) == LEAST
    pace.took(1.0, 0, 1)
    pace.took(0.05, 50, 1)
    assert pace.room(1) <= 1.0 / (0.05 / 2 / 50)
