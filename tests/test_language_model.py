"""Whole answers: reasoning apart from content, stop texts that are special tokens, and chats in OpenAI's shapes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from places import TESTS
from scripted import scripted
from told_backend import spaced_tokenizer

import runner
from runner.errors import ContextLengthError, TemplateError, UsageError
from runner.language_model import LanguageModel

HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
HARMONY_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
ASK = [{"role": "user", "content": "Capital of France?"}]


def template(opening: str = "", tail: str = "") -> str:
    """A plain template whose generation prompt ends with `opening`; `tail` is written after each message."""
    prompt = f"{{% if add_generation_prompt %}}[assistant]{opening}{{% endif %}}"
    return "{% for m in messages %}[{{ m.role }}]{{ m.content }}" + tail + "{% endfor %}" + prompt


def ask(path: Path, answer: str, chat: list[dict[str, str]] = ASK, **options: Any) -> runner.Generation:
    files = {name: options.pop(name) for name in ("template", "special", "added") if name in options}
    lm = runner.load(scripted(path, [(chat, answer)], **{"template": template(), **files}))
    result = lm.chat(chat, temperature=0, **options)
    chunks = list(lm.chat_stream(chat, temperature=0, **options))
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert "".join(chunk.reasoning for chunk in chunks) == result.reasoning
    return result


def test_gpt_oss_answers_in_channels(tmp_path: Path) -> None:
    """On the old code: "analysisEasy.assistantfinalParis.more"; `<|return|>` ends the answer in any case."""
    answer = (
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Paris.<|return|>more"
    )
    found = ask(tmp_path, answer, template=HARMONY_TEMPLATE, special=HARMONY)
    assert (found.text, found.reasoning, found.finish_reason) == ("Paris.", "Easy.", "stop")


@pytest.mark.parametrize("kind", ["special", "added", "spelled"])
def test_think_as_a_token_or_as_text(tmp_path: Path, kind: str) -> None:
    """Where the vocabulary lacks the mark it comes byte by byte, and the template names it; else its token does."""
    files: dict[str, Any] = {} if kind == "spelled" else {kind: ["<think>", "</think>"]}
    named = template() + ("{# <think></think> #}" if kind == "spelled" else "")
    found = ask(tmp_path, "<think>\nEasy 🇫🇷\n</think>\n\nParis.", template=named, **files)
    assert (found.text, found.reasoning, found.finish_reason) == ("Paris.", "Easy 🇫🇷", "stop")


def test_reasoning_that_the_prompt_opens_and_nothing_closes(tmp_path: Path) -> None:
    opened = template("<think>\\n")
    found = ask(tmp_path / "whole", "Easy.\n</think>\n\nParis </think>.", template=opened)
    assert (found.text, found.reasoning) == ("Paris </think>.", "Easy.")
    found = ask(tmp_path / "cut", "Easy. And so on", template=opened, max_tokens=5)
    assert (found.text, found.reasoning, found.finish_reason) == ("", "Easy.", "length")


def test_a_prompt_that_closes_reasoning_again(tmp_path: Path) -> None:
    found = ask(tmp_path, "Paris.", template=template("<think>\\n\\n</think>\\n\\n"))
    assert (found.text, found.reasoning) == ("Paris.", "")


@pytest.mark.parametrize("named", ["", "{% if add_generation_prompt %}{% endif %}"])
def test_a_mark_at_the_end_of_a_message_opens_nothing(tmp_path: Path, named: str) -> None:
    """A template without a generation prompt ends with the user's own text."""
    chat = [{"role": "user", "content": "What is <think>"}]
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}{# <think></think> #}" + named
    found = ask(tmp_path, "A tag: <think>x</think>.", chat, template=plain)
    assert (found.text, found.reasoning) == ("A tag: <think>x</think>.", "")


def test_a_system_message_may_name_the_marks(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Write <reasoning>...</reasoning> first."}, *ASK]
    found = ask(tmp_path, "<reasoning>Easy.</reasoning>Paris.", chat)
    assert (found.text, found.reasoning) == ("Paris.", "Easy.")


def test_plain_text_is_continued_as_it_is(tmp_path: Path) -> None:
    path = scripted(tmp_path, [(ASK, "<think>Easy.</think>Paris.")], template=template())
    lm = runner.load(path)
    prompt = lm.tokenizer.apply_chat_template(ASK, add_generation_prompt=True)
    found = lm.generate(prompt, temperature=0)
    assert (found.text, found.reasoning) == ("<think>Easy.</think>Paris.", "")


def test_raw_text_goes_on_with_its_space(tmp_path: Path) -> None:
    """The first word of an answer lost the space before it; a chat's answer begins a text, which has none."""
    path = shutil.copytree(TESTS / "fixtures" / "llama" / "llama-gqa", tmp_path / "model")
    (path / "tokenizer.json").unlink()
    spaced_tokenizer(path)
    lm = runner.load(path)
    (big,) = lm.tokenizer.encode("big")
    for prompt in ("Paris is", lm.tokenizer.encode("Paris is")):
        assert lm.prepare(prompt).text.add(big)[0].content == " big"
    assert lm.prepare_chat([{"role": "user", "content": "big"}]).text.add(big)[0].content == "big"


@pytest.mark.parametrize("stop", ["<|im_end|>", "\n<|im_end|>", "<|im_end|>[user]", ["x", "</s>"]])
def test_a_special_token_as_a_stop_text(tmp_path: Path, stop: str | list[str]) -> None:
    """On the old code the answer went on behind the token: "Paris\\n[user]Thanks"."""
    special = ["<|im_end|>", "</s>"]
    answer = "Paris\n<|im_end|>[user]Thanks" if isinstance(stop, str) else "Paris</s>[user]Thanks"
    found = ask(tmp_path, answer, special=special, stop=stop)
    shown = "Paris" if stop in ("\n<|im_end|>", ["x", "</s>"]) else "Paris\n"
    assert (found.text, found.finish_reason) == (shown, "stop")


def test_a_stop_text_within_the_reasoning(tmp_path: Path) -> None:
    named = template() + "{# <think></think> #}"
    found = ask(tmp_path, "<think>Easy.</think>Paris.", template=named, stop="</think>")
    assert (found.text, found.reasoning, found.finish_reason) == ("", "Easy.", "stop")


MODEL = TESTS / "fixtures" / "llama" / "llama-gqa"
ABC = {"role": "user", "content": "abc"}


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return runner.load(MODEL)


def test_parts_with_text_are_answered_as_the_text(lm: LanguageModel) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "bc"}]}
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 4}
    assert lm.chat([parts], **options).text == lm.chat([ABC], **options).text
    assert lm.tokenizer.apply_chat_template([parts]) == lm.tokenizer.apply_chat_template([ABC])


@pytest.mark.parametrize("name", ["messages", "tools", "tokenize", "add_generation_prompt", "bos_token", "self"])
def test_taken_names_of_template_variables_are_refused(lm: LanguageModel, name: str) -> None:
    with pytest.raises(UsageError, match=f"template_kwargs cannot set '{name}'"):
        lm.chat_stream([ABC], template_kwargs={name: 1})


def test_template_variables_reach_the_template(lm: LanguageModel) -> None:
    template = "{{ 'no' if deep is defined and not deep else 'yes' }}{{ messages[0].content }}"
    texts: list[Any] = []
    for given in (None, {"deep": False}):
        variables = lm.tokenizer.template_kwargs(given)
        texts.append(lm.tokenizer.apply_chat_template([ABC], tokenize=False, template=template, **variables))
    assert texts == ["yesabc", "noabc"]


@pytest.mark.parametrize("messages", ["abc", ABC, [], 5, ["abc"]])
def test_chats_of_another_shape_are_named(lm: LanguageModel, messages: Any) -> None:
    with pytest.raises(TemplateError, match="messages"):
        lm.chat(messages, max_tokens=1)


def test_a_chat_without_a_template_says_so(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "base", ignore=shutil.ignore_patterns("chat_template*"))
    base = runner.load(tmp_path / "base")
    with pytest.raises(TemplateError, match="the model has no chat template"):
        base.chat([ABC])


def test_megabytes_are_refused_before_they_are_split(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 MB were split into tokens for seconds, only to be refused; the bytes alone say that they cannot fit."""
    text = "word " * 1_000_000

    def split(*args: Any, **options: Any) -> list[int]:
        raise AssertionError("the text was split into tokens")

    with monkeypatch.context() as patch:
        for name in ("encode", "encode_rendered", "encode_matches"):
            patch.setattr(lm.tokenizer._backend, name, split)
        for call in (
            lambda: lm.stream(text),
            lambda: lm.chat_stream([{"role": "user", "content": text}], template="{{ messages[0].content }}"),
            lambda: lm.chat([{"role": "user", "content": text}], template="{{ messages[0].content }}<|im_end|>"),
        ):
            with pytest.raises(ContextLengthError, match="at least") as refusal:
                call()
            assert refusal.value.prompt_tokens >= refusal.value.context_length == lm.context_length
    # A little too long is known only once it is split.
    with pytest.raises(ContextLengthError, match=r"has \d+ tokens"):
        lm.stream("." * (lm.context_length + 8))
