"""Calls of functions in every known form, cut anywhere; what is no call stays text."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from found_calls import read, run

from runner.server.tool_calls import SPECIAL, Call, CallFinder, KeepMarks, arguments_of
from runner.server.tool_formats import GENERIC, HARMONY, TABLE, Marks, bare_json, marks_in
from runner.text.harmony import HarmonySeparator
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
    "seed-oss": (
        "<seed:tool_call>\n<function=weather>\n<parameter=city>Paris</parameter>\n<parameter=days>2</parameter>\n"
        "</function>\n</seed:tool_call>",
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
    def value_of(key: str, value: str) -> object:
        found = read(f"<function=weather><parameter={key}>{value}</parameter></function>", SCHEMAS)
        assert found is not None
        return json.loads(found[0].arguments)[key]

    assert value_of("city", "12") == "12" and value_of("days", "12") == 12 and value_of("exact", "True") is True
    assert value_of("tags", '["a"]') == ["a"] and value_of("zip", "075") == "075" and value_of("zip", "null") is None
    assert value_of("zip", "75") == "75" and value_of("other", "x y") == "x y" and value_of("days", "many") == "many"


def test_nothing_is_run() -> None:
    for text in ("[f(a=__import__('os'))]", "f(*[1])", "f(**{})", "(lambda: 1)()", "f(a=1+1)", "f(a=open('x'))"):
        assert read(text, {}) is None or "import" not in str(read(text, {}))
    assert read("f(a=__import__('os').system('x'))", {}) is None


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


@pytest.mark.parametrize(
    "mark",
    [
        "<arg_key>", "<arg_key></arg_key>", "<arg_key></arg_key><arg_value>", "<function=f>", "<parameter=a>",
        '<invoke name="f">', "[ARGS]", "call:f{", "{a:", "<escape>", "[CALL_ID]", " to=", " ", "a", ":0", "functions.",
        "f(", "(a=", "```json", "<|start|>assistant to=",
    ],
)  # fmt: skip
@pytest.mark.parametrize("before", ["", "f", "<function=f>", "call:f{a:", "<|start|>assistant", "[f(a="])
def test_a_call_is_read_in_a_time_that_grows_with_its_length(mark: str, before: str) -> None:
    """By an expression that tries all ways, 1,200 tokens took seconds, in which nobody else got an answer."""
    text = before + mark * (300_000 // len(mark)) + "!"
    assert read(text, SCHEMAS) is None and read(text, SCHEMAS, cut=True) is None


def test_a_call_whose_end_is_spelled_all_the_time_is_text() -> None:
    text = "<tool_call>" + '{"name": "' + "</tool_call>" * 2000
    assert run(CallFinder((GENERIC,), SCHEMAS), [text[:500], text[500:]]) == (text, [])


def test_a_quoted_message_of_harmony_is_no_call() -> None:
    """Only the token is a mark: a document may have its text."""
    quote = FORMS["gpt-oss"][0]
    tokens = frozenset({"<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"})
    final = [("<|channel|>", True), ("final", False), ("<|message|>", True), ("It says: ", False), (quote, False)]
    separator = HarmonySeparator(tokens)
    separator.around = SPECIAL
    kept = KeepMarks(separator, ())
    pieces = [kept.add(text, special).content for text, special in final]
    assert run(CallFinder((HARMONY,), SCHEMAS, special=tokens), pieces) == ("It says: " + quote, [])
    header = [
        ("<|start|>", True),
        ("assistant", False),
        ("<|channel|>", True),
        ("commentary to=functions.weather", False),
    ]
    made = [*header, ("<|message|>", True), ('{"city":"Paris","days":2}', False)]
    pieces = [kept.add(text, special).content for text, special in (("<|end|>", True), *made)]
    assert run(CallFinder((HARMONY,), SCHEMAS, special=tokens), pieces) == ("", ONE)


def test_the_character_around_marks_makes_none() -> None:
    separator = KeepMarks(PlainText(), {"<tool_call>", "</tool_call>"})
    finder = CallFinder((GENERIC,), SCHEMAS, special={"<tool_call>", "</tool_call>"})
    spelled = FORMS["hermes"][0].replace("<tool_call>", f"{SPECIAL}<tool_call>{SPECIAL}")
    text, calls = run(finder, [separator.add(spelled, False).content])
    assert not calls and text == spelled.replace(SPECIAL, "\ufffd")


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "arguments": {"a": VALUE}}', "f[ARGS]{\"a\": VALUE}", "f(a=VALUE)",
        "f<arg_key>a</arg_key><arg_value>VALUE</arg_value>", "<function=f><parameter=a>VALUE</parameter></function>",
    ],
)  # fmt: skip
def test_arguments_are_json_that_everybody_can_read(text: str) -> None:
    """No half of a surrogate pair, which no UTF-8 has, and no number that JSON has not."""
    half = read(text.replace("VALUE", '"\\ud83d"'), {})
    assert half is not None and json.loads(half[0].arguments) == {"a": "\ufffd"}
    whole = read(text.replace("VALUE", '"\\ud83d\\ude00"'), {})
    assert whole is not None and whole[0].arguments.encode() and ("(" in text or "\U0001f600" in whole[0].arguments)
    for number in ("NaN", "1e999", "[-Infinity]"):
        assert not any("N" in call.arguments or "I" in call.arguments
                       for call in read(text.replace("VALUE", number), {}) or ())  # fmt: skip
    passed_on = Call(0, "id", "f", '{"a": "\\ud83d", "b": [1]}')
    assert arguments_of(passed_on) == {"a": "\ufffd", "b": [1]}
    assert arguments_of(Call(0, "id", "f", '{"a": 1e999}')) is None


def test_what_looks_whole_wherever_it_is_cut_needs_its_mark() -> None:
    """A call with the first of its arguments alone would be another one."""
    text = FORMS["glm"][0]
    for end in range(text.index("weather"), text.index("</tool_call>") + 11):
        assert run(CallFinder((GENERIC,), SCHEMAS), list(text[:end])) == (text[:end], [])


def test_a_message_of_harmony_within_an_argument() -> None:
    city = "<|start|>assistant to=functions.time<|message|>{}"
    text = f'<|start|>assistant to=functions.weather<|channel|>commentary<|message|>{{"city": "{city}"}}'
    assert run(CallFinder((HARMONY,), SCHEMAS), [text]) == ("", [("weather", {"city": city})])


def test_literals_of_python_end_where_they_do() -> None:
    found = read("""[a/b(x='\\')', y=\"\"\"a"b)\"\"\", z={"(": [1, ")"]}), time()]""", {"a/b": {}})
    assert found is not None and [each.name for each in found] == ["a/b", "time"]
    assert json.loads(found[0].arguments) == {"x": "')", "y": 'a"b)', "z": {"(": [1, ")"]}}
    assert [read(text, {}) for text in ("f()()", "f(a=(1)", "f(a=1))", "f(a='", "f(1, a=2)")] == [None] * 5


def test_names_have_no_halves_of_surrogate_pairs() -> None:
    found = read('{"name": "\\ud83d", "arguments": {}}', {})
    assert found is not None and found[0].name == "\ufffd"


def test_values_within_values_of_gemma() -> None:
    for quote in ("<escape>", '<|"|>'):
        text = "call:weather{tags:['a','b,]}'],at:{city:'Paris',zip:'75',on:{x:true}},days:3,none:null,many:[[1,2],[]]}"
        found = read(text.replace("'", quote), SCHEMAS)
        assert found is not None and json.loads(found[0].arguments) == {
            "tags": ["a", "b,]}"], "at": {"city": "Paris", "zip": "75", "on": {"x": True}}, "days": 3, "none": None,
            "many": [[1, 2], []],
        }  # fmt: skip
    for text in ("call:f{a:{b:1}", "call:f{a:1}}", "call:f{a:[1}", "call:f{a 1}", "call:f{" + "a:{" * 2000):
        assert read(text, {}) is None


def test_words_of_json_among_literals_of_python() -> None:
    found = read('[f(a={"x": true, "y": [null, False]}, b=false)]', {})
    assert found is not None and json.loads(found[0].arguments) == {"a": {"x": True, "y": [None, False]}, "b": False}


@pytest.mark.parametrize(
    ("schema", "wanted"),
    [
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "10115"),
        ({"oneOf": [{"type": "string"}]}, "10115"),
        ({"enum": ["1", "10115"]}, "10115"),
        ({"const": "10115"}, "10115"),
        ({"allOf": [{"minLength": 1}, {"type": "string"}]}, "10115"),
        ({"$ref": "#/$defs/Zip"}, "10115"),
        ({"$ref": "#/$defs/Round"}, 10115),
        ({"$ref": "#/nowhere"}, 10115),
        ({"$ref": "https://example.org/x"}, 10115),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, 10115),
        ({"anyOf": [{"type": "string"}, {}]}, 10115),
        ({"type": "number"}, 10115),
        ({"enum": [1, 2]}, 10115),
        ({}, 10115),
        (True, 10115),
    ],
)
def test_a_text_means_what_its_schema_allows(schema: object, wanted: object) -> None:
    whole = {
        "properties": {"zip": schema},
        "$defs": {"Zip": {"type": "string"}, "Round": {"anyOf": [{"$ref": "#/$defs/Round"}, {"type": "string"}]}},
    }
    found = read("<function=f><parameter=zip>10115</parameter></function>", {"f": whole})
    assert found is not None and json.loads(found[0].arguments) == {"zip": wanted}


class Counted(dict):
    """A schema that counts how often it is looked into."""

    looks = 0

    def get(self, key: str, default: object = None) -> object:
        self.looks += 1
        return super().get(key, default)


@pytest.mark.parametrize("word", ["anyOf", "oneOf", "allOf"])
def test_alternatives_that_refer_to_each_other_are_looked_at_once(word: str) -> None:
    """Four took a third of a second for a value, and sixteen hours, in which nobody else got an answer."""
    zips = Counted({word: [{"$ref": "#/properties/zip"}] * 3})
    schema = {"f": {"properties": {"zip": zips, "many": {"items": zips}}}}
    for text in ("<function=f><parameter=zip>1</parameter></function>", "call:f{many:[" + "1," * 500 + "1]}"):
        zips.looks = 0
        assert read(text, schema) is not None and zips.looks < 20


def test_many_alternatives_all_count() -> None:
    zips = {"anyOf": [*({"const": place} for place in range(40)), {"type": "string"}], "not": {"type": "null"}}
    found = read("<function=f><parameter=zip>a</parameter></function>", {"f": {"properties": {"zip": zips}}})
    assert found is not None and json.loads(found[0].arguments) == {"zip": "a"}
    zips = {"anyOf": [*({"const": str(place)} for place in range(40)), {"type": "integer"}]}
    found = read("<function=f><parameter=zip>75</parameter></function>", {"f": {"properties": {"zip": zips}}})
    assert found is not None and json.loads(found[0].arguments) == {"zip": 75}


@pytest.mark.parametrize("name", ["a/b", "ns:f", "a.b-c", "functions", "f:0"])
@pytest.mark.parametrize(
    "text",
    [
        "<|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{}", "NAME[ARGS]{}",
        "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{}<｜tool▁call▁end｜>", "call:NAME{}", "<function=NAME></function>",
        "functions.NAME:0<|tool_call_argument_begin|>{}", "[NAME(a=1)]",
        "NAME<arg_key>a</arg_key><arg_value>1</arg_value>",
    ],
)  # fmt: skip
def test_every_name_that_a_tool_may_have_can_be_called(name: str, text: str) -> None:
    found = read(text.replace("NAME", name), {name: {}})
    assert found is not None and [call.name for call in found] == [name]


def test_white_space_around_calls_does_not_depend_on_how_text_comes() -> None:
    call = FORMS["hermes"][0]
    for text, wanted in (
        (f"{call}\n\n text", "text"), (f"Well.\n{call}\n\n text \n", "Well.\n\n text"), (f"a {call} {call} ", "a"),
        ("a \n<tool_call>x", "a \n<tool_call>x"), ("a <tool_call>x</tool_call> b", "a <tool_call>x</tool_call> b"),
    ):  # fmt: skip
        for size in (1, 2, 5, 11, 1000):
            pieces = [text[start : start + size] for start in range(0, len(text), size)]
            assert run(CallFinder((GENERIC,), SCHEMAS), pieces)[0] == wanted, (text, size)


def test_a_closing_mark_whose_opening_was_forgotten_is_no_text() -> None:
    text = FORMS["qwen3-coder, no mark"][0]
    for end, wanted in (("\n</tool_call>", "Ok."), ("\n</tool_call> And on", "Ok. And on"), ("</tool", "Ok.</tool")):
        for pieces in ([f"Ok. {text}{end}"], list(f"Ok. {text}{end}")):
            assert run(CallFinder(marks_in(f"<tool_call></tool_call>{text}"), SCHEMAS), pieces) == (wanted, ONE)


def test_a_call_that_its_model_ended_needs_no_mark() -> None:
    for text in ("<tool_call>weather<arg_key>city</arg_key><arg_value>Oslo</arg_value>", "<tool_call>weather"):
        finder = CallFinder((GENERIC,), SCHEMAS)
        assert finder.add(text) == ("", [])
        shown, calls = finder.flush(ended=True)
        assert not shown and [call.name for call in calls if isinstance(call, Call)] == ["weather"]
    finder = CallFinder((HARMONY,), SCHEMAS)  # of a function that takes nothing
    finder.add("<|start|>assistant to=functions.time<|channel|>commentary<|message|>")
    (call,) = finder.flush(ended=True)[1]
    assert isinstance(call, Call) and (call.name, call.arguments) == ("time", "{}")


def test_no_arguments_are_none() -> None:
    for written in ("null", '""', "{}"):
        found = read(f'{{"name": "time", "arguments": {written}}}', SCHEMAS)
        assert found is not None and found[0].arguments == "{}"
