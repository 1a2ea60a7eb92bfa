"""What stands beside calls: others that are cut or unreadable, texts that mention a mark, calls that are quoted."""

from __future__ import annotations

from typing import Any

import pytest
from found_calls import run

from runner.server import tool_calls
from runner.server.tool_calls import SPECIAL, CallFinder
from runner.server.tool_formats import GENERIC, HARMONY, TABLE, Reading, read_calls

SCHEMAS = {"time": {}, "weather": {"type": "object", "properties": {"city": {"type": "string"}}}}
WHOLE_AND_CUT = {
    "hermes": ('<tool_call>{"name": "time"} ', '{"name": "time", "arguments": {"a": "b'),
    "mistral": ('[TOOL_CALLS] [{"name": "time", "arguments": {}}, ', '{"name": "time", "argu'),
    "mistral 3": ("[TOOL_CALLS]time[ARGS]{}", '[TOOL_CALLS]time[ARGS]{"a": "b'),
    "llama 3.2": ("<|python_tag|>[time(), ", 'time(a="b'),
    "deepseek 3.1": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>time<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
        '<｜tool▁call▁begin｜>time<｜tool▁sep｜>{"a": "b',
    ),
    "kimi": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.time:0<|tool_call_argument_begin|>{}<|tool_call_end|>",
        '<|tool_call_begin|>functions.time:1<|tool_call_argument_begin|>{"a',
    ),
    "minimax": ('<minimax:tool_call><invoke name="time"></invoke>', '<invoke name="time"><parameter name="a">b'),
    "gpt-oss": (
        "<|start|>assistant to=functions.time<|channel|>commentary<|message|>{}\n\n",
        '<|start|>assistant to=functions.time<|channel|>commentary<|message|>{"a": "b',
    ),
}


@pytest.mark.parametrize("form", WHOLE_AND_CUT)
def test_whole_calls_before_one_that_is_cut_are_made(form: str) -> None:
    """And what has come of the other one is not lost."""
    whole, cut = WHOLE_AND_CUT[form]
    marks = (HARMONY,) if form == "gpt-oss" else tuple(each for each in TABLE if whole.startswith(each.opening))
    for pieces in ([whole + cut], list(whole + cut)):
        assert run(CallFinder(marks, SCHEMAS), pieces) == (cut, [("time", {})])


GOOD = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    "text",
    [
        "I answer with a <tool_call> block:\n", "`<tool_call>` and </tool_call> are marks. ", "<tool_call>" * 9,
        '<tool_call>{"name": "time", "arguments": {"a": 1}}}</tool_call>\n', '<tool_call>{"name": 1}</tool_call>',
        '<tool_call>{"name": "time", "arguments": [1]}</tool_call>', "<tool_call></tool_call>",
        '<tool_call>{"name": "time", "arguments": {"a": NaN}}</tool_call>', "<tool_call>{an object}</tool_call>",
        '<tool_call>{"name": "time", "arguments": {</tool_call>',
    ],
)  # fmt: skip
@pytest.mark.parametrize("closed", [True, False])
def test_a_call_behind_what_is_none_is_made(text: str, closed: bool) -> None:
    whole = text + (GOOD if closed else GOOD.removesuffix("</tool_call>"))
    for special in ((), ("<tool_call>", "</tool_call>")):
        made = whole
        for mark in special:
            made = made.replace(mark, SPECIAL + mark + SPECIAL)
        for pieces in ([made], list(made)):
            shown, calls = run(CallFinder((GENERIC,), SCHEMAS, special=special), pieces)
            assert (shown.rstrip(), calls) == (text.rstrip(), [("time", {})])


@pytest.mark.parametrize(
    "call",
    [
        '{"name": "write", "arguments": {"text": "GOOD"', '{"name": "write", "arguments": {"text": "a\nGOOD"}}',
        '{"name": "write", "arguments": {"text": "he says "hi" GOOD and GOOD"}}', "f(text='GOOD', 1)", "f(text='GOOD",
        '{"name": "write", "arguments": {"text": "\\x GOOD"}}', "write<arg_key>text</arg_key><arg_value>GOOD",
        "<function=write><parameter=text>GOOD", "<function=write><parameter=text>GOOD</function>",
        "<function=write>GOOD</function>", "<function=write><parameter=text></tool_call>GOOD",
        "call:write{text:<escape>GOOD", "call:write{text:GOOD}", 'write[ARGS]{"text": "GOOD',
    ],
)  # fmt: skip
@pytest.mark.parametrize("end", ["", "</tool_call>", "</tool_call> and on"])
def test_a_call_that_an_argument_quotes_is_never_made(call: str, end: str) -> None:
    """Whether the length has cut the call around it, or it is written wrongly."""
    for count in (1, 3, 100):
        text = f"<tool_call>{call}{end}".replace("GOOD", "<tool_call>time</tool_call>" * count)
        for pieces in ([text], list(text)):
            assert run(CallFinder((GENERIC,), SCHEMAS), pieces) == (text, [])


@pytest.mark.parametrize("mark", ["<tool_call>", "<tool_call>a ", "<tool_call></tool_call>", "<tool_call>time("])
def test_what_is_read_again_is_bounded(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By counting the characters that are read."""
    count = 0

    def counted(text: str, *arguments: Any, **options: Any) -> Reading:
        nonlocal count
        count += len(text)
        return read_calls(text, *arguments, **options)

    monkeypatch.setattr(tool_calls, "read_calls", counted)
    text = mark * 5000
    for end in ("", "</tool_call>", "</tool_call>" * 5000):
        count = 0
        assert run(CallFinder((GENERIC,), SCHEMAS), [text + end]) == (text + end, [])
        assert count < 140 * len(text + end)
