"""Turns sampled ids into an answer: text, reasoning, timings and the reason for its end."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterable
from dataclasses import dataclass, field

from runner import reprs
from runner.engine.sampler import Token
from runner.ops.memory import Memory
from runner.text.answer_text import AnswerText
from runner.text.separator import Split


@dataclass(frozen=True)
class Timings:
    """Tokens and seconds of prefill and generation.

    Attributes:
        prompt_tokens: tokens of the prompt that were prefilled for this answer.
        peak_memory: bytes that MLX held at most, the buffers that it freed and keeps for later included.
        cached_tokens: tokens at the start of the prompt that the KV caches already held.
    """

    prompt_tokens: int
    prompt_seconds: float
    generation_tokens: int
    generation_seconds: float
    peak_memory: int
    cached_tokens: int = 0

    def __repr__(self) -> str:
        return (
            f"Timings(prompt: {self.prompt_tokens} tokens, {self.prompt_tps:.1f} per second; "
            f"answer: {self.generation_tokens} tokens, {self.generation_tps:.1f} per second; "
            f"peak memory {self.peak_memory / 1e6:.0f} MB)"
        )

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
    """One token of an answer.

    Attributes:
        text: the text that the token completes, its reasoning left out; often empty.
        token: its id; -1 where an answer was broken off, and this is no token's.
        logprob: its log-probability; None unless asked for.
        top_logprobs: (id, log-probability) of the most likely tokens; None unless asked for.
        finish_reason: on the last chunk "stop" (end token or stop string), "length", "cancelled" or, of an engine,
            "timeout"; else None.
        timings: on the last chunk; else None.
        reasoning: the text of the model's reasoning that the token completes; "" in an answer to plain text.
    """

    text: str
    token: int
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None
    finish_reason: str | None = None
    timings: Timings | None = field(default=None, repr=False)
    reasoning: str = ""

    __repr__ = reprs.changed


@dataclass(frozen=True)
class Generation:
    """A finished answer.

    Attributes:
        tokens: the ids of the answer, an end token included.
        finish_reason: "stop" (end token or stop string), "length" or "cancelled".
        logprobs: the log-probability of each token; None unless asked for.
        reasoning: what the model wrote to itself before the text; "" if nothing, or if the prompt was plain text.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    timings: Timings = field(repr=False)
    logprobs: list[float] | None = None
    reasoning: str = ""

    __repr__ = reprs.changed


Steps = Generator[Chunk | None, None, None]
"""An answer step by step: a chunk for each token, None after each part of the prompt that more follows."""


class Answer:
    """Turns the tokens of one answer into chunks; finds stop strings and the end, and keeps the time."""

    def __init__(
        self,
        end_tokens: Collection[int],
        text: AnswerText,
        prompt_tokens: int,
        memory: Memory,
    ) -> None:
        """Begin an answer now; `prompt_tokens` is the length of its prompt, those that a cache holds included."""
        self.memory = memory
        self.end_tokens = end_tokens
        self.text = text
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.count = 0
        self.started = time.perf_counter()
        self.first = self.started

    def add(self, token: Token, *, last: bool, cancelled: bool) -> Chunk:
        """Make the chunk of a token.

        Args:
            last: whether the token is the last that the length limit allows.
            cancelled: whether the caller wants no more tokens.
        """
        if self.count == 0:
            self.first = time.perf_counter()
        self.count += 1
        split, reason = Split(), None
        # An end token ends the answer and has no text. Of the other reasons a stop text comes first: it was met by
        # this token, even if this is also the last one allowed.
        if token.id in self.end_tokens:
            reason = "stop"
        else:
            split, stopped = self.text.add(token.id)
            reason = "stop" if stopped else "length" if last else "cancelled" if cancelled else None
        # At the end comes what was held back: an incomplete character, the possible start of a stop text or of a mark.
        if reason is not None:
            tail, stopped = self.text.finish()
            split, reason = split + tail, "stop" if stopped else reason
        timings = self.timings() if reason else None
        return Chunk(
            split.content, token.id, token.logprob, token.top_logprobs, reason, timings, reasoning=split.reasoning
        )

    def cancelled(self) -> Chunk:
        """Make the only chunk of an answer that was cancelled during prefill."""
        return Chunk("", -1, finish_reason="cancelled", timings=self.timings())

    def broken_off(self, reason: str) -> Chunk:
        """Make the last chunk of an answer that ends for a `reason` that lies in none of its tokens."""
        tail, _ = self.text.finish()
        return Chunk(tail.content, -1, finish_reason=reason, timings=self.timings(), reasoning=tail.reasoning)

    def timings(self) -> Timings:
        """Timings from the start of the answer to now."""
        now = time.perf_counter()
        return Timings(
            self.prompt_tokens - self.cached_tokens,
            self.first - self.started,
            self.count,
            now - self.first,
            self.memory.look(),
            self.cached_tokens,
        )


def gather(chunks: Iterable[Chunk]) -> Generation:
    """Join the chunks of a whole answer."""
    pieces = list(chunks)
    last = pieces[-1]
    assert last.finish_reason is not None and last.timings is not None
    made = [piece for piece in pieces if piece.token >= 0]  # without the chunk of a cancelled prefill
    logprobs = [piece.logprob for piece in made if piece.logprob is not None]
    return Generation(
        "".join(piece.text for piece in pieces),
        [piece.token for piece in made],
        last.finish_reason,
        last.timings,
        logprobs if len(logprobs) == len(made) else None,
        "".join(piece.reasoning for piece in pieces),
    )
