"""What the server needs from whatever computes: tokens for an order, log-probabilities of a prompt, and how it fares.

`LocalBackend` gives it over a loaded model; the tests have another, whose answers are written down.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from runner.engine.defaults import GenerationDefaults
from runner.engine.prompt_cache import PromptCache
from runner.engine.request import Request, Run
from runner.engine.sampler import Token
from runner.engine.sampling import SamplingParams
from runner.ops.owner import OWNER
from runner.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from runner.engine.speculation import Guide
    from runner.language_model import LanguageModel

STUCK = 300.0
"""Seconds without a sign of life, while an answer is under way, after which the engine counts as stuck. A part of a
prompt takes seconds on the slowest machines."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """One answer to make, checked already.

    Attributes:
        ids: the prompt.
        max_tokens: the most tokens to make.
        choice: which of several answers to the same prompt it is, from 0; another draws other numbers.
        guide: says which tokens may come next; None: all may.
    """

    ids: Sequence[int]
    params: SamplingParams
    max_tokens: int
    choice: int = 0
    guide: Guide | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One token of an answer; `cached_tokens` of its prompt were there already."""

    token: Token
    cached_tokens: int = 0


@dataclass(frozen=True)
class Status:
    """How a backend fares.

    Attributes:
        alive: whether it can answer at all.
        stuck_for: seconds since the last sign of life while an answer is under way; 0 if none is.
        running: answers under way.
        waiting: answers that wait for their first turn.
    """

    alive: bool = True
    stuck_for: float = 0.0
    running: int = 0
    waiting: int = 0

    @property
    def healthy(self) -> bool:
        """Whether a new request would be answered."""
        return self.alive and self.stuck_for < STUCK


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a model without computing.

    Attributes:
        family: its `model_type`.
        vocab_size: the number of logits, at least that of the tokenizer's ids.
        nbytes: bytes of its weights in memory.
        parameters: how many numbers it has; 0 where that is not known.
        quantization: how they are packed, for people.
    """

    name: str
    family: str
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    eos_token_ids: frozenset[int]
    context_length: int
    vocab_size: int
    nbytes: int = 0
    parameters: int = 0
    quantization: str = ""


class Backend(Protocol):
    """A model that answers."""

    @property
    def facts(self) -> Facts:
        """What is known of the model."""
        ...

    def tokens(self, order: Order) -> AsyncGenerator[Step, None]:
        """Make an answer, token by token, up to an end token or the order's length; closing it frees its place."""
        ...

    async def score(self, ids: Sequence[int], top: int) -> list[Token]:
        """Log-probabilities of each of `ids` but the first, given those before it, and of the `top` likeliest."""
        ...

    def status(self) -> Status:
        """How it fares now; answered without the thread that computes."""
        ...

    def close(self) -> None:
        """Give its memory back."""
        ...


class LocalBackend:
    """A model in this process. Answers that are under way at once take turns, token by token."""

    def __init__(self, lm: LanguageModel, name: str) -> None:
        self.lm = lm
        self.facts = Facts(
            name=name,
            family=lm.config.model_type,
            tokenizer=lm.tokenizer,
            defaults=lm.defaults,
            eos_token_ids=lm.eos_token_ids,
            context_length=lm.context_length,
            vocab_size=lm.config.vocab_size,
            nbytes=lm.nbytes,
        )
        self._running = 0
        self._waiting = 0
        self._moved = time.monotonic()

    async def tokens(self, order: Order) -> AsyncGenerator[Step, None]:
        """Make an answer, token by token."""
        params = order.params
        if params.seed is not None and order.choice:
            params = params.replace(seed=(params.seed + order.choice * 0x9E3779B97F4A7C15) % (1 << 63))
        loaded = self.lm.engine
        request = Request(list(order.ids), params, order.max_tokens, guide=order.guide)
        run = Run(loaded, PromptCache(loaded, keeps=False), request)
        steps = self._steps(run)
        async with self._counted():
            waiting = True
            self._waiting += 1
            try:
                while True:
                    token = await loaded.wait(lambda: next(steps, False))
                    if waiting:
                        waiting = False
                        self._waiting -= 1
                    self._move()
                    if isinstance(token, Token):
                        yield Step(token, run.reused)
                    elif token is False:
                        return
            finally:
                self._waiting -= waiting
                OWNER.post(steps.close)  # not here: it may be under way on the thread that computes

    @staticmethod
    def _steps(run: Run) -> Generator[Token | None, None, None]:
        yield from run

    @contextlib.asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        if not self._running:
            self._move()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def _move(self) -> None:
        self._moved = time.monotonic()

    async def score(self, ids: Sequence[int], top: int) -> list[Token]:
        """Log-probabilities of a prompt's tokens, from one pass."""
        loaded = self.lm.engine

        def job() -> list[Token]:
            import mlx.core as mx

            logits = loaded.logits(ids)[:-1]
            scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            picked: Any = mx.take_along_axis(scores, mx.array(list(ids[1:]))[:, None], axis=-1)[:, 0].tolist()
            if not top:
                return [Token(index, value) for index, value in zip(ids[1:], picked, strict=True)]
            best = mx.argsort(-scores, axis=-1)[:, :top]
            names: Any = best.tolist()
            likeliest: Any = mx.take_along_axis(scores, best, axis=-1).tolist()
            rows = zip(ids[1:], picked, names, likeliest, strict=True)
            return [Token(index, value, list(zip(*pair, strict=True))) for index, value, *pair in rows]

        async with self._counted():
            result = await loaded.wait(job) if len(ids) > 1 else []
            self._move()
        return result

    def status(self) -> Status:
        """How it fares."""
        stuck = time.monotonic() - self._moved if self._running else 0.0
        return Status(not self.lm.engine.closed, stuck, self._running - self._waiting, self._waiting)

    def close(self) -> None:
        """Give the memory of the weights back."""
        self.lm.close()
