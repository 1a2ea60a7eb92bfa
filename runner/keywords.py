"""The keywords of an answer: their types, which checkers and editors read, and their check when a program runs."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

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


class ChatOptions(StreamOptions, total=False):
    """The keywords of `LanguageModel.chat_stream`, which describes them."""

    tools: Sequence[Mapping[str, Any]] | None
    template: str | None
    template_kwargs: Mapping[str, Any] | None


def checked_keywords(options: type | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that a keyword it does not have is a `UsageError`, which says what may be meant.

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
            for name in keywords:
                if name not in names:
                    near = difflib.get_close_matches(name, names, n=1)
                    told = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}"
                    raise UsageError(f"{function.__name__}() has no keyword {name!r}: {told}")
            return function(*args, **keywords)

        return checked

    return decorate
