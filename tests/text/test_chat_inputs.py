"""Messages in OpenAI's shapes are taken, others are refused by their path; so are variables with taken names."""

from __future__ import annotations

from typing import Any

import pytest

from runner.errors import TemplateError, UsageError
from runner.text.chat_inputs import chat_inputs, checked_variables, size_of
from runner.text.template_limits import Budget
from runner.text.template_sandbox import BoundedEnvironment

USER = {"role": "user", "content": "hi"}


def call(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize("message", [{"role": "assistant"}, {"role": "assistant", "content": None}])
def test_absent_content_is_empty(message: dict[str, Any]) -> None:
    assert chat_inputs([USER, message]).messages[1] == {"role": "assistant", "content": ""}


def test_strings_among_parts_are_parts() -> None:
    part = {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}
    content = chat_inputs([{"role": "user", "content": ["a", part]}]).messages[0]["content"]
    assert content == [{"type": "text", "text": "a"}, part]


@pytest.mark.parametrize(
    ("message", "path"),
    [
        (7, r"messages\[1\] is a int"),
        (["role", "user"], r"messages\[1\] is a list"),
        ({"content": "x"}, r"messages\[1\]\.role is missing"),
        ({"role": None, "content": "x"}, r"messages\[1\]\.role is missing"),
        ({"role": 1, "content": "x"}, r"messages\[1\]\.role is a number \(1\)"),
        ({"role": "", "content": "x"}, r"messages\[1\]\.role is text \(''\)"),
        ({"role": "user", "content": 5}, r"messages\[1\]\.content is a number \(5\)"),
        ({"role": "user", "content": True}, r"messages\[1\]\.content is a boolean"),
        ({"role": "user", "content": {"type": "text", "text": "x"}}, r"messages\[1\]\.content is a mapping"),
        ({"role": "user", "content": [5]}, r"messages\[1\]\.content\[0\] is a number"),
        ({"role": "user", "content": [None]}, r"messages\[1\]\.content\[0\] is missing"),
        ({"role": "user", "content": [[USER]]}, r"messages\[1\]\.content\[0\] is a list"),
        ({"role": "user", "content": ["x", {"text": "x"}]}, r"messages\[1\]\.content\[1\]\.type is missing"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
            r"messages\[1\]\.content\[0\]\.type is 'image_url': models here read text only",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, r"messages\[1\]\.content\[0\]\.text is missing"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, r"messages\[1\]\.content\[0\]\.text is a number"),
        ({"role": "assistant", "tool_calls": "f"}, r"messages\[1\]\.tool_calls is text"),
        ({"role": "assistant", "tool_calls": ["f"]}, r"messages\[1\]\.tool_calls\[0\] is text"),
        ({"role": "assistant", "tool_calls": [{"function": "f"}]}, r"messages\[1\]\.tool_calls\[0\]\.function is text"),
        (call([1]), r"messages\[1\]\.tool_calls\[0\]\.function\.arguments is a list"),
        ({"role": "assistant", "tool_calls": [{"arguments": 1}]}, r"messages\[1\]\.tool_calls\[0\]\.arguments is a nu"),
    ],
)
def test_other_shapes_are_refused_by_their_path(message: Any, path: str) -> None:
    with pytest.raises(TemplateError, match=f"^{path}"):
        chat_inputs([USER, message])


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "tokenize", "template", "self",
                                  "continue_final_message", "bos_token", "raise_exception", "image_token"])  # fmt: skip
def test_taken_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"template_kwargs cannot set '{name}'"):
        checked_variables({"enable_thinking": False, name: 1}, {"image_token"})


def test_jinja_s_own_names_are_taken() -> None:
    for name in BoundedEnvironment(Budget(0), chat_inputs([USER]).now).globals:
        with pytest.raises(UsageError, match=name):
            checked_variables({name: 1})


def test_other_variables_are_passed_on() -> None:
    assert checked_variables(None) == {}
    assert checked_variables({"enable_thinking": False, "documents": []}) == {"enable_thinking": False, "documents": []}
    wrong: list[Any] = ["enable_thinking", 5, {1: 2}, {"enable-thinking": 1}, {"": 1}]
    for given in wrong:
        with pytest.raises(UsageError, match="template_kwargs"):
            checked_variables(given)


def test_sizes_by_hand() -> None:
    assert size_of({"ab": ["c", 1, None]}) == 1 + 3 + (1 + 2 + 1 + 1)
