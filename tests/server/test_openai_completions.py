"""OpenAI's completions: texts, lists, ids, and log-probabilities in the form that lm-eval reads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import ollama
import openai
import pytest
from places import ROOT
from told_backend import SPECIAL, Running, ToldBackend, local, spaced_tokenizer, tokenizer

import runner
from runner.ops.device import current

FIXTURE = ROOT / "tests" / "fixtures" / "llama" / "llama-gqa"


@pytest.fixture(scope="module")
def told() -> ToldBackend:
    return ToldBackend(lambda prompt, order: f"<{prompt}>")


@pytest.fixture(scope="module")
def server(told: ToldBackend) -> Iterator[Running]:
    with Running([told]) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def test_every_form_of_prompt(told: ToldBackend, client: openai.OpenAI) -> None:
    ids = told.facts.tokenizer.encode("ab")
    for prompt, wanted in (
        ("ab", ["<ab>"]),
        (["ab", "cd"], ["<ab>", "<cd>"]),
        (ids, ["<ab>"]),
        ([ids, ids], ["<ab>", "<ab>"]),
    ):
        answer = client.completions.create(model="told", prompt=prompt)
        assert [choice.text for choice in answer.choices] == wanted
        assert [choice.index for choice in answer.choices] == list(range(len(wanted)))
        assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_several_choices_of_several_prompts_streamed(client: openai.OpenAI) -> None:
    texts = {}
    for chunk in client.completions.create(model="told", prompt=["a", "b"], n=2, stream=True, echo=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {0: "a<a>", 1: "a<a>", 2: "b<b>", 3: "b<b>"}


def test_special_tokens_in_a_prompt_are_meant(told: ToldBackend, client: openai.OpenAI) -> None:
    client.completions.create(model="told", prompt="<|im_start|>x")
    assert told.orders[-1].ids[0] == told.facts.tokenizer.special_tokens["<|im_start|>"]


def test_what_stands_between_two_texts() -> None:
    """By the tokens of the model's vocabulary, as its makers write them; the answer ends at any of them."""
    for marks, first, wanted in (
        (("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), "<|file_sep|>", "{0}a{1}b{2}"),
        (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), "<fim_pad>", "{0}a{1}b{2}"),
        (("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"), "<｜fim▁hole｜>", "{0}a{1}b{2}"),
        (("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>"), "<[fim-suffix]>", "{1}b{0}a{2}"),
    ):
        # Half of them added and not special, as Qwen has them.
        made = tokenizer(special=(*SPECIAL, *marks[:2]), added=(marks[2], *({first} - set(marks))))
        told = ToldBackend(lambda prompt, order, end=first: f"middle{end}more", facts=made)
        with Running([told]) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
            answer = client.completions.create(model="told", prompt="a", suffix="b").choices[0]
            assert (answer.text, answer.finish_reason) == ("middle", "stop")
            assert made.decode(told.orders[-1].ids, skip_special_tokens=False) == wanted.format(*marks)
            assert client.completions.create(model="told", prompt="a", suffix="").choices[0].text != "middle"
            with pytest.raises(openai.BadRequestError, match="ids"):
                client.completions.create(model="told", prompt=[1], suffix="b")
            with pytest.raises(openai.BadRequestError, match="echo"):
                client.completions.create(model="told", prompt="a", suffix="b", echo=True)
            there = ollama.Client(server.url)
            assert there.generate("told", "a", suffix="<|im_end|>").response == "middle"
            assert made.special_tokens["<|im_end|>"] in told.orders[-1].ids
            assert "insert" in (there.show("told").capabilities or ())
            with pytest.raises(ollama.ResponseError, match="suffix"):
                there.generate("told", "a", suffix="b", raw=True)


def test_an_end_that_is_kept_from_coming(told: ToldBackend, client: openai.OpenAI) -> None:
    client.completions.create(model="told", prompt="x", max_tokens=2, extra_body={"ignore_eos": True})
    (end,) = told.facts.eos_token_ids
    assert told.orders[-1].params.logit_bias[end] < -1e30
    biased = {"ignore_eos": True, "logit_bias": {str(end): 2, "5": 1}}
    client.completions.create(model="told", prompt="x", max_tokens=2, extra_body=biased)
    assert told.orders[-1].params.logit_bias[5] == 1 and told.orders[-1].params.logit_bias[end] < -1e30


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [["a"]]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[0]"),
        ({"prompt": [10**12]}, "token ids"),
        ({"prompt": ""}, "empty"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "echo"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo"),
    ],
)
def test_refused_by_name(client: openai.OpenAI, extra: dict, named: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="told", prompt="x", extra_body=extra)
    assert named in caught.value.message


@pytest.fixture(scope="module")
def real() -> Iterator[tuple[openai.OpenAI, runner.LanguageModel]]:
    lm = runner.load(FIXTURE, dtype=None if current().ops.one_form else "float32")
    with Running([local(lm, "tiny")]) as running:
        yield openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0), lm


def test_a_real_model_gives_what_the_library_gives(real: tuple[openai.OpenAI, runner.LanguageModel]) -> None:
    client, lm = real
    wanted = lm.generate("abc", max_tokens=8, temperature=0)
    for stream in (False, True):
        answer = client.completions.create(model="tiny", prompt="abc", max_tokens=8, temperature=0, stream=stream)
        text = "".join(c.choices[0].text for c in answer) if stream else answer.choices[0].text
        assert text == wanted.text
    drawn = lm.generate("abc", max_tokens=8, temperature=1.0, seed=3)
    same = client.completions.create(model="tiny", prompt="abc", max_tokens=8, temperature=1, seed=3, n=2)
    assert same.choices[0].text == drawn.text != same.choices[1].text


def test_the_same_tokens_alone_together_and_again(real: tuple[openai.OpenAI, runner.LanguageModel]) -> None:
    """Batched, from the cache of an earlier one, and alone: one definition of each sum."""
    client, lm = real
    prompts = ["abcabcabc" * count for count in range(1, 9)]

    def ask(prompt: str) -> str:
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=1, seed=9)
        return answer.choices[0].text

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, prompts))
    assert together == [lm.generate(prompt, max_tokens=12, temperature=1.0, seed=9).text for prompt in prompts]
    assert [ask(prompt) for prompt in prompts] == together


def test_echo_and_logprobs_as_lm_eval_reads_them(real: tuple[openai.OpenAI, runner.LanguageModel]) -> None:
    """`local-completions` sums the log-probabilities from the context's length to the last but one."""
    client, lm = real
    ids = lm.tokenizer.encode("abcdef")
    answer = client.completions.create(
        model="tiny", prompt=[ids], max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
    )
    found = answer.choices[0].logprobs
    assert found is not None and found.token_logprobs is not None and found.top_logprobs is not None
    assert len(found.token_logprobs) == len(ids) + 1 and found.token_logprobs[0] is None
    logits = lm.logits(ids)
    scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for place in range(1, len(ids)):
        wanted = float(scores[place - 1, ids[place]])
        assert math.isclose(found.token_logprobs[place], wanted, abs_tol=1e-4)
        assert max(found.top_logprobs[place].values()) >= found.token_logprobs[place]
        likeliest = float(mx.max(scores[place - 1]))
        assert math.isclose(max(found.top_logprobs[place].values()), likeliest, abs_tol=1e-4)
    assert found.text_offset == sorted(found.text_offset)
    only = client.completions.create(model="tiny", prompt=[ids], max_tokens=0, logprobs=1, echo=True)
    assert only.choices[0].logprobs.token_logprobs == found.token_logprobs[:-1]


@pytest.mark.parametrize("prompt", ["", "abc é ", "<s>", "ids"])
def test_offsets_are_where_tokens_stand_in_the_text(
    real: tuple[openai.OpenAI, runner.LanguageModel], prompt: str
) -> None:
    """What is put before a text is not in it, and parts of a character begin where it does."""
    client, lm = real
    given: Any = [lm.tokenizer.encode("déf")] if prompt == "ids" else prompt
    for echo in (False, True):
        answer = client.completions.create(
            model="tiny", prompt=given, max_tokens=20, temperature=1.5, logprobs=0, echo=echo, seed=5
        ).choices[0]
        found = answer.logprobs
        assert found is not None and found.tokens and found.text_offset
        assert found.text_offset == sorted(found.text_offset) and found.text_offset[-1] <= len(answer.text)
        for token, place in list(zip(found.tokens, found.text_offset, strict=True))[1:]:
            stands = answer.text[place : place + len(token)]
            # Behind bytes that have become no character, their sign comes first.
            broken = token.startswith("bytes:") or stands.startswith("\ufffd")
            assert broken or stands == token or lm.tokenizer.decode([lm.tokenizer.encode(token)[-1]]) == "", token


def test_an_answer_goes_on_with_its_prompt(tmp_path: Path) -> None:
    """The space between the two was lost, since a text begins without one: "Paris isbig"."""
    with Running([ToldBackend(lambda prompt, order: "big", facts=spaced_tokenizer(tmp_path))]) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0)
        assert client.completions.create(model="told", prompt="Paris is").choices[0].text == " big"
        for stream in (False, True):
            sent: dict[str, Any] = {"model": "told", "prompt": "Paris is", "logprobs": 0, "stream": stream}
            made = client.completions.create(**sent, echo=not stream)
            choices = [chunk.choices[0] for chunk in made] if stream else [made.choices[0]]
            assert "".join(choice.text for choice in choices) == (" big" if stream else "Paris is big")
            assert choices[0].logprobs.text_offset[-1] == (0 if stream else len("Paris is"))
        asked, begun = {"role": "user", "content": "big"}, {"role": "assistant", "content": "Paris is"}
        for messages, wanted in (([asked, begun], " big"), ([asked], "big")):
            found = client.chat.completions.create(model="told", messages=messages)  # type: ignore[arg-type]
            assert found.choices[0].message.content == wanted
        assert ollama.Client(host=running.url).generate("told", "Paris is", raw=True).response == " big"


def test_a_directory_is_no_model_name(real: tuple[openai.OpenAI, runner.LanguageModel], tmp_path: Path) -> None:
    client, _ = real
    for name in (str(FIXTURE), "../../etc/passwd", str(tmp_path)):
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=name, prompt="x")
