"""What the server needs from whatever computes: tokens for an order, log-probabilities of a prompt, and how it fares.

`LocalBackend` gives it over a loaded model; the tests have another, whose answers are written down.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from runner.engine.defaults import GenerationDefaults
from runner.engine.engine import DISK, Engine
from runner.engine.sampler import Token
from runner.engine.sampling import SamplingParams
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
        ends: ids that end the answer.
        priority: who has a higher one goes first.
        turns: positions in the prompt where the next one of a conversation may part from it.
        guide: says which tokens may come next; None: all may.
    """

    ids: Sequence[int]
    params: SamplingParams
    max_tokens: int
    choice: int = 0
    ends: Collection[int] = frozenset()
    priority: int = 0
    turns: Collection[int] = ()
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
        nbytes: bytes of the caches of those under way.
    """

    alive: bool = True
    stuck_for: float = 0.0
    running: int = 0
    waiting: int = 0
    nbytes: int = 0

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

    def restart(self) -> None:
        """Begin anew after a failure: it was not alive, and is."""
        ...

    def close(self) -> None:
        """Give its memory back."""
        ...


class Engines:
    """The one engine of all models of this process, and another in its place once it has failed."""

    def __init__(
        self,
        models: Mapping[str, LanguageModel],
        memory: int | None = None,
        cache_dir: Path | None = None,
        cache_size: int | None = None,
    ) -> None:
        """Make it, for models by their names; the rest as in `Engine`."""
        self._models = dict(models)
        self._memory = memory
        self._cache_dir, self._cache_size = cache_dir, cache_size or DISK
        self.current = self._made()

    def _made(self) -> Engine:
        models = {name: lm.engine for name, lm in self._models.items()}
        return Engine(models, memory=self._memory, cache_dir=self._cache_dir, cache_size=self._cache_size)

    def restart(self) -> None:
        """End all requests, and begin anew with the same models."""
        self.current.close()
        self.current = self._made()


class LocalBackend:
    """A model in this process, by an engine that answers many requests at once."""

    def __init__(self, lm: LanguageModel, name: str, engines: Engines) -> None:
        """Serve `lm` under `name`, by which `engines` has it, too."""
        self.lm = lm
        self._engines = engines
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

    async def tokens(self, order: Order) -> AsyncGenerator[Step, None]:
        """Make an answer, token by token."""
        ticket = self._engines.current.submit(
            order.ids,
            order.params,
            max_tokens=order.max_tokens,
            ends=order.ends,
            choice=order.choice,
            priority=order.priority,
            turns=order.turns,
            guide=order.guide,
            model=self.facts.name,
        )
        try:
            async for token in ticket:
                yield Step(token, ticket.reused)
        finally:
            ticket.cancel()

    async def score(self, ids: Sequence[int], top: int) -> list[Token]:
        """Log-probabilities of a prompt's tokens."""
        ticket = self._engines.current.submit(ids, max_tokens=0, scores=top, model=self.facts.name)
        try:
            async for _ in ticket:
                pass
        finally:
            ticket.cancel()
        return ticket.scores[1:]

    def status(self) -> Status:
        """How it fares."""
        state = self._engines.current.status(self.facts.name)
        alive = state.alive and not self.lm.engine.closed
        return Status(alive, state.quiet, state.running, state.waiting, state.nbytes)

    def restart(self) -> None:
        """Begin anew after a failure."""
        self._engines.restart()

    def close(self) -> None:
        """Give the memory of the weights back."""
        self._engines.current.close()
        self.lm.close()
