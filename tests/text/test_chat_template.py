"""Chat templates: honest ones render as in transformers, hostile ones are refused.

`tests/data/tokenizers/templates.json`: ten templates and what transformers 5.23.0 renders (recipe: make.py beside it).
"""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from places import TESTS

from runner.errors import TemplateError
from runner.text.chat_inputs import chat_inputs
from runner.text.chat_template import ChatTemplates
from runner.text.template_limits import Budget
from runner.text.tokenizer import Tokenizer

DATA = TESTS / "data" / "tokenizers"
RECORDED = json.loads((DATA / "templates.json").read_text(encoding="utf-8"))
USER = {"role": "user", "content": "hi"}
VARIABLES = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
DOUBLING = "{% set ns = namespace(x=START, y=START) %}{% for i in range(60) %}STEP{% endfor %}"
NESTED = DOUBLING.replace("START", "('a',)").replace(
    "STEP", "{% set ns.x = (ns.x, ns.x) %}{% set ns.y = (ns.y, ns.y) %}"
)


def render(source: str, *messages: dict[str, Any], **options: Any) -> str:
    return ChatTemplates({}, VARIABLES).render(source, chat_inputs(messages or [USER], **options))


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: case["name"])
def test_renders_as_transformers_does(case: dict[str, Any]) -> None:
    for chat, text in zip(RECORDED["chats"], case["texts"], strict=True):
        if text is None:
            with pytest.raises(TemplateError):
                render(case["source"], *chat["messages"], **chat["options"])
        else:
            assert render(case["source"], *chat["messages"], **chat["options"]) == text
    assert any(case["texts"])


@pytest.mark.parametrize("name", ["chatml", "instruct", "macros", "spaces", "scopes"])
def test_metered_code_equals_plain_jinja(name: str) -> None:
    """Metered templates render the same text as in the plain sandbox of Jinja."""
    source = next(case["source"] for case in RECORDED["cases"] if case["name"] == name)
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    messages: list[dict[str, Any]] = [USER, {"role": "assistant", "content": " yes "}, USER]
    expected = plain.from_string(source).render(messages=messages, tools=None, **VARIABLES)
    assert render(source, *messages) == expected


def test_inputs_stay_as_they_were() -> None:
    messages = [{"role": "assistant", "content": "x", "thinking": "t", "tool_calls": [{"a": (1, None)}]}]
    before = json.dumps(messages)
    text = render("{{ messages[0].reasoning_content }}{{ messages[0].tool_calls }}", *messages)
    assert text == "t[{'a': (1, None)}]"
    assert json.dumps(messages) == before


def test_dates_come_from_the_clock() -> None:
    assert render("{{ strftime_now('%Y-%m') }}") == datetime.now().strftime("%Y-%m")
    with pytest.raises(TemplateError, match="strftime_now"):
        render("{{ strftime_now('%999999999d') }}")


def test_what_a_template_sees() -> None:
    source = "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ extra }}{{ eos_token }}"
    assert render(source, extra=[1], eos_token="E") == "TrueTrueFalse[1]E"
    assert render("{{ messages[0].name is defined }}", {"role": "user", "name": None}) == "False"


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "at least one"),
        ("text", {}, "at least one"),
        ([7], {}, r"messages\[0\]"),
        ([{"content": b"x"}], {}, "bytes"),
        ([{"content": object()}], {}, "object"),
        ([USER], {"tools": [print]}, "JSON schema"),
        ([USER], {"extra": {1, 2}}, "set"),
        ([USER], {"add_generation_prompt": True, "continue_final_message": True}, "exclude"),
    ],
)
def test_wrong_inputs_are_named(messages: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        chat_inputs(messages, **options)


def test_endless_inputs_are_refused() -> None:
    nested: list[Any] = []
    nested.append(nested)
    with pytest.raises(TemplateError, match="nested"):
        chat_inputs([{"content": nested}])


def test_continuing_the_final_message() -> None:
    chat = [USER, {"role": "assistant", "content": "It is  "}]
    assert (
        render("{% for m in messages %}{{ m.content }}|{% endfor %}", *chat, continue_final_message=True)
        == "hi|It is  "
    )
    trimmed = "{% for m in messages %}{{ m.content | trim }}|{% endfor %}"
    assert render(trimmed, *chat, continue_final_message=True) == "hi|It is"
    parts: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    source = "{% for p in messages[-1].content %}{{ p.text }}{% endfor %}."
    assert render(source, *parts, continue_final_message=True) == "ab"
    for wrong in ("{{ messages[0].content }}", "no field at all"):
        with pytest.raises(TemplateError, match="continue_final_message"):
            render(wrong, *chat, continue_final_message=True)
    with pytest.raises(TemplateError, match="has no 'name'"):
        render("{{ name }}", *chat, continue_final_message="name")


def test_choice_of_template() -> None:
    several = ChatTemplates({"default": "D", "tool_use": "T", "rag": "R"}, {})
    assert several.names == ("default", "tool_use", "rag")
    assert [several.choose(None, None), several.choose(None, []), several.choose("rag", [{}])] == ["D", "T", "R"]
    assert several.choose("{{ text }}", None) == "{{ text }}"
    with pytest.raises(TemplateError, match="default, tool_use, rag"):
        several.choose("gone", None)
    with pytest.raises(TemplateError, match="no default"):
        ChatTemplates({"rag": "R"}, {}).choose(None, None)
    with pytest.raises(TemplateError, match="base model"):
        ChatTemplates({}, {}).choose(None, None)


def test_where_templates_come_from(tmp_path: Path) -> None:
    """Template files win over tokenizer_config.json, as in transformers."""
    directory = tmp_path / "model"
    shutil.copytree(DATA / "chatml", directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))

    def sources(value: Any) -> dict[str, str]:
        path.write_text(json.dumps({**config, "chat_template": value}))
        tokenizer = Tokenizer.from_directory(directory)
        return {n: tokenizer.apply_chat_template([USER], tokenize=False, template=n) for n in tokenizer.chat_templates}

    assert sources(None) == {}
    assert not Tokenizer.from_directory(directory).has_chat_template
    with pytest.raises(TemplateError, match="no chat template"):
        Tokenizer.from_directory(directory).apply_chat_template([USER])
    assert sources("A") == {"default": "A"}
    assert sources([{"name": "default", "template": "A"}, {"name": "b", "template": "B"}]) == {"default": "A", "b": "B"}
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("T{{ bos_token }}")
    assert sources("A") == {"tool_use": "T<|bos|>"}
    (directory / "chat_template.jinja").write_text("F{{ image_token }}")
    assert sources("A") == {"default": "F<|eot|>", "tool_use": "T<|bos|>"}
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.apply_chat_template([USER], tools=[], tokenize=False) == "T<|bos|>"


ENDLESS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(99999) if range(99999) | select('odd') | list %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "deep macros": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "list copies": "{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
}
LARGE = {
    "text times": "{{ 'a' * 10**9 }}",
    "times text": "{% set x = 10**9 * 'a' %}",
    "list times": "{% set x = [0] * 10**9 %}",
    "list times bool": "{% set x = ([0] * 100000) * 100000 %}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "squares": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "center": "{{ 'a' | center(10**9) }}",
    "center method": "{{ 'a'.center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ ('\t' * 100000).expandtabs(tabsize=100000) }}",
    "join": "{{ range(99999) | join('a' * 100000) }}",
    "join method": "{{ ('a' * 100000).join(['b'] * 100000) }}",
    "replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "replace method": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "mapped replace": "{{ ['a' * 100000] | map('replace', 'a', 'b' * 100000) | list }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "percent repeated": "{{ ('%(a)s' * 10000) % {'a': 'b' * 100000} }}",
    "format filter": "{{ '%999999999d' | format(1) }}",
    "mapped format": "{{ ['%999999999d'] | map('format', 1) | list }}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 10**9) }}",
    "format from text": "{{ '{0:{w}}'.format(1, w='999999999') }}",
    "repeated format": "{{ ('{0}' * 10000).format('a' * 100000) }}",
    "format later": "{% set f = '{:>999999999}'.format %}{{ f(1) }}",
    "indent": "{{ ('\n' * 100000) | indent(9000) }}",
    "indent text": "{{ 'a\nb' | indent('a' * 999999) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "round": "{{ 1.5 | round(10**9) }}",
    "tojson indent": "{{ [[1]] | tojson(indent=10**9) }}",
    "tojson separators": "{{ ([1] * 100000) | tojson(separators=('a' * 100000, 'b')) }}",
    "sum": "{{ ([[1] * 100000] * 1000) | sum(start=[]) | length }}",
    "int": "{{ ('f' * 900000) | int(0, 16) }}",
    "escape": "{{ ('<' * 900000) | e }}",
    "literals": "{% macro f() %}{% for i in range(99999) %}"
    + "a" * 5000
    + "{% endfor %}{% endmacro %}{% set x = f() %}",
    "filter block": "{% filter upper %}{% for i in range(99999) %}" + "a" * 5000 + "{% endfor %}{% endfilter %}",
    "output": "{% for i in range(99999) %}" + "a" * 5000 + "{% endfor %}",
    "kept slices": "{% set s = 'a' * 1000000 %}{% set ns = namespace(l=[]) %}{% for i in range(9999) %}"
    "{% set ns.l = ns.l + [s[1:]] %}{% endfor %}",
    **{
        f"doubling by {step}": DOUBLING.replace("START", "'a'").replace("STEP", step)
        for step in (
            "{% set ns.x = ns.x ~ ns.x %}",
            "{% set ns.x = ns.x + ns.x %}",
            "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}",
            "{% set ns.x = [ns.x, ns.x] | join %}",
            "{% set ns.x = ns.x.replace('a', 'aa') %}",
            "{% set ns.x = '%s%s' % (ns.x, ns.x) %}",
            "{% set ns.x = '{0}{0}'.format(ns.x) %}",
        )
    },
    **{
        f"nested by {use}": NESTED + use
        for use in (
            "{{ ns.x }}",
            "{{ ns.x | tojson }}",
            "{{ ns.x ~ '' }}",
            "{{ ns.x == ns.y }}",
            "{{ ns.x in [ns.y] }}",
            "{{ [ns.x] | map('string') | list }}",
            "{{ [ns.x, ns.y] | unique | list }}",
            "{{ [ns.x, ns.y].index(ns.y) }}",
            "{{ [{'a': ns.x}] | selectattr('a', 'equalto', ns.y) | list }}",
            "{% set d = {ns.x: 1} %}",
            "{{ {}[ns.x] }}",
            "{{ '%s' % (ns.x,) }}",
            "{{ '{}'.format(ns.x) }}",
            "{{ raise_exception(ns.x) }}",
            "{% for x in [ns.x, ns.y] %}{{ loop.changed(x) }}{% endfor %}",
        )
    },
}


@pytest.mark.parametrize("name", [*ENDLESS, *LARGE])
def test_expensive_templates_are_refused(name: str) -> None:
    """Without a limit each of these templates takes minutes or gigabytes, which would show in the test's own time."""
    with pytest.raises(
        TemplateError, match=r"more than|too many steps|too much text|wider|width|RecursionError|Range too big"
    ):
        render({**ENDLESS, **LARGE}[name])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ (''|attr('__class__')).mro }}",
        "{{ ''['__class__'].mro }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ strftime_now.__globals__.x }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ '{a.__class__.mro}'.format_map({'a': ''}) }}",
        "{{ ([''] | map(attribute='__class__') | first).mro }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ messages[0].clear() }}",
        "{{ environment.tick() }}",
        "{{ context.parent }}",
        "{{ 'a'.encode() }}",
        "{{ (1).to_bytes(10**9, 'big') }}",
        "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
        "{{ lipsum(n=10**9) }}",
        "{{ 'a' | urlize }}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
        "{{ range(3)() }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "not " * 5000 + "1 }}",
        "{{ 1" + " + 1" * 5000 + " }}",
        "{{ a" + ".b" * 5000 + " }}",
        "{{ " + "9" * 10000 + " }}",
        "{% if 1 %}" * 200 + "{% endif %}" * 200,
        "x" * 600_000,
        "{% for %}",
        "{{ messages[0].content.gone.away }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
    ],
    ids=lambda source: source[:40],
)
def test_unsafe_and_broken_templates_are_refused(source: str) -> None:
    with pytest.raises(TemplateError):
        render(source)


def test_refusals_carry_the_template_s_words() -> None:
    with pytest.raises(TemplateError, match="refuses these messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TemplateError, match="line 2"):
        render("ok\n{% for %}")


def test_long_chats_are_not_refused() -> None:
    """Limits grow with the inputs: a thousand messages, and one message of two million characters, are rendered."""
    source = next(case["source"] for case in RECORDED["cases"] if case["name"] == "tools")
    many: list[dict[str, Any]] = [USER, {"role": "assistant", "content": "yes"}] * 500
    assert render(source, *many).count("<|im_end|>") == 1000
    long = {"role": "user", "content": "word " * 400_000}
    assert len(render(source, long)) > 2_000_000


def test_budget_by_hand() -> None:
    budget = Budget(0)
    limit = budget.text_limit
    budget.check(limit)
    with pytest.raises(TemplateError, match=str(limit)):
        budget.check(limit + 1)
    assert budget.walk(["a" * (limit - 10), 1]) and budget.walk("a" * (limit + 1))
    with pytest.raises(TemplateError):
        budget.walk(["a" * limit])
    with pytest.raises(TemplateError):
        budget.walk([[[1] * 1000] * 10], indent=limit // 1000)
    with pytest.raises(TemplateError, match="too much text in all"):
        for _ in range(100):
            budget.charge("a" * limit)
    assert Budget(1000).text_limit > limit
