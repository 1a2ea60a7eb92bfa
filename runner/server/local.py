"""Models of this machine, as the server's APIs use them."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import runner
from runner.checkpoint.hub import pull
from runner.checkpoint.hub_ids import parse
from runner.checkpoint.model_files import ModelFiles, open_files
from runner.engine.defaults import GenerationDefaults
from runner.engine.draft import check_draft
from runner.engine.planned import planned
from runner.engine.sampler import Token
from runner.engine.sampling import SamplingParams
from runner.engine.ticket import Ticket
from runner.errors import UsageError
from runner.families import find
from runner.language_model import LanguageModel, chosen_context, end_tokens
from runner.ops.device import EXACT
from runner.ops.owner import OWNER
from runner.server.backend import Facts, Order, Status, Step
from runner.server.guessing import Guesses
from runner.server.log import say
from runner.server.model import Served
from runner.server.pool import Lease, Pool, Slot
from runner.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from runner.adapters import AdapterFiles
    from runner.engine.part import Part


class LocalModels:
    """The models that a server was told of: what their files say is known from the start.

    Attributes:
        served: the models by name.
        notes: sentences of their files about what was ignored, guessed or is doubtful.
        progress: whether a bar on stderr shows how weights are read.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        dtype: str | None = None,
        activations: str = EXACT,
        context: int | None = None,
        draft: LanguageModel | None = None,
        lead: Callable[[], Part | None] | None = None,
    ) -> None:
        """Begin without any.

        Args:
            dtype: that of `runner.load`, for all models, like `activations` and `context`.
            draft: a model that guesses tokens for all of them; it stays loaded.
            lead: gives this process's part of the only model, which is shared out over several; None: it has all.
        """
        self.pool = pool
        self.served: dict[str, Served] = {}
        self.notes: list[str] = []
        self.progress = False
        self._dtype = dtype
        self._activations = activations
        self._context = context
        self._lead = lead
        self.draft = draft
        if draft is not None:
            pool.fix(draft.nbytes)

    def add(self, name: str, path: Path, *, pinned: bool = False, adapters: Mapping[str, Path] | None = None) -> Slot:
        """Serve the model at `path` under `name`: config, tokenizer and headers are read, and no weights.

        Args:
            adapters: directories of adapters on it, by the names that they are served under.

        Raises:
            RunnerError: as `runner.load`, but for what only the weights can show.
            UsageError: there is not memory enough for it, a name is taken, an adapter cannot share its base, or the
                draft model's vocabulary is another.
        """
        for each in (name, *(adapters or ())):
            if each in self.served:
                raise UsageError(f"two models are called {each}: name one by another path, or serve it by itself")
        files = open_files(path)
        config = find(files.config)[0].from_dict(files.config)
        context, doubts = chosen_context(config, self._context)
        self.notes += [*config.notes, *files.notes, *doubts]
        tokenizer = OWNER.run(files.tokenizer)  # on this thread: see `runner.load`
        weights = OWNER.run(lambda: planned(files.config, files.source, dtype=self._dtype))
        facts = Facts(
            name=name,
            family=config.model_type,
            tokenizer=tokenizer,
            defaults=GenerationDefaults.read(files.generation_config),
            eos_token_ids=end_tokens(files, tokenizer),
            context_length=context,
            vocab_size=config.vocab_size,
            nbytes=weights.nbytes,
            forms=weights.forms,
            format="safetensors" if files.path.is_dir() else "gguf",
        )
        if self.draft is not None:
            try:
                check_draft(self.draft, facts)
            except UsageError as error:
                raise UsageError(f"{self.draft.name} cannot guess for {name}: {error}") from error
        opened = self._opened(files, tokenizer, adapters or {})
        nbytes = facts.nbytes + sum(header.nbytes for one in opened for header in one.source.headers.values())
        if self._lead is not None:
            nbytes, pinned = 0, True  # how much of it this process has, loading finds; the others have theirs
        specs = {str(path): 0.0 for path in (adapters or {}).values()}
        slot = self.pool.add(name, nbytes, lambda: self._load(path, facts, specs), pinned=pinned)
        shared = bool(adapters)
        self.served[name] = Served(LocalBackend(facts, slot, self.pool, shared=shared, draft=self.draft))
        for called, one in zip(adapters or (), opened, strict=True):
            own = dataclasses.replace(facts, name=called, parent=name)
            backend = LocalBackend(own, slot, self.pool, shared=shared, adapter=one.name, draft=self.draft)
            self.served[called] = Served(backend)
        return slot

    def pull(self, model: str, told: Callable[[int, int], None]) -> Served:
        """Fetch a model of the hub by its id, or bring it up to date, and serve it under that name.

        A model that is served already stays as it was opened.

        Raises:
            HubError: it is no hub id, or the hub lacks it, refuses access, or cannot be reached.
            RunnerError: as `add`.
        """
        name = str(parse(model))
        path = pull(name, progress=told)
        if name not in self.served:
            self.add(name, path)
        return self.served[name]

    def _opened(self, files: ModelFiles, tokenizer: Tokenizer, adapters: Mapping[str, Path]) -> Sequence[AdapterFiles]:
        """The files of adapters, checked against the model's; raises as `add`."""
        if not adapters:
            return ()
        from runner.adapters import fit, open_adapters

        opened = open_adapters({str(path): 0.0 for path in adapters.values()}, Path)
        OWNER.run(lambda: fit(files.config, find(files.config), files.source, opened)).check_switches()
        for one in opened:
            beside = one.source.directory
            if Tokenizer.is_in(beside) and Tokenizer.from_directory(beside).vocab_size > tokenizer.vocab_size:
                raise UsageError(
                    f"adapter {one.name} has tokens of its own, and cannot share its base: merge it "
                    "('runner convert --adapter')"
                )
        return opened

    def _load(self, path: Path, facts: Facts, adapters: Mapping[str, float]) -> LanguageModel:
        lm = runner.load(
            path, dtype=self._dtype, adapters=adapters, context_length=self._context, activations=self._activations,
            progress=self.progress, part=None if self._lead is None else self._lead(),
        )  # fmt: skip
        for note in lm.notes:
            if note not in self.notes:
                say(logging.WARNING, event="note", model=facts.name, note=note)
        return dataclasses.replace(lm, tokenizer=facts.tokenizer)  # one of the two is enough


class LocalBackend:
    """A model in this process, by an engine that answers many requests at once."""

    def __init__(
        self,
        facts: Facts,
        slot: Slot,
        pool: Pool,
        *,
        shared: bool = False,
        adapter: str | None = None,
        draft: LanguageModel | None = None,
    ) -> None:
        """Serve the model of `slot` in the words of `facts`.

        Args:
            draft: a loaded model that guesses tokens.
            shared: whether others serve it under other names, with other adapters.
            adapter: the adapter that it computes with, by the name that it was loaded with.
        """
        self.facts = facts
        self._slot = slot
        self._pool = pool
        self._shared = shared
        self._adapters = {} if adapter is None else {adapter: 1.0}
        self._tickets: set[Ticket] = set()  # under way
        self._guesses = None if draft is None else Guesses(draft.engine, facts.vocab_size)

    async def hold(self, keep: float | None = None) -> Lease:
        """Have it loaded until the lease is released."""
        return await self._pool.hold(self._slot, keep)

    def _submit(self, ids: Sequence[int], params: SamplingParams | None, max_tokens: int, **more: Any) -> Ticket:
        adapters = self._adapters if self._shared else None
        engine, name = self._pool.engine, self._slot.name
        return engine.submit(ids, params, max_tokens=max_tokens, adapters=adapters, model=name, **more)

    async def tokens(self, order: Order) -> AsyncGenerator[Step, None]:
        """Make an answer, token by token."""
        ticket = self._submit(
            order.ids,
            order.params,
            order.max_tokens,
            ends=order.ends,
            choice=order.choice,
            priority=order.priority,
            turns=order.turns,
            guide=order.guide,
            proposer=None if self._guesses is None else self._guesses.proposer,
            beside=None if self._guesses is None else self._guesses.footprint,
        )
        self._tickets.add(ticket)
        try:
            begun = False
            while (event := await ticket.event()) is not None:
                if isinstance(event, Token):
                    yield Step(event, ticket.reused)
                elif not begun:  # a part of the prompt is read
                    yield Step(None, ticket.reused)
                begun = True
        finally:
            self._tickets.discard(ticket)
            ticket.cancel()

    async def score(self, ids: Sequence[int], top: int) -> list[Token]:
        """Log-probabilities of a prompt's tokens."""
        ticket = self._submit(ids, None, 0, scores=top)
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
            return Status(loaded=False, pinned=slot.pinned, guesses=self._guesses)
        running, waiting, nbytes = state.running, state.waiting, state.nbytes
        if self._shared:  # the engine's numbers are those of all names together
            running = sum(1 for ticket in self._tickets if ticket.read or ticket.reused)
            waiting = len(self._tickets) - running
            nbytes = 0 if self._adapters else nbytes
        return Status(
            alive=state.alive,
            stuck_for=state.quiet,
            running=running,
            waiting=waiting,
            nbytes=nbytes,
            room=self._pool.engine.budget.room,
            pinned=slot.pinned,
            expires_in=slot.expires - time.monotonic(),
            guesses=self._guesses,
        )

    def restart(self) -> None:
        """Begin anew after a failure."""
        self._pool.restart(self._slot)

    def close(self) -> None:
        """Give the memory of all models back."""
        self._pool.close()
