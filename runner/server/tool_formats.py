"""How models write calls of functions: the marks around them, by the template, and how the text between is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.server.call_values import Gemma, Kinds, dumped, property_of, python_arguments, python_end, typed
from runner.text.harmony import AUTHOR, MESSAGE, START

MAX_CALL = 1 << 20
"""Characters of one call."""


@dataclass(frozen=True)
class Called:
    """A call: a function's name and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Marks:
    """The texts around a call, or around several; a call without a closing one ends with the answer.

    Attributes:
        kept: whether the opening text is the start of the call itself.
        trailing: a text that may follow, whose own opening a model has forgotten: it is no text for the reader.
    """

    opening: str
    closing: str = ""
    kept: bool = False
    trailing: str = ""


TABLE = (
    Marks("<tool_call>", "</tool_call>"),  # Hermes, Qwen, GLM, SmolLM3, Granite 4
    Marks("<function=", "</function>", kept=True, trailing="</tool_call>"),  # Qwen3-Coder, where it forgets a mark
    Marks("[TOOL_CALLS]"),  # Mistral
    Marks("<|python_tag|>"),  # Llama 3
    Marks("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),  # DeepSeek
    Marks("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),  # Kimi K2
    Marks("<minimax:tool_call>", "</minimax:tool_call>"),  # MiniMax M2
    Marks("<seed:tool_call>", "</seed:tool_call>"),  # Seed-OSS
    Marks("<|START_ACTION|>", "<|END_ACTION|>"),  # Command R7B and A
    Marks("<|tool_call_start|>", "<|tool_call_end|>"),  # LFM2
    Marks("<start_function_call>", "<end_function_call>"),  # FunctionGemma
    Marks("<|tool_call>", "<tool_call|>"),  # Gemma 4
    Marks("<|tool_call|>", "<|/tool_call|>"),  # Phi 4 mini
    Marks("<|tool_call|>"),  # Granite 3
    Marks("<TOOLCALL>", "</TOOLCALL>"),  # Nemotron
)
"""Marks of published templates; those that a template names are looked for in its answers."""

GENERIC = Marks("<tool_call>", "</tool_call>")
"""Of the form that models are told whose templates know no tools."""

HARMONY = Marks(START, kept=True)
"""gpt-oss's messages to a function, as `HarmonySeparator` passes them on."""


INNER = (
    "[ARGS]", "[CALL_ID]", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<|tool_call_begin|>",
    "<|tool_call_end|>", "<|tool_call_argument_begin|>", "<escape>", '<|"|>',
)  # fmt: skip
"""Marks within calls, which may be special tokens too."""


def marks_in(source: str) -> tuple[Marks, ...]:
    """The marks that a template names."""
    found = [marks for marks in TABLE if marks.opening in source and marks.closing in source]
    # Of two with one opening text the one that has a closing text too.
    first: dict[str, Marks] = {}
    for marks in found:
        first.setdefault(marks.opening, marks)
    return tuple(first.values())


def bare_json(source: str) -> bool:
    """Whether a template asks for calls as nothing but JSON, as Llama 3's do."""
    return re.search(r'\{\\?"name\\?": function name', source) is not None


class Begun(ValueError):
    """A text that begins as a call does is none, or not yet.

    Attributes:
        place: how far it was read.
        within: whether that is within an argument.
    """

    def __init__(self, place: int, *, within: bool = False) -> None:
        super().__init__("no call")
        self.place = place
        self.within = within


@dataclass(frozen=True)
class Reading:
    """What a text says of calls.

    Attributes:
        calls: those at its start that are whole.
        end: where the last of them ends.
        begun: whether another begins there, so that what follows may be an argument's.
        over: whether nothing but brackets follows where that one can't be read on: no argument is open.
    """

    calls: Sequence[Called] = ()
    end: int = 0
    begun: bool = False
    over: bool = False


def read_calls(text: str, schemas: Mapping[str, Any], *, cut: bool = False) -> Reading:
    """The calls that the text between two marks spells, in whichever of the known forms.

    Each form is read from left to right, in a time that grows with the text's length: a model writes what it likes, and
    others wait meanwhile.

    Args:
        schemas: JSON schemas of the arguments by the functions' names: forms without types of their own are read by
            them.
        cut: whether nothing says that the text's end is a call's: forms do not count that look whole wherever they are
            cut.
    """
    if len(text) > MAX_CALL:
        return Reading(begun=True)
    prose = Reading()
    for form in (_json_call, _harmony, _colons, _named_json, _tagged, _keyed, _pythonic):
        found = _read(form, text, schemas, cut)
        if found.begun or found.end == len(text):
            return found
        prose = found if found.calls else prose
    return prose


_Form = Callable[[str, int, Mapping[str, Any], bool], tuple[Called, int]]
"""Reads the call at a place; returns it, and where it ends.

Raises Begun, or another ValueError where nothing there begins as a call of this form does.
"""


def _read(form: _Form, text: str, schemas: Mapping[str, Any], cut: bool) -> Reading:
    calls: list[Called] = []
    place = end = _behind(text, 0)
    try:
        while place < len(text):
            call, place = form(text, place, schemas, cut)
            calls.append(call)
            place = end = _behind(text, place)
    except Begun as error:
        return Reading(calls, end, True, not error.within and not text[error.place :].strip(" \t\r\n)]},;"))
    except ValueError:
        pass
    return Reading(calls, end if calls else 0)


def _json(text: str, place: int) -> tuple[Any, int]:
    """The JSON value at a place, and where it ends."""
    try:
        return json.JSONDecoder().raw_decode(text, place)
    except json.JSONDecodeError as error:
        raise Begun(error.pos) from error
    except (ValueError, RecursionError) as error:
        raise Begun(place, within=True) from error


def _call(name: str, arguments: Any, end: int) -> Called:
    try:
        # Halves of surrogate pairs are replaced in both.
        return Called(name if name.isascii() else json.loads(dumped(name)), dumped(arguments))
    except (ValueError, TypeError, RecursionError) as error:  # numbers that JSON does not have, say
        raise Begun(end) from error


_OPEN, _CLOSE, _OBJECT = re.compile(r"[\s\[]*"), re.compile(r"[\s,;\]]*"), re.compile(r'\{\s*["}]')


def _json_call(text: str, place: int, _schemas: Mapping[str, Any], _cut: bool) -> tuple[Called, int]:
    """{"name": "f", "arguments": {...}}, or a list of such; several may follow each other."""
    place = _ended(_OPEN, text, place)
    if not _OBJECT.match(text, place):
        raise ValueError("no object")
    value, end = _json(text, place)
    try:
        name, arguments = _from_object(value)
    except (ValueError, RecursionError) as error:
        raise Begun(end) from error
    return _call(name, arguments, end), _ended(_CLOSE, text, end)


def _from_object(value: Any) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a call; ValueError where it is none."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        raise ValueError("no object")
    name = next((value[key] for key in ("name", "tool_name", "function") if isinstance(value.get(key), str)), None)
    arguments: Any = next((value[key] for key in ("arguments", "parameters") if key in value), {})
    if isinstance(arguments, str) and arguments:
        arguments = json.loads(arguments)
    if arguments is None or arguments == "":  # of a function that takes none
        arguments = {}
    if not name or not isinstance(arguments, dict):
        raise ValueError("no call")
    return name, arguments


_NAME = r"[\w.:/-]+"
"""What the name of a function may be: `plain_tool` refuses others."""

_RECIPIENT = re.compile(rf"\bto=({_NAME})")


def _harmony(text: str, place: int, schemas: Mapping[str, Any], cut: bool) -> tuple[Called, int]:
    """<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}, one or several."""
    if not text.startswith(START + AUTHOR, place):
        raise ValueError("no message of the model's")
    header, place = _until(text, place, MESSAGE)
    found = _RECIPIENT.search(header)
    if found is None:
        raise Begun(place, within=True)
    place = _behind(text, place)
    value: Any = {}
    if cut or not (place == len(text) or text.startswith(START, place)):  # else: of a function that takes none
        value, place = _json(text, place)
    if not isinstance(value, dict):
        raise Begun(place)
    return _call(_offered(found[1], schemas), value, place), place


def _offered(written: str, schemas: Mapping[str, Any]) -> str:
    """The name of a function, without what some families write around it."""
    if written in schemas:
        return written
    name = written.removeprefix("functions.")
    return name if name in schemas else re.sub(r":\d+$", "", name)


_BEFORE_NAME = ("[TOOL_CALLS]", "<｜tool▁call▁begin｜>", "<|tool_call_begin|>", "function<｜tool▁sep｜>")
_BEFORE_VALUE = ("[ARGS]", "<｜tool▁sep｜>", "<|tool_call_argument_begin|>")
_BEHIND = ("```", "<｜tool▁call▁end｜>", "<|tool_call_end|>")
_ANY_NAME, _ID, _SPACE = re.compile(_NAME), re.compile(r"\[CALL_ID\]\w+"), re.compile(r"\s*")


def _named_json(text: str, place: int, schemas: Mapping[str, Any], _cut: bool) -> tuple[Called, int]:
    """A name and the JSON of its arguments, a family's marks between: Mistral, DeepSeek, Kimi; several in a row."""
    place = _behind(text, place, _BEFORE_NAME)
    name = _ANY_NAME.match(text, place)
    if name is None:
        raise ValueError("no name")
    place = _behind(text, name.end())
    if call_id := _ID.match(text, place):
        place = _behind(text, call_id.end())
    place = _behind(text, place, _BEFORE_VALUE)
    if text.startswith("```json", place):
        place = _behind(text, place + len("```json"))
    if not text.startswith("{", place):
        raise ValueError("no object")
    value, place = _json(text, place)
    return _call(_offered(name[0], schemas), value, place), _behind(text, place, _BEHIND)


def _ended(pattern: re.Pattern[str], text: str, place: int) -> int:
    """Where what a pattern finds at a place ends."""
    found = pattern.match(text, place)
    return found.end() if found else place


def _behind(text: str, place: int, marks: tuple[str, ...] = ()) -> int:
    """The place behind white space, and behind those of the marks that stand there, each once, in their order."""
    place = _ended(_SPACE, text, place)
    for mark in marks:
        if text.startswith(mark, place):
            return _behind(text, place + len(mark), marks[marks.index(mark) + 1 :])
    return place


_FUNCTION = re.compile(r"""<function=(?P<a>[^>\s]{1,256})>|<invoke\s{1,8}name="(?P<b>[^"]{1,256})">""")
_PARAMETER = re.compile(r"""<parameter(?:=|\s{1,8}name=")([^>"]{1,256})"?>""")


def _tagged(text: str, place: int, schemas: Mapping[str, Any], _cut: bool) -> tuple[Called, int]:
    """<function=f><parameter=a>1</parameter></function> of Qwen3-Coder, <invoke name="f"> of MiniMax."""
    found = _FUNCTION.match(text, place)
    if found is None:
        raise ValueError("no function")
    closing = "</function>" if found["a"] else "</invoke>"
    given: dict[str, str] = {}
    place = _behind(text, found.end())
    while not text.startswith(closing, place):
        one = _PARAMETER.match(text, place)
        if one is None:
            raise Begun(place, within=True)
        value, place = _until(text, one.end(), "</parameter>")
        given[one[1].strip()] = value.removeprefix("\n").removesuffix("\n")
        place = _behind(text, place)
    place += len(closing)
    return _typed((found["a"] or found["b"]).strip(), given, schemas, place), place


def _until(text: str, start: int, closing: str) -> tuple[str, int]:
    """The text before a mark, and the place behind it."""
    end = text.find(closing, start)
    if end < 0:
        raise Begun(start, within=True)
    return text[start:end], end + len(closing)


def _keyed(text: str, place: int, schemas: Mapping[str, Any], cut: bool) -> tuple[Called, int]:
    """f<arg_key>a</arg_key><arg_value>1</arg_value> of GLM; only what closes it says that no more pairs come."""
    found = _ANY_NAME.match(text, place)
    if found is None:
        raise ValueError("no name")
    name, place = found[0], _behind(text, found.end())
    given: dict[str, str] = {}
    if not text.startswith("<arg_key>", place) and not (name == text.strip() and name in schemas):
        raise ValueError("a word that is no function's name")
    while text.startswith("<arg_key>", place):
        key, place = _until(text, place + len("<arg_key>"), "</arg_key>")
        place = _behind(text, place)
        if not text.startswith("<arg_value>", place):
            raise Begun(place, within=True)
        given[key.strip()], place = _until(text, place + len("<arg_value>"), "</arg_value>")
        place = _behind(text, place)
    if cut:
        raise Begun(place, within=True)
    return _typed(name, given, schemas, place), place


_COLON = re.compile(rf"call:({_NAME}?)\s{{0,8}}(?=\{{)")


def _colons(text: str, place: int, schemas: Mapping[str, Any], _cut: bool) -> tuple[Called, int]:
    """call:f{a:<escape>text<escape>,b:1} of Gemma; `<|"|>` quotes in Gemma 4."""
    found = _COLON.match(text, place)
    if found is None:
        raise ValueError("no call")
    try:
        arguments = Gemma(text[found.end() :], schemas.get(found[1])).read()
    except (ValueError, RecursionError) as error:
        raise Begun(found.end(), within=True) from error
    return _call(found[1], arguments, len(text)), len(text)


_PYTHONIC = re.compile(rf"({_NAME})\s{{0,8}}(?=\(\s{{0,64}}(?:\)|\w+\s{{0,8}}=(?!=)))")


def _pythonic(text: str, place: int, schemas: Mapping[str, Any], _cut: bool) -> tuple[Called, int]:
    """[f(a="x", b=1)] of LFM2 and Llama 3.2; nothing is run, only literals are read, JSON's words among them."""
    found = _PYTHONIC.match(text, _ended(_OPEN, text, place))
    if found is None:
        raise ValueError("no call")
    end = python_end(text, found.end())
    if end is None:
        raise Begun(found.end(), within=True)
    try:
        given = python_arguments(text[found.end() : end])
    except ValueError as error:
        raise Begun(end, within=True) from error
    return _call(_offered(found[1], schemas), given, end), _ended(_CLOSE, text, end)


def _typed(name: str, given: Mapping[str, str], schemas: Mapping[str, Any], end: int) -> Called:
    """A call whose values are texts: brought to the types of its schema."""
    known = Kinds(schemas.get(name))
    return _call(name, {key: typed(text, property_of(known.root, key), known) for key, text in given.items()}, end)
