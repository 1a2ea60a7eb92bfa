"""What the server needs from whatever computes: tokens for an order, log-probabilities of a prompt, and how it fares.

`runner.server.local` gives it over models of this machine; the tests have another, whose answers are written down.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from runner.engine.defaults import GenerationDefaults
from runner.engine.sampler import Token
from runner.engine.sampling import SamplingParams
from runner.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from runner.engine.speculation import Guide
    from runner.server.guessing import Guesses
    from runner.server.pool import Lease

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
    """One token of an answer; `cached_tokens` of its prompt were there already. Without a token: that is known now."""

    token: Token | None
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
        room: bytes that the caches of all models may take together; 0 where there is no bound.
        loaded: whether its weights are in memory.
        pinned: whether they stay, whatever a client asks for.
        expires_in: seconds after which they go if nobody asks; endless: when others need their memory, or never.
        guesses: counts of a draft model's guesses; None: there is none.
    """

    alive: bool = True
    stuck_for: float = 0.0
    running: int = 0
    waiting: int = 0
    nbytes: int = 0
    room: int = 0
    loaded: bool = True
    pinned: bool = False
    expires_in: float = math.inf
    guesses: Guesses | None = None

    @property
    def usage(self) -> float:
        """The part of the room for caches that answers under way take, from 0 to 1; what is kept besides makes way."""
        return min(self.nbytes / self.room, 1.0) if self.room > 0 else 0.0

    @property
    def healthy(self) -> bool:
        """Whether a new request would be answered."""
        return self.alive and self.stuck_for < STUCK


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a model without computing, and without its weights.

    Attributes:
        family: its `model_type`.
        vocab_size: the number of logits, at least that of the tokenizer's ids.
        nbytes: bytes of its weights in memory.
        forms: how many of its parameters are kept in which form, such as `4-bit g64` or `BF16`.
        format: that of its files, "safetensors" or "gguf".
        parent: the name of the model whose weights it shares, where it is an adapter's.
    """

    name: str
    family: str
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    eos_token_ids: frozenset[int]
    context_length: int
    vocab_size: int
    nbytes: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    format: str = "safetensors"
    parent: str | None = None


class Backend(Protocol):
    """A model that answers."""

    @property
    def facts(self) -> Facts:
        """What is known of the model."""
        ...

    async def hold(self, keep: float | None = None) -> Lease:
        """Load it where it is not, and have it stay until the lease is released, and for `keep` seconds then.

        `tokens` and `score` are for those who hold it. None: it stays as the server's options say.

        Raises:
            ApiError: it cannot be loaded, or there is no memory for it.
        """
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
