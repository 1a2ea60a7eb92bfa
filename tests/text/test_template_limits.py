"""The budget of one rendering, by hand."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from runner.text.template_limits import Budget, OverBudgetError, seconds_for


def test_time_is_shared_and_grows_with_the_inputs() -> None:
    assert seconds_for(2_000_000) == seconds_for(0) + 2
    with pytest.raises(OverBudgetError, match="too many steps"):
        Budget(0, deadline=time.thread_time() - 1).step()
    Budget(0, deadline=time.thread_time() + 60).step()


def test_sums_by_hand() -> None:
    budget = Budget(0)
    for _ in range(64):
        budget.spend(budget.text_limit)
    with pytest.raises(OverBudgetError, match="too much text in all"):
        budget.spend(1)


def test_lists_end_before_they_are_too_long() -> None:
    budget = Budget(0)
    taken = 0

    def endless() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    with pytest.raises(OverBudgetError, match="more than"):
        budget.listed(endless())
    assert taken <= budget.text_limit // 8 + 512
    assert budget.listed("abc") == ["a", "b", "c"] and budget.listed(iter([1, 2])) == [1, 2]


def test_nesting_is_bounded() -> None:
    nested: list[object] = []
    for _ in range(500):
        nested = [nested]
    assert Budget(0).walk(nested) is nested
    with pytest.raises(OverBudgetError, match="500 deep"):
        Budget(0).walk([[nested]])
