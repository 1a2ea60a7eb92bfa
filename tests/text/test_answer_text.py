"""From ids to text: stop texts that are, hold or touch special tokens, compared with a search in the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.text.answer_text import AnswerText
from runner.text.detokenizer import Detokenizer, WindowStream
from runner.text.separator import PlainText
from runner.text.stop import StopMatcher

TOKENS = ["a", "b", "\n", "|", "<|end|>", "</s>", "<|"]
SPECIAL = frozenset({4, 5})


def answer_text(*stops: str) -> AnswerText:
    stream = WindowStream(lambda ids: "".join(TOKENS[index] for index in ids))
    return AnswerText(Detokenizer(stream, lambda index: TOKENS[index], SPECIAL), StopMatcher(stops), PlainText())


def run(ids: list[int], *stops: str) -> tuple[str, bool, int]:
    """The text shown, whether a stop text ended it, and the number of tokens taken."""
    text, shown, taken = answer_text(*stops), "", 0
    for index in ids:
        taken += 1
        split, stopped = text.add(index)
        shown += split.content
        if stopped:
            break
    split, stopped = text.finish()
    return shown + split.content, stopped, taken


def naive(ids: list[int], *stops: str) -> tuple[str, bool, int]:
    """The same, from the whole text after each token; what is shown are the characters of plain tokens."""
    fed: list[tuple[str, bool]] = []
    cut, taken = -1, 0
    for index in ids:
        taken += 1
        fed += [(character, index in SPECIAL) for character in TOKENS[index]]
        whole = "".join(character for character, _ in fed)
        starts = [whole.find(stop) for stop in stops if stop in whole]
        if starts:
            cut = min(starts)
            break
    return "".join(c for c, special in (fed if cut < 0 else fed[:cut]) if not special), cut >= 0, taken


@given(
    st.lists(st.integers(0, len(TOKENS) - 1), max_size=12),
    st.lists(
        st.text("ab\n<|>/snde", min_size=1, max_size=4) | st.sampled_from(["<|end|>", "</s>", "a</s>"]), max_size=3
    ),
)
def test_equals_a_search_in_the_whole_text(ids: list[int], stops: list[str]) -> None:
    assert run(ids, *stops) == naive(ids, *stops)


@pytest.mark.parametrize("stop", ["<|end|>", "a<|end|>", "<|end|>b", "\na<|end|>b", "end"])
def test_a_special_token_ends_an_answer(stop: str) -> None:
    """Alone, with plain text before or after it, and by a part of its text. (On the old code: "a\\nab</s>" whole.)"""
    shown, stopped, _ = run([0, 2, 0, 4, 1], stop)
    assert stopped
    assert shown == ("a\na" if stop in ("<|end|>", "<|end|>b", "end") else "a\n" if stop == "a<|end|>" else "a")


def test_special_tokens_are_shown_by_no_hold() -> None:
    """A special token that begins a stop text and comes to nothing is left out, as ever; the text after it is not."""
    assert run([0, 4, 0, 1], "<|end|>b") == ("aab", False, 4)
    assert run([0, 5, 4], "</s><|end|>x") == ("a", False, 3)
