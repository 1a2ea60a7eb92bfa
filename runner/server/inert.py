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
    "reasoning_details": Inert("another service's record of reasoning; its text is in the fields beside it"),
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
    "cache_control": MESSAGE["cache_control"],
}
"""Of a function."""

_CACHING = MESSAGE["cache_control"]
_HOSTED = Inert("a setting of a service that does not exist here")

ANTHROPIC: Table = {
    "metadata": _LABEL,
    "cache_control": _CACHING,
    "service_tier": Inert("there is one tier"),
    "context_management": Inert("no turn is ever taken out of a conversation"),
    "container": Inert("unset", (None,)),
    "mcp_servers": Inert("none are named", ([], None)),
    "inference_geo": _HOSTED,
    "betas": Inert("names of features; each is refused or obeyed by its own fields"),
    "speed": Inert("there is one speed", ("standard", None)),
    "diagnostics": _HOSTED,
}
"""Of Anthropic's messages."""

ANTHROPIC_BLOCK: Table = {
    "cache_control": _CACHING,
    "citations": Inert("notes on an earlier answer that no template reads"),
    "caller": Inert("says that a call came from the model itself"),
}
"""Of a block of content."""

ANTHROPIC_MESSAGE: Table = {
    "cache_control": _CACHING,
    "output_config": Inert("the request's own counts"),
    "id": _LABEL,
    "type": Inert("a message", ("message",)),
}
"""Of a message."""

ANTHROPIC_TOOL: Table = {
    "type": Inert("a function of the client's", ("custom", None)),
    "cache_control": _CACHING,
    "defer_loading": TOOL["defer_loading"],
    "eager_input_streaming": TOOL["eager_input_streaming"],
    "allowed_callers": Inert("only the model calls"),
    "input_examples": Inert("templates have no place for examples of arguments"),
}
"""Of a tool."""

ANTHROPIC_THINKING: Table = {
    "budget_tokens": Inert("templates know reasoning on, off or by effort, and no number of tokens"),
}
"""Of Anthropic's `thinking`."""

ANTHROPIC_HOSTED = (
    "web_search_", "web_fetch_", "code_execution_", "bash_", "text_editor_", "computer_", "memory_",
    "tool_search_tool_", "mcp_toolset",
)  # fmt: skip
"""How types of tools begin that Anthropic's own service runs: the model is not told of them."""

SCHEMA: Table = {
    "name": _LABEL,
    "description": Inert("tells the model nothing: the schema is enforced"),
    "strict": Inert("a schema is always enforced"),
}
"""Of a schema in response_format."""

STRUCTURED: Table = {
    "disable_any_whitespace": Inert("JSON never has white space between its parts"),
    "disable_fallback": Inert("what cannot be enforced is refused", (True, None)),
    "disable_additional_properties": Inert("the schema decides", (False, None)),
    "whitespace_pattern": Inert("unset", (None,)),
}
"""Of vLLM's structured_outputs."""

OLLAMA: Table = {
    "truncate": Inert("nothing is ever cut off a prompt"),
    "shift": Inert("an answer ends where the context is full", (False, None)),
    "images": Inert("none are sent", ([], None)),
    "context": Inert("no earlier turn is meant", ([], None)),
    "template": Inert("the model's own is used", ("", None)),
    "logprobs": Inert("none are asked for", (False, None)),
    "top_logprobs": Inert("none are asked for", (0, None)),
    "verbose": Inert("all that is known is shown"),
    "name": Inert("the older name of model, unset", ("", None)),
}
"""Of Ollama's requests."""

OLLAMA_PULL: Table = {
    "insecure": Inert("models are fetched from the hub alone, by the way that its client is set to", (False, None)),
}
"""Of Ollama's /api/pull."""

OLLAMA_MESSAGE: Table = {
    "images": OLLAMA["images"],
    "tool_calls": Inert("none were made", ([], None)),
}
"""Of a message."""

_HARDWARE = Inert("how the model is run was decided at the start")
OLLAMA_OPTIONS: Table = {
    **dict.fromkeys(
        ("num_gpu", "main_gpu", "num_batch", "num_thread", "numa", "low_vram", "use_mmap", "use_mlock", "vocab_only",
         "f16_kv", "logits_all"), _HARDWARE),
    "num_keep": OLLAMA["truncate"],
    "penalize_newline": Inert("line breaks are tokens like others", (True, None)),
    "typical_p": Inert("off", (1.0, 1, None)),
    "tfs_z": Inert("off", (1.0, 1, None)),
    "mirostat": Inert("off", (0, None)),
    "mirostat_eta": Inert("of no effect where mirostat is off"),
    "mirostat_tau": Inert("of no effect where mirostat is off"),
}  # fmt: skip
"""Of the options."""

RESPONSES: Table = {
    "user": _USER,
    "safety_identifier": _USER,
    "metadata": _LABEL,
    "client_metadata": _LABEL,
    "store": Inert("nothing is ever stored", (False, None)),
    "previous_response_id": Inert("unset", (None,)),
    "conversation": Inert("unset", (None,)),
    "prompt": Inert("unset", (None,)),
    "background": Inert("answers come to who asks", (False, None)),
    "truncation": Inert("nothing is ever cut off a prompt", ("disabled", None)),
    "service_tier": OPENAI["service_tier"],
    "prompt_cache_key": OPENAI["prompt_cache_key"],
    "prompt_cache_retention": OPENAI["prompt_cache_retention"],
    "include": Inert("reasoning comes in full, and nothing else that can be included is made here"),
    "top_logprobs": Inert("none are asked for", (0, None)),
    "max_tool_calls": Inert("tools of a service are counted, and there are none", (None,)),
    "stream_options": Inert("padding against readers of traffic; this server speaks to its own machine"),
}
"""Of OpenAI's responses."""

ITEM: Table = {
    "id": _LABEL,
    "status": Inert("an item that comes back is complete"),
    "phase": Inert("no template tells parts of an answer apart"),
    "encrypted_content": Inert("reasoning comes and goes in full", (None, "")),
    "namespace": Inert("functions are called by their names"),
    "created_by": _LABEL,
    "internal_chat_message_metadata_passthrough": _LABEL,
}
"""Of an item of a response's input."""

RESPONSE_PART: Table = {
    "annotations": MESSAGE["annotations"],
    "logprobs": Inert("notes on an earlier answer that no template reads"),
    "cache_control": _CACHING,
}
"""Of a part of an item."""

REASONING: Table = {
    "summary": Inert("reasoning comes in full", ("auto", "concise", "detailed", None)),
    "generate_summary": Inert("reasoning comes in full"),
    "encrypted_content": Inert("reasoning comes in full"),
}
"""Of `reasoning`."""

TEXT: Table = {"verbosity": Inert("a wish that no template knows")}
"""Of `text`."""

RESPONSE_TOOL: Table = {
    "defer_loading": TOOL["defer_loading"],
    "output_schema": Inert("tells the model nothing"),
    "allowed_callers": ANTHROPIC_TOOL["allowed_callers"],
}
"""Of a function."""

RESPONSES_HOSTED = (
    "web_search", "file_search", "code_interpreter", "image_generation", "computer", "mcp", "local_shell", "shell",
    "apply_patch", "tool_search", "custom",
)  # fmt: skip
"""How types of tools begin that OpenAI's own service runs, or that take no JSON: the model is not told of them."""

RESPONSES_DROPPED = ("web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call",
                     "mcp_list_tools", "compaction")  # fmt: skip
"""Types of items that record what a service did; they are left out of the prompt."""
