"""The search for many tokens equals its naive twin."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from runner.text.token_search import TokenSearch

TOKENS = st.sets(st.text("ab<", min_size=1, max_size=7), max_size=12).map(sorted)


def naive(tokens: list[str], text: str, start: int, end: int, refused: set[tuple[str, int]]) -> list[tuple[int, str]]:
    """Every place in order, every token at each, longest first."""
    found, position = [], start
    while position < end:
        fitting = [
            token for token in tokens if text[position:end].startswith(token) and (token, position) not in refused
        ]
        if fitting:
            found.append((position, max(fitting, key=len)))
        position += len(found[-1][1]) if fitting else 1
    return found


@settings(max_examples=500, deadline=None)
@given(tokens=TOKENS, text=st.text("ab< ", max_size=40), data=st.data())
def test_spellings_equal_the_naive_twin(tokens: list[str], text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    pairs = [(token, place) for token in tokens for place in range(len(text))]
    refused = data.draw(st.sets(st.sampled_from(pairs))) if pairs else set()
    found = TokenSearch(tokens).spellings(text, start, end, lambda token, place: (token, place) not in refused)
    assert list(found) == naive(tokens, text, start, end, refused)
    assert list(TokenSearch(tokens).spellings(text, start, end)) == naive(tokens, text, start, end, set())


@settings(max_examples=300, deadline=None)
@given(tokens=TOKENS, text=st.text("ab< ", max_size=10))
def test_parts_of_tokens_at_the_ends_of_a_text(tokens: list[str], text: str) -> None:
    search = TokenSearch(tokens)
    tails = {token[n:] for token in tokens for n in range(1, len(token))}
    heads = {token[:n] for token in tokens for n in range(1, len(token))}
    assert search.starts_inside(text) == any(text.startswith(tail) for tail in tails)
    assert search.ends_inside(text) == any(text.endswith(head) for head in heads)


def test_an_empty_search_finds_nothing() -> None:
    search = TokenSearch([])
    assert list(search.spellings("abc", 0, 3)) == [] and not search.starts_inside("abc") and not search.ends_inside("")
