"""Content and arguments reach the text whatever shape a template was written for.

The templates are reduced to the lines that matter, each in the manner of the family that it is called after.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from runner.errors import TemplateError
from runner.text.chat_inputs import ChatInputs, chat_inputs
from runner.text.chat_template import ChatTemplates
from runner.text.template_limits import OverBudgetError
from runner.text.template_shapes import TemplateShapes

A, B = {"type": "text", "text": "a's "}, {"type": "text", "text": "b"}
LOOP = "{% for m in messages %}<{{ m.role }}>BODY{% endfor %}"
WALK = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
CONTENTS = {
    "chatml": "{{ m['content'] + '' }}",
    "qwen3": "{% if m.content is string %}{{ m.content }}{% else %}{{ '' }}{% endif %}",
    "printing": "{{ m.content }}",
    "trimming": "{{ m.content | trim }}",
    "json": "{{ m.content | tojson }}",
    "gemma3": "{% if m.content is string %}{{ m.content }}{% else %}" + WALK + "{% endif %}",
    "smolvlm": WALK,
    "first part": "{{ m.content[0]['text'] }}",
    "mixed": "{% if m.role == 'system' %}{{ m.content | trim }}{% else %}" + WALK + "{% endif %}",
    "alternating": "{% if m.role == 'user' and loop.index0 % 2 %}{{ raise_exception('no') }}{% endif %}{{ m.content }}",
    "no system": "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content + '' }}",
}


def render(source: str, *messages: dict[str, Any], **options: Any) -> str:
    templates = ChatTemplates({}, {})
    return templates.render(source, templates.fit(source, chat_inputs(messages, **options)))


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool", "developer"])
def test_parts_and_text_both_arrive(name: str, role: str) -> None:
    if name == "no system" and role == "system":
        pytest.skip("the template takes no system message in any shape")
    first = [] if role in ("user", "system", "developer") else [{"role": "user", "content": "hi"}]
    source = LOOP.replace("BODY", CONTENTS[name])
    expected = '"a\'s b"' if name == "json" else "a's b"
    for content in ([A, B], ["a's ", "b"], (A, B), "a's b"):
        assert render(source, *first, {"role": role, "content": content}).endswith(f"<{role}>{expected}"), content


def test_a_template_that_goes_through_parts_gets_them_as_they_are() -> None:
    """As in transformers: templates may do something between the parts."""
    body = "{% if m.content is string %}S{% else %}{{ m.content | map(attribute='text') | join('|') }}{% endif %}"
    assert render(LOOP.replace("BODY", body), {"role": "user", "content": [A, B]}) == "<user>a's |b"


def test_empty_content_stays_empty() -> None:
    for body in CONTENTS.values():
        if "[0]" in body:
            continue
        for content in (None, "", []):
            text = render(LOOP.replace("BODY", body), {"role": "user", "content": content})
            assert text in ("<user>", '<user>""'), (body, content)


def test_a_message_to_continue_may_come_in_parts() -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [A, B]}]
    for name in ("chatml", "gemma3", "smolvlm"):
        text = render(LOOP.replace("BODY", CONTENTS[name] + "."), *chat, continue_final_message=True)
        assert text == "<user>hi.<assistant>a's b"


CALLS = {
    "qwen2.5": ("{{ c.function.arguments | tojson }}", '{"city": "Köln"}'),
    "qwen3": (
        "{% set a = c.function.arguments %}{% if a is string %}{{ a }}{% else %}{{ a | tojson }}{% endif %}",
        '{"city": "Köln"}',
    ),
    "deepseek": ("{{ '```' + c['function']['arguments'] + '```' }}", '```{"city": "Köln"}```'),
    "printing": ("{{ c.function.arguments }}", '{"city": "Köln"}'),
    "glm": ("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}", "city=Köln"),
}
CALLED = "{% for m in messages %}{% for c in m.tool_calls or [] %}BODY{% endfor %}{% endfor %}"


def calling(arguments: Any, **message: Any) -> list[dict[str, Any]]:
    calls = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}]
    return [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": calls, **message}]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "weather"}}]])
def test_arguments_come_as_the_template_reads_them(name: str, tools: Any) -> None:
    body, expected = CALLS[name]
    for arguments in ({"city": "Köln"}, '{"city": "Köln"}'):
        assert render(CALLED.replace("BODY", body), *calling(arguments), tools=tools) == expected


def test_a_call_without_a_function_around_it() -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]}]
    source = CALLED.replace("BODY", "{% if c.function %}{% set c = c.function %}{% endif %}{{ c.arguments | tojson }}")
    assert render(source, *chat) == "{}"


def test_missing_and_empty_arguments_are_an_empty_object() -> None:
    for arguments in (None, "", " ", "{}", {}):
        assert render(CALLED.replace("BODY", CALLS["qwen2.5"][0]), *calling(arguments)) == "{}"


@pytest.mark.parametrize("arguments", ['{"city": ', "[1]", "7", "null", "[" * 100_000])
def test_arguments_that_are_no_object(arguments: str) -> None:
    """Passed on where the template takes any text, refused by their path where it needs an object."""
    for name in ("qwen3", "printing"):
        assert render(CALLED.replace("BODY", CALLS[name][0]), *calling(arguments)) == arguments
    for name in ("qwen2.5", "glm"):
        with pytest.raises(
            TemplateError, match=r"^messages\[1\]\.tool_calls\[0\]\.function\.arguments is not the JSON"
        ):
            render(CALLED.replace("BODY", CALLS[name][0]), *calling(arguments))


def test_a_call_with_null_content() -> None:
    """The most frequent chat with tools: OpenAI's answer sent back as it came."""
    calls = "{% for c in m.tool_calls or [] %}" + CALLS["qwen2.5"][0] + "{% endfor %}"
    source = LOOP.replace("BODY", "{{ m.content + '' }}" + calls)
    result = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "clear"}]}
    text = render(source, *calling(json.dumps({"a": 1}), content=None), result)
    assert text == '<user>hi<assistant>{"a": 1}<tool>clear'


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
@pytest.mark.parametrize("content", [None, "", "absent"])
def test_calls_that_are_looked_for_beside_null_content_alone(arguments: Any, content: str | None) -> None:
    """DeepSeek V3's template dropped calls in silence, since their content had become an empty text."""
    source = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and m['content'] is none %}"
        "{% for c in m['tool_calls'] %}{{ c['function']['name'] + c['function']['arguments'] }}{% endfor %}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    given = {} if content == "absent" else {"content": content}
    assert render(source, *calling(arguments, **given)) == '<user>hi<assistant>weather{"a": 1}'


def test_each_question_is_put_once() -> None:
    asked: list[str] = []
    inputs = chat_inputs([{"role": "user", "content": [A]}, {"role": "assistant", "content": "x"}] * 50)

    def answer(probe: ChatInputs) -> str:
        asked.append(str(probe.messages))
        return ""

    shapes = TemplateShapes(answer)
    shapes.fit(inputs)
    first = len(asked)
    shapes.fit(inputs)
    assert first == len(asked) == 6  # two roles, three shapes of content


def test_an_endless_template_is_refused_at_the_first_question() -> None:
    source = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(OverBudgetError):
        render(source, {"role": "user", "content": "x"})
