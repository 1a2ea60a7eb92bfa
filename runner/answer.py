"""From sampled ids to text: stop strings, timings, and why an answer ended."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import mlx.core as mx

from runner.engine.sampling import Sampled
from runner.text.detokenizer import Detokenizer
from runner.text.stop import StopMatcher


@dataclass(frozen=True)
class Timings:
    """Tokens and seconds of the two phases; `peak_memory` in bytes, as MLX counts it.

    `prompt_tokens` were read for this answer; `cached_tokens`, in front of them, by an earlier one.
    """

    prompt_tokens: int
    prompt_seconds: float
    generation_tokens: int
    generation_seconds: float
    peak_memory: int
    cached_tokens: int = 0

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / max(self.prompt_seconds, 1e-9)

    @property
    def generation_tps(self) -> float:
        """Generated tokens per second."""
        return self.generation_tokens / max(self.generation_seconds, 1e-9)


@dataclass(frozen=True)
class Chunk:
    """One token: the text it completes (often none), its log-probability if asked for, and on the last one the end."""

    text: str
    token: int
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None
    finish_reason: str | None = None
    timings: Timings | None = None


@dataclass(frozen=True)
class Generation:
    """A finished answer. `finish_reason`: "stop" (end token or stop string), "length" or "cancelled"."""

    text: str
    tokens: list[int]
    finish_reason: str
    timings: Timings
    logprobs: list[float] | None = None


class Answer:
    """Turns tokens into chunks: text, stop strings, the end and the timings."""

    def __init__(
        self,
        end_tokens: Collection[int],
        detokenizer: Detokenizer,
        stops: StopMatcher,
        prompt_tokens: int,
        cached_tokens: int,
    ) -> None:
        self.end_tokens = end_tokens
        self.detokenizer = detokenizer
        self.stops = stops
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = cached_tokens
        self.count = 0
        self.started = time.perf_counter()
        self.first = self.started

    def add(self, step: tuple[mx.array, ...], *, last: bool, cancelled: bool) -> Chunk:
        token = _int(step[0])
        if self.count == 0:
            self.first = time.perf_counter()
        self.count += 1
        text, reason = "", None
        if token in self.end_tokens:
            reason = "stop"
        else:
            text, stopped = self.stops.add(self.detokenizer.add(token))
            reason = "stop" if stopped else "length" if last else "cancelled" if cancelled else None
            if stopped:
                return self.chunk(text, token, step, reason)
        if reason is not None:
            tail, stopped = self.stops.add(self.detokenizer.flush())
            text += tail if stopped else tail + self.stops.flush()
            reason = "stop" if stopped else reason
        return self.chunk(text, token, step, reason)

    def cancelled(self) -> Chunk:
        return Chunk("", -1, finish_reason="cancelled", timings=self.timings())

    def chunk(self, text: str, token: int, step: tuple[mx.array, ...], reason: str | None) -> Chunk:
        logprob = _float(step[1]) if len(step) > 1 else None
        top = None
        if len(step) > 2:
            top = [(_int(token), _float(value)) for token, value in zip(step[2], step[3], strict=True)]
        return Chunk(text, token, logprob, top, reason, self.timings() if reason else None)

    def timings(self) -> Timings:
        now = time.perf_counter()
        return Timings(
            self.prompt_tokens,
            self.first - self.started,
            self.count,
            now - self.first,
            mx.get_peak_memory(),
            self.cached_tokens,
        )


def _int(array: mx.array) -> int:
    value = array.item()
    assert isinstance(value, int)
    return value


def _float(array: mx.array) -> float:
    value = array.item()
    assert isinstance(value, float)
    return value


def flat(sampled: Sampled) -> tuple[mx.array, ...]:
    if sampled.logprob is None:
        return (sampled.token,)
    if sampled.top is None:
        return (sampled.token, sampled.logprob)
    return (sampled.token, sampled.logprob, *sampled.top)


def gather(chunks: Iterator[Chunk]) -> Generation:
    pieces = list(chunks)
    last = pieces[-1]
    assert last.finish_reason is not None and last.timings is not None
    made = [piece for piece in pieces if piece.token >= 0]
    logprobs = [piece.logprob for piece in made if piece.logprob is not None]
    return Generation(
        "".join(piece.text for piece in pieces),
        [piece.token for piece in made],
        last.finish_reason,
        last.timings,
        logprobs if len(logprobs) == len(made) else None,
    )
