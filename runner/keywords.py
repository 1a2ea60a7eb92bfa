"""The keywords of an answer: their types, which checkers and editors read, and their check when a program runs."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from runner.constraints import Constraint
from runner.engine.draft import Drafter
from runner.engine.prompt_cache import PromptCache
from runner.engine.sampling import SamplingOptions
from runner.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")


class StreamOptions(SamplingOptions, total=False):
    """The keywords of `LanguageModel.stream`, which describes them."""

    max_tokens: int | None
    stop: str | Sequence[str] | None
    prompt_cache: PromptCache | None
    on_prefill: Callable[[int, int], None] | None
    cancelled: Callable[[], bool] | None
    constraint: Constraint | None
    lookup: bool | None
    draft: Drafter | None


class ChatOptions(StreamOptions, total=False):
    """The keywords of `LanguageModel.chat_stream`, which describes them."""

    tools: Sequence[Mapping[str, Any]] | None
    template: str | None
    template_kwargs: Mapping[str, Any] | None


def _is_texts(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, Sequence) and not isinstance(value, bytes | bytearray))


KINDS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "stop": (_is_texts, "a text or a list of texts"),
    "prompt_cache": (lambda value: isinstance(value, PromptCache), "what lm.prompt_cache() makes"),
    "on_prefill": (callable, "a function of two integers"),
    "cancelled": (callable, "a function without arguments"),
    "constraint": (
        lambda value: isinstance(value, Constraint),
        "one of runner's JsonSchema, JsonObject, Regex, Lark and Choice",
    ),
    "lookup": (lambda value: isinstance(value, bool), "true or false"),
    "template": (lambda value: isinstance(value, str), "a text: a template's name, or its source"),
    "adapters": (lambda value: isinstance(value, Iterable), "a list or a mapping to weights"),
    "revision": (lambda value: isinstance(value, str), "a text: a branch, tag or commit"),
}
"""What a keyword's value must be, if not None, where nothing behind it looks: how to tell, and how to say it."""


def checked_keywords(options: type | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that a keyword it does not have, or of another kind, is a `UsageError` with the right one.

    Args:
        options: the TypedDict of the function's `**` argument; None: it has none.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters.values()
        names = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD and each.name != "self"]
        if options is not None:
            names += options.__annotations__

        @functools.wraps(function)
        def checked(*args: P.args, **keywords: P.kwargs) -> R:
            for name, value in keywords.items():
                if name not in names:
                    near = difflib.get_close_matches(name, names, n=1)
                    told = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}"
                    raise UsageError(f"{function.__name__}() has no keyword {name!r}: {told}")
                is_right, words = KINDS.get(name, (None, ""))
                if is_right is not None and value is not None and not is_right(value):
                    raise UsageError(f"{name} must be {words}, or None, not {value!r:.80}")
            return function(*args, **keywords)

        return checked

    return decorate
