"""The marks of reasoning that templates, vocabularies and system messages name."""

from __future__ import annotations

import pytest

from runner.text.reasoning import UNNAMED, BlockFormat, Marks, block_format, reasoning_key


def formats(named: str = "", special: tuple[str, ...] = (), tokens: tuple[str, ...] = ()) -> BlockFormat:
    return block_format(named, special, lambda text: text in (*special, *tokens))


PAIRS = [
    ("<think>", "</think>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"), ("<thought>", "</thought>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"), ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"), ("◁think▷", "◁/think▷"), ("<|think|>", "<|/think|>"),
    ("<reasoning>", "</reasoning>"), ("<|thinking_start|>", "<|thinking_end|>"), ("<scratchpad>", "</scratchpad>"),
]  # fmt: skip


@pytest.mark.parametrize(("opening", "closing"), PAIRS)
def test_a_pair_is_found_in_a_template_and_among_special_tokens(opening: str, closing: str) -> None:
    assert formats(f"{{{{ '{opening}\\n' }}}} {closing}").blocks == [Marks(opening, closing)]
    assert formats(special=("<s>", closing, opening)).blocks == [Marks(opening, closing)]


def test_half_of_a_pair_and_tokens_that_are_not_special() -> None:
    """DeepSeek-R1's first template only splits at `</think>`; Qwen3's `<think>` is a token that is not special."""
    assert formats("{{ content.split('</think>')[-1] }}").blocks == [Marks("<think>", "</think>")]
    assert formats(tokens=("<think>", "</think>")).blocks == [Marks("<think>", "</think>")]
    assert formats(tokens=("<think>",)).blocks == (UNNAMED,)


@pytest.mark.parametrize(
    "named",
    [
        "<think",
        "<thinking_budget>5</thinking_budget>",
        "<tools></tools>",
        "Here is my response:",
        "<finish_reason> </finish_reason>",
    ],
)
def test_other_tags_are_no_marks(named: str) -> None:
    assert formats(named).blocks == (UNNAMED,)


def test_gemma_4_names_its_block() -> None:
    named = "{% for part in text.split('<channel|>') %}{% if '<|channel>' in part %}"
    assert formats(named).blocks == formats(special=("<|channel>", "<channel|>")).blocks
    assert formats(named).blocks == [Marks("<|channel>", "<channel|>", "thought")]


def test_a_system_message_cannot_name_any_number_of_pairs() -> None:
    """Of 8000 pairs each was compared with all before it: 18 seconds for a message of 268 KB."""
    many = "".join(f"<x{n}:think></x{n}:think>" for n in range(8000))
    blocks = formats("<zz:think></zz:think>" + many, special=("<|think|>", "<|/think|>")).blocks
    assert blocks[:2] == [Marks("<|think|>", "<|/think|>"), Marks("<zz:think>", "</zz:think>")]
    assert len(blocks) == 16


def test_granite_says_its_marks_in_words() -> None:
    named = "after 'Here is my thought process:' and the response after 'Here is my response:'"
    assert formats(named).blocks == [Marks("Here is my thought process:", "Here is my response:")]


def test_wrappers_need_both_halves() -> None:
    assert formats("<think></think><answer></answer>").wrappers == [Marks("<answer>", "</answer>")]
    assert formats("<think></think><answer>").wrappers == []


def test_what_a_prompt_has_opened() -> None:
    known = formats("<think></think>[THINK][/THINK]")
    assert known.opened("<|assistant|><think>\n") == Marks("<think>", "</think>")
    assert known.opened("<think>\n\n</think>\n\n[THINK]") == Marks("[THINK]", "[/THINK]")
    assert known.opened("<think>\n\n</think>\n\n") is None and known.opened("") is None
    assert formats().opened("<think>\n") is None


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ("{% if message.reasoning_content is string %}", "reasoning_content"),
        ("{{ m['reasoning_content'] }}", "reasoning_content"),
        ("{% if 'thinking' in message %}{{ message.thinking }}", "thinking"),
        ("{% if thinking %}<think>{% endif %}", None),
        ("{% if enable_thinking %}{{ message.content }}", None),
        ("{{ message.get('reasoning') }}", "reasoning"),
    ],
)
def test_the_key_that_a_template_reads(source: str, key: str | None) -> None:
    assert reasoning_key(source) == key
