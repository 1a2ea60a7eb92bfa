"""Reasoning in blocks, cut into pieces anywhere, compared with a parser of the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.text.blocks import BlockSeparator
from runner.text.reasoning import BlockFormat, Marks
from runner.text.separator import Split

THINK = Marks("<think>", "</think>")
ANSWER = Marks("<answer>", "</answer>")
SPELLED = BlockFormat([THINK, Marks("<t>", "</t>")], [ANSWER])
SPECIAL = ["[T]", "[/T]", "<pad>"]
TOKENS = BlockFormat([Marks("[T]", "[/T]")], [ANSWER])
WORDS = ["<think>", "</think>", "<t>", "</t>", "<answer>", "</answer>", "<", "a", "b</", " ", "\n", "[T]", "think>"]

Pieces = list[tuple[str, bool]]


def separate(pieces: Pieces, known: BlockFormat, special: list[str], opened: Marks | None = None) -> Split:
    separator, split = BlockSeparator(known, special, opened), Split()
    for text, is_special in pieces:
        split += separator.add(text, is_special)
    return split + separator.flush()


def naive(pieces: Pieces, known: BlockFormat, special: list[str], opened: Marks | None = None) -> Split:
    """The same from the whole text, in which a private character stands for a special token."""
    code = {text: chr(0xE000 + index) for index, text in enumerate(special)}
    text = "".join(code[piece] if is_special else piece for piece, is_special in pieces)
    reasons, block, undue = [], opened, "".join(code.values())

    def bare(text: str) -> str:
        return "".join(character for character in text if character not in undue)

    if opened is not None and opened.opening not in code and bare(text).lstrip().startswith(opened.opening):
        text = bare(text).lstrip().removeprefix(opened.opening)
    while True:
        if block is not None:
            inside, _, text = text.partition(code.get(block.closing, block.closing))
            reasons.append(bare(inside).strip())
        openings = {marks: code.get(marks.opening, marks.opening) for marks in known.blocks}
        rest = text.lstrip(" \n" + "".join(c for c in undue if c not in openings.values()))
        block = next((marks for marks, opening in openings.items() if rest.startswith(opening)), None)
        if block is None:
            break
        text = rest[len(openings[block]) :]
    content = bare(text)
    if reasons:
        content = content.lstrip()
        for marks in known.wrappers:
            if content.startswith(marks.opening):
                content = content.removeprefix(marks.opening)
                if content.rstrip().endswith(marks.closing):
                    content = content.rstrip().removesuffix(marks.closing).rstrip()
                content = content.lstrip()
                break
    return Split(content, "\n\n".join(reason for reason in reasons if reason))


texts = st.lists(st.sampled_from(WORDS), max_size=10).map("".join)


@given(texts, st.data(), st.sampled_from([None, THINK]))
def test_any_cut_gives_the_split_of_the_whole_text(text: str, data: st.DataObject, opened: Marks | None) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [(text[a:b], False) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert separate(pieces, SPELLED, [], opened) == naive([(text, False)], SPELLED, [], opened)


@given(
    st.lists(st.sampled_from(WORDS).map(lambda t: (t, False)) | st.sampled_from(SPECIAL).map(lambda t: (t, True))),
    st.sampled_from([None, TOKENS.blocks[0]]),
)
def test_special_tokens_are_marks_where_one_is_due(pieces: Pieces, opened: Marks | None) -> None:
    assert separate(pieces, TOKENS, SPECIAL, opened) == naive(pieces, TOKENS, SPECIAL, opened)


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("<think>\nEasy.\n</think>\n\nParis.", "Paris.", "Easy."),
        ("<think>\n\n</think>\n\nParis.", "Paris.", ""),
        (" \n<think>a</think><think>b</think> c", "c", "a\n\nb"),
        ("The tag <think>a</think> b", "The tag <think>a</think> b", ""),
        ("<think>a</think>It quotes <think>b</think>.", "It quotes <think>b</think>.", "a"),
        ("<think>a <think> b", "", "a <think> b"),
        ("<think>a</think>\n<answer>\nb </answer> c\n</answer>\n", "b </answer> c", "a"),
        ("<answer>a</answer>", "<answer>a</answer>", ""),
        ("  indented", "  indented", ""),
        ("<thin", "<thin", ""),
    ],
)
def test_examples(text: str, content: str, reasoning: str) -> None:
    assert separate([(text, False)], SPELLED, []) == Split(content, reasoning)


def test_a_prompt_that_opens_the_block() -> None:
    assert separate([("Easy.</think>Paris.", False)], SPELLED, [], THINK) == Split("Paris.", "Easy.")
    assert separate([("<think>\nEasy.</think>Paris.", False)], SPELLED, [], THINK) == Split("Paris.", "Easy.")
    assert separate([("Never closed", False)], SPELLED, [], THINK) == Split("", "Never closed")


@pytest.mark.parametrize("special", [[], ["<c>", "</c>"]])
@pytest.mark.parametrize(
    ("inside", "reasoning"),
    [
        (["thought\nEasy."], "Easy."), (["tho", "ught", "\n", "Easy", "."], "Easy."), (["\n", "thought", "\n"], ""),
        (["thought"], ""), ([], ""), (["Easy thought"], "Easy thought"), (["th", "ere"], "there"),
    ],
)  # fmt: skip
def test_a_block_with_a_name(special: list[str], inside: list[str], reasoning: str) -> None:
    """Gemma 4's was shown as the answer, `thought` and all; each block has its own."""
    known = BlockFormat([Marks("<c>", "</c>", "thought")])
    block = [("<c>", bool(special)), *((piece, False) for piece in inside), ("</c>", bool(special))]
    assert separate([*block, ("Paris.", False)], known, special) == Split("Paris.", reasoning)
    twice = f"{reasoning}\n\n{reasoning}" if reasoning else ""
    assert separate([*block, *block, ("thought", False)], known, special) == Split("thought", twice)


def test_a_special_mark_spelled_in_plain_text_is_a_quotation() -> None:
    assert separate([("[T] begins", False)], TOKENS, SPECIAL, TOKENS.blocks[0]) == Split("", "[T] begins")
    pieces = [("[T]", True), ("the mark [/T] ends", False), ("[/T]", True), ("[T] begins", False)]
    assert separate(pieces, TOKENS, SPECIAL) == Split("[T] begins", "the mark [/T] ends")


def test_pieces_come_as_early_as_they_can() -> None:
    separator = BlockSeparator(SPELLED)
    pieces = ["<th", "ink>", "\n", "Ea", "sy", " </", "x", ".</thi", "nk>", "\n", "Pa", "ris <think>", "<"]
    found = [separator.add(piece, False) for piece in pieces]
    wanted = ["", "", "", "Ea", "sy", "", " </x", ".", "", "", "", "", ""]
    assert [split.reasoning for split in found] == wanted
    assert [split.content for split in found[-3:]] == ["Pa", "ris <think>", "<"]


parts = st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "a", "b", " ", "\n"]), max_size=6).map("".join)


@given(parts, parts)
def test_an_answer_behind_a_text_is_the_rest_of_the_whole(begun: str, rest: str) -> None:
    """But for white space at the cut, and for what a message of spaces may have been going to become."""

    def bare(split: Split) -> Split:
        return Split("".join(split.content.split()), "".join(split.reasoning.split()))

    separator = BlockSeparator.behind(begun, SPELLED)
    found = separator.add(rest, False) + separator.flush()
    assert bare(separate([(begun, False)], SPELLED, []) + found) == bare(separate([(begun + rest, False)], SPELLED, []))


@pytest.mark.parametrize(
    ("begun", "rest", "content", "reasoning"),
    [
        ("Paris is", " big.", " big.", ""),
        ("The mark is ", "<think>, which opens.", "<think>, which opens.", ""),
        ("<think>\nLet me", " see</think>\n\nParis.", "Paris.", " see"),
        ("<think>\nLet me</think>\n\nPa", "ris.", "ris.", ""),
        ("<think>a</think>\n<answer>", "\nb</answer>", "b", ""),
        ("", "<think>a</think>b", "b", "a"),
        ("<thin", "<think>a", "<think>a", ""),
    ],
)
def test_examples_of_answers_behind_a_text(begun: str, rest: str, content: str, reasoning: str) -> None:
    separator = BlockSeparator.behind(begun, SPELLED)
    assert separator.add(rest, False) + separator.flush() == Split(content, reasoning)


def test_a_special_mark_in_the_text_before_counts_though_it_is_spelled() -> None:
    """In a prompt the marks of a message are plain text, as all that a client spells."""
    separator = BlockSeparator.behind("[T]Let me", TOKENS, SPECIAL)
    found = separator.add(" see", False) + separator.add("[/T]", True) + separator.add("Paris.", False)
    assert found + separator.flush() == Split("Paris.", " see")
