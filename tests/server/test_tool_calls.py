"""Calls of functions in every known form, cut anywhere; what is no call stays text."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from runner.server.tool_calls import SPECIAL, CallFinder, KeepMarks
from runner.server.tool_formats import GENERIC, HARMONY, TABLE, Marks, bare_json, marks_in, read_calls
from runner.text.separator import PlainText

SCHEMAS = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "tags": {"type": "array"},
            "zip": {"type": ["string", "null"]},
        },
    }
}
ONE = [("weather", {"city": "Paris", "days": 2})]
TWO = [("weather", {"city": "Paris"}), ("time", {})]

FORMS: dict[str, tuple[str, Sequence[tuple[str, dict]]]] = {
    "hermes": ('<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>', ONE),
    "hermes, two": (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n<tool_call>\n'
        '{"name": "time", "arguments": {}}\n</tool_call>',
        TWO,
    ),
    "hermes, text of the mark": (
        '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call>"}}</tool_call>',
        [("weather", {"city": "</tool_call>"})],
    ),
    "qwen3-coder": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
        "</function>\n</tool_call>",
        ONE,
    ),
    "qwen3-coder, no mark": (
        "<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>",
        ONE,
    ),
    "glm": (
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call>",
        ONE,
    ),
    "mistral": (
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris", "days": 2}, "id": "abcdefghi"}]',
        ONE,
    ),
    "mistral 3": ('[TOOL_CALLS]weather[ARGS]{"city": "Paris"}[TOOL_CALLS]time[ARGS]{}', TWO),
    "mistral, id": ('[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{"city": "Paris", "days": 2}', ONE),
    "llama 3": ('<|python_tag|>{"name": "weather", "parameters": {"city": "Paris", "days": 2}}', ONE),
    "llama 3.2": ('<|python_tag|>[weather(city="Paris", days=2)]', ONE),
    "deepseek 3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Paris"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        TWO,
    ),
    "deepseek 3.1": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Paris", "days": 2}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ONE,
    ),
    "kimi": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        '{"city": "Paris", "days": 2}<|tool_call_end|><|tool_calls_section_end|>',
        ONE,
    ),
    "minimax": (
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="days">2</parameter>\n</invoke>\n</minimax:tool_call>',
        ONE,
    ),
    "command": (
        '<|START_ACTION|>[\n  {"tool_call_id": "0", "tool_name": "weather", "parameters": {"city": "Paris", "days": 2}}'
        "\n]<|END_ACTION|>",
        ONE,
    ),
    "lfm2": ('<|tool_call_start|>[weather(city="Paris"), time()]<|tool_call_end|>', TWO),
    "functiongemma": (
        "<start_function_call>call:weather{city:<escape>Paris<escape>,days:2}<end_function_call>",
        ONE,
    ),
    "gemma 4": ('<|tool_call>call:weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>', ONE),
    "granite 3": ('<|tool_call|>[{"name": "weather", "arguments": {"city": "Paris", "days": 2}}]', ONE),
    "phi 4": ('<|tool_call|>[{"name": "weather", "arguments": {"city": "Paris", "days": 2}}]<|/tool_call|>', ONE),
    "gpt-oss": (
        "<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
        '{"city":"Paris","days":2}',
        ONE,
    ),
    "gpt-oss, role first": (
        '<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{"city":"Paris","days":2}',
        ONE,
    ),
}


def run(finder: CallFinder, pieces: Sequence[str]) -> tuple[str, list[tuple[str, dict]]]:
    """Text and calls of an answer in pieces."""
    text, calls = "", []
    for piece in pieces:
        shown, found = finder.add(piece)
        text += shown
        calls += found
    shown, found = finder.flush()
    calls += found
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls)
    return text + shown, [(call.name, json.loads(call.arguments)) for call in calls]


def marks_of(text: str) -> tuple[Marks, ...]:
    """The marks that a template would name which writes calls so."""
    return (HARMONY,) if text.startswith("<|start|>") else marks_in(text)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_cut_anywhere(form: str) -> None:
    text, wanted = FORMS[form]
    marks = marks_of(text)
    assert marks
    for size in (1, 2, 3, 7, 1000):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert run(CallFinder(marks, SCHEMAS), pieces) == ("", list(wanted)), size
        shown, calls = run(CallFinder(marks, SCHEMAS), ["I look. ", "\n", *pieces])
        assert (shown, calls) == ("I look.", list(wanted)), size


@pytest.mark.parametrize("form", FORMS)
def test_a_call_that_is_cut_off_is_text_and_not_lost(form: str) -> None:
    """Cut in the middle of its arguments."""
    text, _ = FORMS[form]
    cut = text[: text.index("city") + 8]
    shown, calls = run(CallFinder(marks_of(text), SCHEMAS), list(cut))
    if len(calls) == 0:
        assert shown == cut
    else:
        assert form == "nothing"


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>", "a < b <tool", "<tool_call>not a call</tool_call> and on", '<tool_call>{"name": 1}</tool_call>',
        "[TOOL_CALLS] none", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "plain  \n text \n",
        '{"city": "Paris"}', "<tool_call><function=f>loose</function></tool_call>",
    ],
)  # fmt: skip
def test_what_is_no_call_is_text(text: str) -> None:
    for size in (1, 4, 100):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        finder = CallFinder((TABLE[0], TABLE[2]), SCHEMAS, bare=True)
        assert run(finder, pieces) == (text, [])


def test_bare_json_is_a_call_only_of_a_function_that_is_there() -> None:
    known = '{"name": "weather", "parameters": {"city": "Paris", "days": 2}}'
    assert run(CallFinder((), SCHEMAS, bare=True), list(known)) == ("", ONE)
    other = known.replace("weather", "someone")
    assert run(CallFinder((), SCHEMAS, bare=True), list(other)) == (other, [])
    assert run(CallFinder((), SCHEMAS), list(known)) == (known, [])
    assert bare_json('Respond in the format {"name": function name, "parameters": ...}')


def test_values_get_the_types_of_the_schema() -> None:
    def read(key: str, value: str) -> object:
        found = read_calls(f"<function=weather><parameter={key}>{value}</parameter></function>", SCHEMAS)
        assert found is not None
        return json.loads(found[0].arguments)[key]

    assert read("city", "12") == "12" and read("days", "12") == 12 and read("exact", "True") is True
    assert read("tags", '["a"]') == ["a"] and read("zip", "075") == "075" and read("zip", "null") is None
    assert read("zip", "75") == "75" and read("other", "x y") == "x y" and read("days", "many") == "many"


def test_nothing_is_run() -> None:
    for text in ("[f(a=__import__('os'))]", "f(*[1])", "f(**{})", "(lambda: 1)()", "f(a=1+1)", "f(a=open('x'))"):
        assert read_calls(text, {}) is None or "import" not in str(read_calls(text, {}))
    assert read_calls("f(a=__import__('os').system('x'))", {}) is None


def test_special_tokens_are_marks_and_text_that_spells_them_is_not() -> None:
    finder = CallFinder((GENERIC,), SCHEMAS, special={"<tool_call>", "</tool_call>"})
    separator = KeepMarks(PlainText(), {"<tool_call>", "</tool_call>"})
    body = '{"name": "weather", "arguments": {"city": "Paris", "days": 2}}'
    spelled = f"<tool_call>{body}</tool_call>"
    assert run(finder, [separator.add(spelled, False).content]) == (spelled, [])
    finder = CallFinder((GENERIC,), SCHEMAS, special={"<tool_call>", "</tool_call>"})
    pieces = [separator.add(text, special).content for text, special in
              (("<tool_call>", True), (body, False), ("</tool_call>", True), ("<other>", True))]  # fmt: skip
    assert SPECIAL in pieces[0] and run(finder, pieces) == ("", ONE)


def test_ids_of_nine() -> None:
    finder = CallFinder((GENERIC,), SCHEMAS, nine=True)
    _, calls = finder.add(FORMS["hermes"][0])
    assert len(calls[0].id) == 9 and calls[0].id.isalnum()
