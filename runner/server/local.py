"""Models of this machine, as the server's APIs use them."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import runner
from runner.checkpoint.model_files import open_files
from runner.engine.defaults import GenerationDefaults
from runner.engine.engine import Engine
from runner.engine.loaded import planned_nbytes
from runner.engine.sampler import Token
from runner.errors import UsageError
from runner.families import find
from runner.language_model import LanguageModel, chosen_context, end_tokens
from runner.ops.owner import OWNER
from runner.server.backend import Facts, Order, Status, Step
from runner.server.log import say
from runner.server.model import Served
from runner.server.pool import Lease, Pool, Slot


class LocalModels:
    """The models that a server was told of: what their files say is known from the start.

    Attributes:
        served: the models by name.
        notes: sentences of their files about what was ignored, guessed or is doubtful.
        progress: whether a bar on stderr shows how weights are read.
    """

    def __init__(self, pool: Pool, *, dtype: str | None = None, context: int | None = None) -> None:
        """Begin without any; `dtype` and `context` are those of `runner.load`, for all."""
        self.pool = pool
        self.served: dict[str, Served] = {}
        self.notes: list[str] = []
        self.progress = False
        self._dtype = dtype
        self._context = context

    def add(self, name: str, path: Path, *, pinned: bool = False) -> Slot:
        """Serve the model at `path` under `name`: config, tokenizer and headers are read, and no weights.

        Raises:
            RunnerError: as `runner.load`, but for what only the weights can show.
            UsageError: there is not memory enough for it, or the name is taken.
        """
        if name in self.served:
            raise UsageError(f"two models are called {name}: name one by another path, or serve it by itself")
        files = open_files(path)
        config = find(files.config)[0].from_dict(files.config)
        context, doubts = chosen_context(config, self._context)
        self.notes += [*config.notes, *files.notes, *doubts]
        tokenizer = OWNER.run(files.tokenizer)  # on this thread: see `runner.load`
        facts = Facts(
            name=name,
            family=config.model_type,
            tokenizer=tokenizer,
            defaults=GenerationDefaults.read(files.generation_config),
            eos_token_ids=end_tokens(files, tokenizer),
            context_length=context,
            vocab_size=config.vocab_size,
            nbytes=OWNER.run(lambda: planned_nbytes(files.config, files.source, dtype=self._dtype)),
        )
        slot = self.pool.add(name, facts.nbytes, lambda: self._load(path, facts), pinned=pinned)
        self.served[name] = Served(LocalBackend(facts, slot, self.pool))
        return slot

    def _load(self, path: Path, facts: Facts) -> LanguageModel:
        lm = runner.load(path, dtype=self._dtype, context_length=self._context, progress=self.progress)
        for note in lm.notes:
            if note not in self.notes:
                say(logging.WARNING, event="note", model=facts.name, note=note)
        return dataclasses.replace(lm, tokenizer=facts.tokenizer)  # one of the two is enough


def facts_of(name: str, lm: LanguageModel) -> Facts:
    """What is known of a loaded model."""
    return Facts(
        name=name,
        family=lm.config.model_type,
        tokenizer=lm.tokenizer,
        defaults=lm.defaults,
        eos_token_ids=lm.eos_token_ids,
        context_length=lm.context_length,
        vocab_size=lm.config.vocab_size,
        nbytes=lm.nbytes,
    )


class LocalBackend:
    """A model in this process, by an engine that answers many requests at once."""

    def __init__(self, facts: Facts, slot: Slot, pool: Pool) -> None:
        """Serve the model of `slot` in the words of `facts`."""
        self.facts = facts
        self._slot = slot
        self._pool = pool

    @property
    def _engine(self) -> Engine:
        return self._pool.engine

    async def hold(self, keep: float | None = None) -> Lease:
        """Have it loaded until the lease is released."""
        return await self._pool.hold(self._slot, keep)

    async def tokens(self, order: Order) -> AsyncGenerator[Step, None]:
        """Make an answer, token by token."""
        ticket = self._engine.submit(
            order.ids,
            order.params,
            max_tokens=order.max_tokens,
            ends=order.ends,
            choice=order.choice,
            priority=order.priority,
            turns=order.turns,
            guide=order.guide,
            model=self._slot.name,
        )
        try:
            async for token in ticket:
                yield Step(token, ticket.reused)
        finally:
            ticket.cancel()

    async def score(self, ids: Sequence[int], top: int) -> list[Token]:
        """Log-probabilities of a prompt's tokens."""
        ticket = self._engine.submit(ids, max_tokens=0, scores=top, model=self._slot.name)
        try:
            async for _ in ticket:
                pass
        finally:
            ticket.cancel()
        return ticket.scores[1:]

    def status(self) -> Status:
        """How it fares."""
        slot = self._slot
        state = self._pool.status(slot)
        if state is None:
            return Status(loaded=False)
        return Status(
            alive=state.alive,
            stuck_for=state.quiet,
            running=state.running,
            waiting=state.waiting,
            nbytes=state.nbytes,
            expires_in=slot.expires - time.monotonic(),
        )

    def restart(self) -> None:
        """Begin anew after a failure."""
        self._pool.restart(self._slot)

    def close(self) -> None:
        """Give the memory of all models back."""
        self._pool.close()
