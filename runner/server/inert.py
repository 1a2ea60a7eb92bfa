"""Fields of requests that real clients send and that change nothing here, as data: which, where, and why.

A field in these tables is left out and named in the header `x-runner-ignored`; one that is in no table and no schema is
refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Inert:
    """Why a field changes nothing, and the values for which that is so; () are all."""

    reason: str
    values: tuple[Any, ...] = ()

    def allows(self, value: Any) -> bool:
        """Whether the field may have this value."""
        return not self.values or any(type(value) is type(each) and value == each for each in self.values)


Table = Mapping[str, Inert]

_LABEL = Inert("a label for the sender's own records; nothing is recorded here")
_USER = Inert("names the sender's user; all users are served alike")

OPENAI: Table = {
    "user": _USER,
    "safety_identifier": _USER,
    "metadata": _LABEL,
    "store": Inert("nothing is ever stored", (False, None)),
    "prompt_cache_key": Inert("prompts share what they have in common without it"),
    "prompt_cache_retention": Inert("what is kept of a prompt is kept as long as there is room"),
    "service_tier": Inert("there is one tier", ("auto", "default", None)),
    "modalities": Inert("models here write text", (["text"], None)),
    "prediction": Inert("a hint for speed that changes no token", (None,)),
    "verbosity": Inert("the usual one is the only one", ("medium", None)),
    "audio": Inert("models here write text", (None,)),
    "web_search_options": Inert("there is no web search here", (None,)),
    "function_call": Inert("the old spelling of tool_choice, unset", (None,)),
    "functions": Inert("the old spelling of tools, unset", (None,)),
    "timeout": Inert("a setting of the client's"),
}
"""Of OpenAI's chat."""

COMPLETIONS: Table = {
    "user": _USER,
    "metadata": _LABEL,
    "best_of": Inert("one answer is made for each that is asked for", (1, None)),
    "suffix": Inert("no text stands behind", (None, "")),
    "prompt_cache_key": OPENAI["prompt_cache_key"],
}
"""Of OpenAI's completions."""

MESSAGE: Table = {
    "refusal": Inert("unset", (None,)),
    "annotations": Inert("notes on an earlier answer that no template reads"),
    "audio": Inert("unset", (None,)),
    "function_call": Inert("the old spelling of tool_calls, unset", (None,)),
    "cache_control": Inert("prompts share what they have in common without it"),
    "id": _LABEL,
    "provider_specific_fields": Inert("what a client's own proxy wrote down"),
}
"""Of a message in OpenAI's chat."""

PART: Table = {"cache_control": MESSAGE["cache_control"]}
"""Of a part of a message's content."""

TOOL: Table = {
    "cache_control": MESSAGE["cache_control"],
    "defer_loading": Inert("every tool is told to the model at once"),
    "eager_input_streaming": Inert("arguments are streamed as they are made"),
    "type": Inert("a function", ("function", "custom", None)),
}
"""Of a tool."""

STREAM_OPTIONS: Table = {
    "include_obfuscation": Inert("padding against readers of traffic; this server speaks to its own machine"),
}
"""Of OpenAI's stream_options."""

CALL: Table = {
    "index": Inert("the place in the list says it"),
    "cache_control": MESSAGE["cache_control"],
}
"""Of an assistant's call of a function."""

FUNCTION: Table = {
    "strict": Inert("arguments are not bound to a schema unless that is asked for", (False, None)),
    "cache_control": MESSAGE["cache_control"],
}
"""Of a function."""
