"""OpenAI's chat over a real socket, with the official client as the judge."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import openai
import pytest
from told_backend import CHATML, Running, ToldBackend, events, tokenizer, waited

HELLO = [{"role": "user", "content": "Say hello"}]


@pytest.fixture(scope="module")
def told() -> ToldBackend:
    return ToldBackend(lambda prompt, order: "Hello there, é€😀!" if "hello" in prompt else f"[{prompt}]")


@pytest.fixture(scope="module")
def server(told: ToldBackend) -> Iterator[Running]:
    with Running([told], {"other": "told"}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def test_a_whole_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="told", messages=HELLO)
    (choice,) = answer.choices
    assert choice.message.content == "Hello there, é€😀!" and choice.finish_reason == "stop"
    assert answer.object == "chat.completion" and answer.model == "told"
    assert answer.usage is not None and answer.usage.total_tokens == answer.usage.prompt_tokens + 24
    assert answer.usage.completion_tokens == 24  # 23 bytes and the end token


def test_a_stream_is_the_whole_in_pieces(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="told", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello there, é€😀!"
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == "stop" and set(reasons[:-1]) == {None}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_every_chunk_on_the_wire_has_the_fields_that_clients_count_on(server: Running) -> None:
    sent = httpx2.post(f"{server.url}/v1/chat/completions", json={"messages": HELLO, "stream": True})
    assert sent.headers["content-type"].startswith("text/event-stream") and sent.text.endswith("data: [DONE]\n\n")
    for chunk in events(sent.text):
        assert chunk["object"] == "chat.completion.chunk" and "usage" not in chunk
        (choice,) = chunk["choices"]
        assert choice["index"] == 0 and choice["finish_reason"] in (None, "stop")


def test_sampling_reaches_the_engine(told: ToldBackend, client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model="told",
        messages=HELLO,
        temperature=0.5,
        top_p=0.5,
        seed=7,
        presence_penalty=1,
        frequency_penalty=0.5,
        logit_bias={"5": -3},
        max_completion_tokens=3,
        extra_body={"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "priority": 3},
    )
    order = told.orders[-1]
    params = order.params
    assert (params.temperature, params.top_p, params.seed, params.top_k, params.min_p) == (0.5, 0.5, 7, 4, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, 0.5, 1.1)
    assert params.logit_bias == {5: -3.0} and order.max_tokens == 3
    assert order.priority == -3, "vLLM's lower numbers go first"


def test_variables_reach_the_template() -> None:
    told = ToldBackend(lambda prompt, order: "yes", facts=tokenizer(CHATML + "{% if loud %}LOUD{% endif %}"))
    with Running([told]) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        for loud in (False, True):
            more = {"chat_template_kwargs": {"loud": loud}}
            client.chat.completions.create(model="told", messages=HELLO, extra_body=more)
            prompt = told.facts.tokenizer.decode(told.orders[-1].ids, skip_special_tokens=False)
            assert prompt.endswith("LOUD") is loud


def test_length_flushes_what_was_held_back(client: openai.OpenAI) -> None:
    """llama-server loses the possible start of a stop text there."""
    for stream in (False, True):
        answer = client.chat.completions.create(
            model="told", messages=HELLO, stop=["llo there, but"], max_tokens=9, stream=stream
        )
        if stream:
            chunks = list(answer)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello the"
            assert chunks[-1].choices[0].finish_reason == "length"
        else:
            assert answer.choices[0].message.content == "Hello the"
            assert answer.choices[0].finish_reason == "length"


def test_stop_texts(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="told", messages=HELLO, stop=["there", "!"])
    assert answer.choices[0].message.content == "Hello " and answer.choices[0].finish_reason == "stop"


def test_several_choices(told: ToldBackend, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="told", messages=HELLO, n=3, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert sorted(order.choice for order in told.orders[-3:]) == [0, 1, 2]
    assert answer.usage is not None and answer.usage.completion_tokens == 72
    chunks = list(client.chat.completions.create(model="told", messages=HELLO, n=3, stream=True))
    for index in range(3):
        text = [c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == index]
        assert "".join(text) == "Hello there, é€😀!"


def test_logprobs_streamed_and_not(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="told", messages=HELLO, logprobs=True, top_logprobs=2)
    assert whole.choices[0].logprobs is not None
    content = whole.choices[0].logprobs.content
    assert content is not None and len(content) == 23 and all(len(each.top_logprobs) == 2 for each in content)
    assert bytes(byte for each in content for byte in each.bytes or ()).decode() == "Hello there, é€😀!"
    streamed = []
    for chunk in client.chat.completions.create(
        model="told", messages=HELLO, logprobs=True, top_logprobs=2, stream=True
    ):
        logprobs = chunk.choices[0].logprobs
        streamed += (logprobs.content or []) if logprobs is not None else []
    assert [each.model_dump() for each in streamed] == [each.model_dump() for each in content]


def test_content_as_parts_and_prefill(told: ToldBackend, client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "One "}, {"type": "text", "text": "two"}]
    client.chat.completions.create(
        model="told", messages=[{"role": "user", "content": parts}, {"role": "assistant", "content": "Well"}]
    )
    prompt = told.facts.tokenizer.decode(told.orders[-1].ids, skip_special_tokens=False)
    assert prompt == "<|im_start|>user\nOne two<|im_end|>\n<|im_start|>assistant\nWell"


def test_two_fields_say_whether_a_message_is_continued(server: Running) -> None:
    asked, begun = {"role": "user", "content": "x"}, {"role": "assistant", "content": "Well"}

    def prompt(messages: list[dict[str, str]], **fields: bool) -> str:
        sent = httpx2.post(f"{server.url}/v1/chat/completions/render", json={"messages": messages, **fields})
        return str(sent.json()["prompt"] if sent.status_code == 200 else sent.json()["error"]["param"])

    for fields in ({}, {"continue_final_message": True, "add_generation_prompt": False}):
        assert prompt([asked, begun], **fields).endswith("assistant\nWell")
    for fields in ({"continue_final_message": False}, {"add_generation_prompt": True}):
        assert prompt([asked, begun], **fields).endswith("Well<|im_end|>\n<|im_start|>assistant\n")
    for messages in ([asked], [asked, begun]):
        assert prompt(messages, continue_final_message=False, add_generation_prompt=False) == "add_generation_prompt"
    assert prompt([asked, begun], continue_final_message=True, add_generation_prompt=True) == "add_generation_prompt"
    assert prompt([asked], continue_final_message=True) == "continue_final_message"


@pytest.mark.parametrize("opening", ["", "<think>\\n"])
@pytest.mark.parametrize(
    ("user", "begun", "answer", "content", "reasoning"),
    [
        ("x", "Paris is", " big.", " big.", None),
        ("what is <think>?", "It is", " a mark.", " a mark.", None),
        ("x", "It is ", "<think> that opens.", "<think> that opens.", None),
        ("x", "<think>\nLet me", " see</think>\n\nParis.", "Paris.", " see"),
        ("x", "<think>\nLet me</think>\n\nPa", "ris.", "ris.", None),
    ],
)
def test_a_continued_message_goes_on_as_what_it_is(
    opening: str, user: str, begun: str, answer: str, content: str, reasoning: str | None
) -> None:
    """It was taken for a new one: all of it was reasoning where the template opens a block for new answers."""
    template = CHATML.replace("assistant\n", f"assistant\n{opening}")
    backend = ToldBackend(lambda prompt, order: answer, facts=tokenizer(template + "{# <think> </think> #}"))
    with Running([backend]) as running:
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": begun}]
        sent = httpx2.post(f"{running.url}/v1/chat/completions", json={"messages": messages}).json()
    found = sent["choices"][0]["message"]
    assert (found["content"], found.get("reasoning_content")) == (content, reasoning)


def test_render_gives_the_prompt_of_the_same_chat(told: ToldBackend, server: Running, client: openai.OpenAI) -> None:
    shown = httpx2.post(f"{server.url}/v1/chat/completions/render", json={"messages": HELLO}).json()
    client.chat.completions.create(model="told", messages=HELLO)
    assert shown["token_ids"] == list(told.orders[-1].ids)
    assert shown["prompt"] == "<|im_start|>user\nSay hello<|im_end|>\n<|im_start|>assistant\n"


def test_what_a_user_writes_is_no_special_token(told: ToldBackend, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="told", messages=[{"role": "user", "content": "hello <|im_end|>"}])
    special = told.facts.tokenizer.special_tokens
    assert list(told.orders[-1].ids).count(special["<|im_end|>"]) == 1


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"temprature": 1}, "'temprature'; did you mean 'temperature'"),
        ({"guided_json": {}}, "structured_outputs"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "'messages[0].mood'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
        ({"messages": []}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"seed": 1.5}, "seed"),
        ({"n": 0}, "n must be"),
        ({"n": 10**9}, "n must be"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"store": True}, "store"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"99999": 1}}, "99999"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"reasoning_effort": "very"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"messages": []}}, "messages"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(client: openai.OpenAI, extra: dict, named: str) -> None:
    body = {"model": "told", "messages": HELLO, **extra}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="told", messages=HELLO, extra_body=body)
    assert named in caught.value.message, caught.value.message
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"temperature": -1}, "temperature"),
        ({"seed": 10**20}, "seed"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_an_error_has_the_name_of_the_field_as_it_was_sent(client: openai.OpenAI, extra: dict, field: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="told", messages=HELLO, extra_body=extra)
    assert caught.value.param == field and field in caught.value.message


def test_inert_fields_are_left_out_and_said(client: openai.OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model="told", messages=HELLO, user="me", metadata={"a": "b"}, store=False, prompt_cache_key="k"
    )
    assert answer.headers["x-runner-ignored"] == "metadata, prompt_cache_key, store, user"


def test_unknown_models_are_not_found_and_aliases_are(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="HuggingFaceTB/SmolLM2-135M", messages=HELLO)
    assert caught.value.code == "model_not_found" and "told" in caught.value.message
    assert client.chat.completions.create(model="other", messages=HELLO).model == "other"
    assert [model.id for model in client.models.list()] == ["told", "other"]
    assert client.models.retrieve("other").id == "other"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")


def test_a_prompt_beyond_the_context(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="told", messages=[{"role": "user", "content": "x" * 5000}])
    assert caught.value.code == "context_length_exceeded"
    assert "4096" in caught.value.message and "5019" in caught.value.message


def test_embeddings_say_why_not(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not made to embed"):
        client.embeddings.create(model="told", input="x")


def test_tokenize_and_back(server: Running) -> None:
    text = "Hé <|im_start|>"
    made = httpx2.post(f"{server.url}/tokenize", json={"prompt": text}).json()
    assert made["count"] == len(made["tokens"]) == 5 and made["max_model_len"] == 4096
    assert httpx2.post(f"{server.url}/detokenize", json={"tokens": made["tokens"]}).json() == {"prompt": text}


def test_a_failing_engine_ends_streams_with_an_error_and_begins_anew() -> None:
    backend = ToldBackend(lambda prompt, order: "Hello there")
    with Running([backend], on_engine_failure="restart") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        for stream in (True, False):
            backend.fails = RuntimeError("secret details")
            with pytest.raises(openai.APIError) as caught:
                list(client.chat.completions.create(model="told", messages=HELLO, stream=stream))
            assert "secret" not in caught.value.message
            assert httpx2.get(f"{server.url}/health").status_code == 200 and not backend.dead
        assert client.chat.completions.create(model="told", messages=HELLO).choices[0].finish_reason == "stop"
        assert server.serving.places.taken == 0


def test_a_failing_engine_tells_all_and_ends_the_process() -> None:
    backend = ToldBackend(lambda prompt, order: "Hello there")
    with Running([backend]) as server:
        backend.held.clear()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        streams = [iter(client.chat.completions.create(model="told", messages=HELLO, stream=True)) for _ in range(3)]
        for stream in streams:
            next(stream)
        backend.fails = RuntimeError("out of order")
        backend.held.set()
        for stream in streams:
            with pytest.raises(openai.APIError):
                list(stream)
    assert server.code == 1


def test_a_dead_engine_shows_in_health_and_refuses() -> None:
    backend = ToldBackend(lambda prompt, order: "Hello there")
    with Running([backend]) as server:
        server.serving.on_failure = lambda served: None
        backend.dead = True
        assert httpx2.get(f"{server.url}/health").status_code == 503
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.InternalServerError) as later:
            client.chat.completions.create(model="told", messages=HELLO)
        assert later.value.status_code == 503 and later.value.code == "engine_failed"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(stream: bool) -> None:
    backend = ToldBackend(lambda prompt, order: "x" * 3000)
    backend.pause = 0.002
    with Running([backend]) as server:
        for waits in (True, False):
            if waits:
                backend.held.clear()  # still reading the prompt
            body = {"messages": HELLO, "stream": stream}
            with (
                pytest.raises(httpx2.ReadTimeout),
                httpx2.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=0.3) as sent,
            ):
                for _ in sent.iter_raw():
                    if not waits:
                        raise httpx2.ReadTimeout("enough")
            assert waited(lambda: backend.open == 0), "the row is still held"
            backend.held.set()
        assert waited(lambda: server.serving.places.taken == 0)
        assert backend.made < 1000


def test_more_than_there_are_places_for() -> None:
    backend = ToldBackend(lambda prompt, order: "x" * 50)
    backend.held.clear()
    with Running([backend], max_queue=2) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        stream = client.chat.completions.create(model="told", messages=HELLO, n=2, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="told", messages=HELLO)
        assert caught.value.response.headers["retry-after"] == "1" and caught.value.code == "queue_full"
        with pytest.raises(openai.BadRequestError, match="max-queue"):
            client.chat.completions.create(model="told", messages=HELLO, n=3)
        backend.held.set()
        list(stream)
        client.chat.completions.create(model="told", messages=HELLO)
