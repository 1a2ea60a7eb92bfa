"""The variable that tells a template that the model is to answer without reasoning."""

from __future__ import annotations

from typing import Any

import pytest

from runner.text.chat_inputs import chat_inputs
from runner.text.chat_template import ChatTemplates
from runner.text.thinking_switch import thinking_off

ASK = [{"role": "user", "content": "hi"}]
CLOSED = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("{% if enable_thinking is defined and not enable_thinking %}" + CLOSED + "{% endif %}", "enable_thinking"),
        ("{% set enable_thinking = enable_thinking | default(true) %}{{ enable_thinking }}", "enable_thinking"),
        ("{{ '</think>' if not thinking else '<think>' }}", "thinking"),
        ("{% if thinking_budget == 0 %}no thinking{% endif %}", "thinking_budget"),
        (
            "{% if reasoning_effort not in ['none', 'high'] %}{{ raise_exception('no') }}{% endif %}"
            "{{ reasoning_effort }}",
            "reasoning_effort",
        ),
        ("Reasoning: {{ reasoning_effort }}", None),  # gpt-oss knows low, medium and high
        ("{% if tool_choice == 'none' %}no tools{% endif %}Reasoning: {{ reasoning_effort }}", None),
        ("{% if enable_thinking %}{% endif %}", None),  # read, but of no effect
        ("{# enable_thinking #}{{ messages[0].thinking }}", None),  # no variable
        ("{% if enable_thinking %}{{ raise_exception('no') }}{% endif %}", None),  # cannot be on, so not off either
        ("{{ '<think>' }}", None),
    ],
)
def test_a_switch_is_a_variable_that_makes_a_difference(source: str, wanted: str | None) -> None:
    templates = ChatTemplates({}, {})

    def render(given: Any) -> str:
        return templates.render(source, chat_inputs(ASK, add_generation_prompt=True, **given))

    found = thinking_off(source, templates.reads(source), render)
    assert (found and list(found)) == ([wanted] if wanted else None)
    if found is not None:
        assert render(found) != render({str(wanted): "high" if wanted == "reasoning_effort" else True})


def test_what_a_template_reads() -> None:
    source = (
        "{% set own = 1 %}{% for m in messages %}{{ m.a }}{{ own }}{{ loop.index }}{% endfor %}{{ given }}{{ tools }}"
    )
    assert ChatTemplates({}, {}).reads(source) == {"messages", "given", "tools"}
