"""Stop strings that span pieces of text, compared with a naive search in the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import UsageError
from runner.text.stop import StopMatcher

pieces = st.lists(st.text("abc", max_size=4), max_size=12)
stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


@given(pieces, stops)
def test_equals_a_search_in_the_whole_text(parts: list[str], wanted: list[str]) -> None:
    matcher, shown, stopped = StopMatcher(wanted), "", False
    fed = ""
    for part in parts:
        fed += part
        text, stopped = matcher.add(part)
        shown += text
        if stopped:
            break
    if not stopped:
        shown += matcher.flush()
    starts = [fed.find(stop) for stop in wanted if stop in fed]
    assert stopped == bool(starts)
    assert shown == (fed[: min(starts)] if starts else fed)


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        StopMatcher(["a", ""])
