"""Tools over HTTP with OpenAI's client: templates that know them, and those that do not."""

from __future__ import annotations

import json

import openai
import pytest
from told_backend import SPECIAL, Running, ToldBackend, tokenizer

from runner.server.roles import Roles

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
ASKED = [{"role": "user", "content": "Weather in Paris?"}]
KNOWING = (
    "{%- if tools -%}{{ '<|im_start|>system\\nTools, called by <tool_call> and </tool_call>: ' + (tools | tojson) "
    "+ '<|im_end|>\\n' }}{%- endif -%}"
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{%- for c in m.tool_calls or [] -%}{{ '<tool_call>' + c.function.name + (c.function.arguments | tojson) }}"
    "{%- endfor -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
CALL = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def script(prompt: str, _order: object) -> str:
    return "It rains." if "rain" in prompt else CALL + ("\n" + CALL if "twice" in prompt else "")


@pytest.fixture(params=["knows", "knows not", "as special tokens"])
def backend(request: pytest.FixtureRequest) -> ToldBackend:
    if request.param == "knows not":
        return ToldBackend(script)
    marks = ("<tool_call>", "</tool_call>") if request.param == "as special tokens" else ()
    return ToldBackend(script, facts=tokenizer(KNOWING, (*SPECIAL, *marks)))


def prompt_of(backend: ToldBackend) -> str:
    return backend.facts.tokenizer.decode(backend.orders[-1].ids, skip_special_tokens=False)


def test_a_turn_with_a_tool(backend: ToldBackend) -> None:
    with Running([backend]) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        answer = client.chat.completions.create(model="told", messages=ASKED, tools=TOOLS)
        (choice,) = answer.choices
        assert "The weather of a city" in prompt_of(backend)
        assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
        (call,) = choice.message.tool_calls or ()
        assert call.type == "function" and call.function.name == "weather"
        assert json.loads(call.function.arguments) == {"city": "Paris"}
        # The same as a stream: one delta begins the call, its arguments join to JSON.
        names, arguments, reasons, text = [], "", [], ""
        for chunk in client.chat.completions.create(model="told", messages=ASKED, tools=TOOLS, stream=True):
            delta = chunk.choices[0].delta
            text += delta.content or ""
            for each in delta.tool_calls or ():
                assert each.index == 0 and each.function is not None
                names += [each.function.name] if each.function.name else []
                arguments += each.function.arguments or ""
            reasons.append(chunk.choices[0].finish_reason)
        assert names == ["weather"] and json.loads(arguments) == {"city": "Paris"} and text == "Let me see."
        assert reasons[-1] == "tool_calls" and set(reasons[:-1]) == {None}
        # And back, with its result.
        history = [
            *ASKED,
            choice.message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "rain"},
        ]
        final = client.chat.completions.create(model="told", messages=history, tools=TOOLS)
        assert final.choices[0].message.content == "It rains." and final.choices[0].finish_reason == "stop"
        assert "rain" in prompt_of(backend) and "Paris" in prompt_of(backend)


def test_one_call_at_a_time(backend: ToldBackend) -> None:
    asked = [{"role": "user", "content": "twice"}]
    with Running([backend]) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        both = client.chat.completions.create(model="told", messages=asked, tools=TOOLS)
        assert len(both.choices[0].message.tool_calls or ()) == 2
        one = client.chat.completions.create(model="told", messages=asked, tools=TOOLS, parallel_tool_calls=False)
        assert len(one.choices[0].message.tool_calls or ()) == 1
        assert one.choices[0].finish_reason == "tool_calls"
        none = client.chat.completions.create(model="told", messages=asked, tools=TOOLS, tool_choice="none")
        assert none.choices[0].message.tool_calls is None and "The weather of a city" not in prompt_of(backend)


def test_a_form_without_an_end_of_its_own_ends_with_the_answer() -> None:
    """But where the length has cut it, arguments may lack."""
    call = "<tool_call>weather<arg_key>city</arg_key><arg_value>Paris</arg_value>"
    made = ToldBackend(lambda prompt, order: call, facts=tokenizer(KNOWING + "{# <arg_key> #}"))
    with Running([made]) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        (whole,) = client.chat.completions.create(model="told", messages=ASKED, tools=TOOLS).choices
        assert whole.finish_reason == "tool_calls" and not whole.message.content
        (made_call,) = whole.message.tool_calls or ()
        assert made_call.type == "function" and json.loads(made_call.function.arguments) == {"city": "Paris"}
        for options in ({"max_tokens": len(call)}, {"stop": "</arg_value>"}):
            (cut,) = client.chat.completions.create(model="told", messages=ASKED, tools=TOOLS, **options).choices
            assert cut.message.tool_calls is None and cut.message.content == call.removesuffix(options.get("stop", ""))


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": TOOLS * 2}, "weather"),
        ({"tools": [{"type": "function", "function": {"name": "a", "mood": 1}}]}, "tools[0].function.mood"),
        ({"functions": []}, "use tools"),
    ],
)
def test_refused_by_name(extra: dict, named: str) -> None:
    with Running([ToldBackend(script)]) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="told", messages=ASKED, extra_body=extra)
        assert named in caught.value.message


def test_reasoning_comes_apart_and_goes_back() -> None:
    thinking = (
        "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}{%- if m.reasoning_content -%}"
        "{{ '<think>' + m.reasoning_content + '</think>' }}{%- endif -%}{{ m.content + '<|im_end|>\\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}"
        "{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think></think>' }}{%- endif -%}{%- endif -%}"
    )
    made = ToldBackend(
        lambda prompt, order: "Paris." if prompt.endswith("</think>") else "<think>Hm, easy.</think>\n\nParis.",
        facts=tokenizer(thinking),
    )
    with Running([made]) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        message = client.chat.completions.create(model="told", messages=ASKED).choices[0].message
        assert message.content == "Paris." and message.model_extra is not None
        assert message.model_extra["reasoning_content"] == message.model_extra["reasoning"] == "Hm, easy."
        thought = text = ""
        usage = None
        for chunk in client.chat.completions.create(
            model="told", messages=ASKED, stream=True, stream_options={"include_usage": True}
        ):
            for choice in chunk.choices:
                thought += (choice.delta.model_extra or {}).get("reasoning_content", "")
                text += choice.delta.content or ""
            usage = chunk.usage
        assert (thought, text) == ("Hm, easy.", "Paris.")
        assert usage is not None and usage.completion_tokens_details is not None
        assert 10 < (usage.completion_tokens_details.reasoning_tokens or 0) < usage.completion_tokens - 5
        history = [*ASKED, {"role": "assistant", "content": "Paris.", "reasoning_content": "Hm."}, *ASKED]
        client.chat.completions.create(model="told", messages=history)
        assert "<think>Hm.</think>Paris." in prompt_of(made)
        off = client.chat.completions.create(model="told", messages=ASKED, reasoning_effort="none")
        assert "reasoning" not in (off.choices[0].message.model_extra or {})
        assert prompt_of(made).endswith("<think></think>")


def test_instructions_anywhere() -> None:
    """As Claude Code and Codex send them; the template knows one system message, at the start."""
    strict = (
        "{%- for m in messages -%}{%- if m.role == 'system' and not loop.first -%}{{ raise_exception('only first') }}"
        "{%- endif -%}{%- if m.role not in ('system', 'user', 'assistant') -%}{{ raise_exception('who?') }}"
        "{%- endif -%}{%- if not loop.first and messages[loop.index0 - 1].role == m.role -%}"
        "{{ raise_exception('turns') }}{%- endif -%}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    )
    made = ToldBackend(lambda prompt, order: "ok", facts=tokenizer(strict))
    messages = [
        {"role": "developer", "content": "one"},
        {"role": "developer", "content": [{"type": "text", "text": "two"}]},
        {"role": "user", "content": "three"},
        {"role": "system", "content": "four"},
        {"role": "user", "content": "five"},
    ]
    with Running([made]) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        client.chat.completions.create(model="told", messages=messages)
    wanted = "<|im_start|>system\none\n\ntwo<|im_end|>\n<|im_start|>user\nthree\n\nfour\n\nfive<|im_end|>\n"
    assert prompt_of(made) == wanted + "<|im_start|>assistant\n"


TURNS = (
    "{%- if messages[0].role == 'system' -%}{{ messages[0].content }}|{%- set messages = messages[1:] -%}{%- endif -%}"
    "{%- for m in messages -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('turns') }}"
    "{%- endif -%}{{ m.role }}: {{ m.content }}|{%- for c in m.tool_calls or [] -%}{{ c.function.name }}()|"
    "{%- endfor -%}{%- endfor -%}"
)


@pytest.mark.parametrize(
    ("roles", "wanted"),
    [
        ("user assistant system user", "user: 0|assistant: 1|user: 2\n\n3|"),
        ("user system assistant user", "user: 0\n\n1|assistant: 2|user: 3|"),
        ("system user system assistant user", "0|user: 1\n\n2|assistant: 3|user: 4|"),
        ("user system user", "user: 0\n\n1\n\n2|"),
        ("user assistant assistant user", "user: 0|assistant: 1\n\n2|user: 3|"),
        ("user assistant user assistant assistant", "user: 0|assistant: 1|user: 2|assistant: 3\n\n4|"),
    ],
)
def test_roles_where_users_and_assistants_take_turns(roles: str, wanted: str) -> None:
    """Gemma 3's template looks at every other place only: it took one chat with a system message, not the next."""
    made = tokenizer(TURNS)
    messages = [{"role": role, "content": str(index)} for index, role in enumerate(roles.split())]
    assert made.apply_chat_template(Roles(made).fit(messages), tokenize=False) == wanted


def test_calls_and_reasoning_of_two_messages_of_the_assistants_stay() -> None:
    made = tokenizer(TURNS)
    calls = [{"type": "function", "function": {"name": name, "arguments": "{}"}} for name in "fg"]
    own = [{"role": "assistant", "content": None, "reasoning_content": "a", "tool_calls": [call]} for call in calls]
    fitted = Roles(made).fit([{"role": "user", "content": "x"}, *own])
    assert fitted[1:] == [{"role": "assistant", "content": "", "reasoning_content": "a\n\na", "tool_calls": calls}]
    assert made.apply_chat_template(fitted, tokenize=False) == "user: x|assistant: |f()|g()|"
