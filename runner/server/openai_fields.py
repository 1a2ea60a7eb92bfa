"""Fields that OpenAI's chat and completions share, and how they become a request."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from runner.server.errors import invalid
from runner.server.inert import STREAM_OPTIONS, Table

SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "seed",
)  # fmt: skip
"""Fields that are those of `SamplingParams`."""


class StreamOptions(msgspec.Struct):
    """What a stream holds besides the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    inert: ClassVar[Table] = STREAM_OPTIONS


class Common(msgspec.Struct, kw_only=True):
    """Fields of both."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: int | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    priority: int | None = None

    def rank(self) -> int:
        """The priority with the higher one first; in vLLM's field the lower one goes first.

        Raises:
            ApiError: it is out of range.
        """
        wanted = self.priority or 0
        if abs(wanted) >= 1 << 31:
            raise invalid("priority must be below 2^31 in size", "priority")
        return -wanted

    def sampling(self, logprobs: int | None) -> dict[str, Any]:
        """The fields of `SamplingParams` that are set."""
        given = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        if given.get("top_k") == -1:  # vLLM's way to keep all
            given["top_k"] = 0
        if given.get("seed", 0) < 0:
            given["seed"] %= 1 << 63
        return given if logprobs is None else {**given, "logprobs": logprobs}

    def stops(self) -> list[str] | None:
        """The stop texts; None where the request says nothing."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def usage_asked(self) -> tuple[bool, bool]:
        """Whether a stream ends with the usage, and whether each of its chunks has it."""
        options = self.stream_options
        if options is None:
            return False, False
        if not self.stream:
            raise invalid("stream_options: only a stream has them, and stream is not true", "stream_options")
        return bool(options.include_usage), bool(options.include_usage and options.continuous_usage_stats)


def usage_of(prompt: int, completion: int, cached: int, reasoning: int) -> dict[str, Any]:
    """Counts of tokens in OpenAI's form."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }
