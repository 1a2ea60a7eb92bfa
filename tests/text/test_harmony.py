"""gpt-oss's messages, cut into pieces anywhere, compared with a parser of the whole text."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from told_backend import tokenizer

from runner.text.harmony import MARKS, HarmonySeparator, speaks_harmony
from runner.text.separator import Split

PROMPT = "<|start|>assistant"
SPLITTER = re.compile("(" + "|".join(map(re.escape, MARKS)) + ")")


def pieces(text: str) -> list[tuple[str, bool]]:
    """The text with its marks as special tokens."""
    return [(piece, piece in MARKS) for piece in SPLITTER.split(text) if piece]


def separate(text: str, cuts: list[int] | None = None, prompt: str = PROMPT) -> Split:
    """Split the answer: its marks as special tokens or, with `cuts`, all of it plain text cut at those places."""
    special = () if cuts is not None else MARKS
    separator = HarmonySeparator(special, pieces(prompt) if special else [(prompt, False)])
    split = Split()
    for piece, is_special in (
        pieces(text)
        if cuts is None
        else [(text[a:b], False) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ):
        split += separator.add(piece, is_special)
    return split + separator.flush()


MESSAGE = re.compile(
    r"<\|start\|>assistant(?P<to> to=\w+)?(?:<\|channel\|>(?P<channel>\w+)(?P<late> to=\w+)?)?"
    r"<\|message\|>(?P<text>[^<]*)(?:<\|end\|>|<\|call\|>|<\|return\|>|$)"
)


def naive(text: str) -> Split:
    """The same for an answer in which every message is whole."""
    content, reasoning = [], []
    for found in MESSAGE.finditer(PROMPT + text):
        if found["to"] or found["late"]:
            content.append(found[0][: found.end("text") - found.start()])
        elif found["text"]:
            (reasoning if found["channel"] == "analysis" else content).append(found["text"])
    return Split("\n\n".join(content), "\n\n".join(reasoning))


messages = st.lists(
    st.builds(
        lambda to, channel, late, text: f"{to}{channel}{late if channel else ''}<|message|>{text}",
        st.sampled_from(["", "", " to=f"]),
        st.sampled_from(["<|channel|>analysis", "<|channel|>final", "<|channel|>commentary", ""]),
        st.sampled_from(["", "", " to=g"]),
        st.text("ab \n|>", max_size=4),
    ),
    min_size=1,
    max_size=4,
).map("<|end|><|start|>assistant".join)


@given(messages, st.data())
def test_any_cut_gives_the_split_of_the_whole_text(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    assert separate(text) == separate(text, cuts) == naive(text)


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        (
            "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Paris.<|return|>",
            "Paris.",
            "Easy.",
        ),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
            "<|start|>assistant<|channel|>analysis<|message|>b<|end|><|start|>assistant<|channel|>final<|message|>c",
            "I look.\n\nc",
            "a\n\nb",
        ),
        ("<|channel|>final<|message|>Paris.", "Paris.", ""),
        ("<|channel|>analysis<|message|>still think", "", "still think"),
        ("<|channel|>analysis", "", ""),  # cut off within the header
        ("<|message|>Paris.", "Paris.", ""),
        ("Paris.", "Paris.", ""),  # a model that was tuned to another format
        ("<|channel|>analysis<|message|>a<|channel|>final<|message|>b", "b", "a"),  # without an end between
        ("<|channel|>analysis<|message|>a<|end|>Paris.", "Paris.", "a"),
    ],
)
def test_examples(text: str, content: str, reasoning: str) -> None:
    assert separate(text) == Split(content, reasoning)


def test_a_call_keeps_its_header() -> None:
    call = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}"
    assert separate(call) == Split("<|start|>assistant" + call)


def test_marks_in_plain_text_are_quotations_where_they_are_special_tokens() -> None:
    separator = HarmonySeparator(MARKS, pieces(PROMPT))
    given_pieces = [*pieces("<|channel|>final<|message|>"), ("The mark <|end|> ends.", False)]
    assert [separator.add(*piece) for piece in given_pieces][-1] == Split("The mark <|end|> ends.")


def test_the_prompt_may_have_begun_the_message() -> None:
    prompt = "<|start|>user<|message|>hi<|end|><|start|>assistant<|channel|>analysis<|message|>"
    assert separate("a<|end|><|start|>assistant<|channel|>final<|message|>b", prompt=prompt) == Split("b", "a")
    assert separate("hi", prompt="of another format") == Split("hi")


def test_the_format_is_found_in_template_or_vocabulary() -> None:
    assert speaks_harmony("x <|channel|> y <|message|>", lambda text: False)
    assert speaks_harmony("", lambda text: text in MARKS)
    assert not speaks_harmony("<|channel|>", lambda text: text == "<|message|>")


def test_a_continued_message_is_in_its_channel_however_long_it_is() -> None:
    template = "<|start|>assistant<|channel|>analysis<|message|>{{ messages[0].thinking }}"
    found = tokenizer(template, (*MARKS, "<|im_end|>"))
    chat = [{"role": "assistant", "content": "x", "thinking": "Let me see. " * 20}]
    ids = found.apply_chat_template(chat, continue_final_message="thinking")
    separator = found.separator(ids, chat, continue_final_message="thinking")
    assert separator.add("Easy.", False) == Split(reasoning="Easy.")
