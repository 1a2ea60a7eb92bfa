"""`runner.Engine`: many prompts at once over one or more language models, each answered as if it were alone."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from runner.answer import Answer, Chunk
from runner.engine.engine import DISK, Status
from runner.engine.engine import Engine as IdEngine
from runner.engine.scheduler import MOST
from runner.engine.ticket import Ticket
from runner.errors import TemplateError, UsageError
from runner.keywords import ChatOptions, StreamOptions, checked_keywords
from runner.language_model import LanguageModel, Prepared
from runner.ops.memory import Memory

if TYPE_CHECKING:
    from runner.engine.sampler import Token

OWN = ("prompt_cache", "on_prefill", "cancelled")
"""Options of a stream that are of no use here: prefixes are kept by themselves, and an answer has `cancel`."""


class Answering:
    """An answer that an engine works on: iterate over its chunks with `for` or `async for`, in one place.

    One that is let go of is cancelled.
    """

    def __init__(self, ticket: Ticket, answer: Answer, budget: int) -> None:
        self._ticket = ticket
        self._answer = answer
        self._left = budget
        self._ended = False

    def __repr__(self) -> str:
        return f"Answering({self._answer.count} tokens, {self.reused} of the prompt's reused)"

    @property
    def reused(self) -> int:
        """Tokens of the prompt that were not read again."""
        return self._ticket.reused

    @property
    def read(self) -> int:
        """Tokens of the prompt that were read so far."""
        return self._ticket.read

    def cancel(self) -> None:
        """End the answer within one step, in the middle of its prompt too; what was made still comes."""
        self._ticket.cancel()

    def __iter__(self) -> Iterator[Chunk]:
        """The chunks, the last of which has a `finish_reason`: those of a stream, "cancelled" or "timeout".

        Raises:
            NumericsError: no token can be picked from the logits.
            UsageError: the engine was closed.
            Exception: whatever a step of the engine raised.
        """
        for token in self._ticket:
            yield self._chunk(token)
            if self._ended:
                return
        yield from self._last()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """The chunks for a coroutine, as `__iter__` has them; its event loop goes on meanwhile."""
        async for token in self._ticket:
            yield self._chunk(token)
            if self._ended:
                return
        for chunk in self._last():
            yield chunk

    def _chunk(self, token: Token) -> Chunk:
        self._answer.cached_tokens = self.reused
        self._left -= 1
        chunk = self._answer.add(token, last=self._left == 0, cancelled=False)
        if chunk.finish_reason is not None:
            self._ended = True
            self._ticket.cancel()  # a text to stop before is no matter of the engine's
        return chunk

    def _last(self) -> Iterator[Chunk]:
        """The end of an answer that was broken off."""
        if not self._ended:
            self._ended = True
            self._answer.cached_tokens = self.reused
            yield self._answer.broken_off(self._ticket.finish_reason or "cancelled")


class Engine:
    """Answers many prompts at once over one or more models, from any thread or asyncio task.

    Tokens of all answers under way go through a model together, prompts in pieces beside them. What was computed is
    kept, within a budget of bytes, for prompts that begin alike. On a CPU with our kernels an answer is the same,
    whatever runs beside it.

    Use it in a `with` statement, or call `close`. The models stay loaded.
    """

    def __init__(
        self,
        models: LanguageModel | Mapping[str, LanguageModel],
        *,
        memory: int | None = None,
        prefixes: int | None = None,
        cache_dir: str | Path | None = None,
        cache_size: int = DISK,
        rows: int = MOST,
    ) -> None:
        """Make one that has no requests yet.

        Args:
            models: a model, or several by the names to ask for them by.
            memory: bytes that weights, answers under way and kept prefixes may take together; None: what this machine,
                or the control group that it runs in, allows.
            prefixes: bytes of it, for each model, for what earlier answers have computed; None: half of what the
                weights leave. They go first where answers need the memory.
            cache_dir: a directory, of your own alone, for kept prefixes that memory has no room for, and for all there
                are when the engine is closed: another one over the same models begins with them. None: they are let
                go. All weights are read once more at the start, to know them again.
            cache_size: bytes of all files in it at most; those that were used longest ago go first.
            rows: how many answers of a model are computed at once at most.

        Raises:
            UsageError: there is no model, one was closed, a number is out of range, the weights need more memory, or
                others may write into `cache_dir`.
        """
        self._models = {"": models} if isinstance(models, LanguageModel) else dict(models)
        self._openings: dict[str, int] = {}
        loaded = {name: lm.engine for name, lm in self._models.items()}
        self._engine = IdEngine(
            loaded,
            memory=memory,
            rows=rows,
            prefixes=prefixes,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            cache_size=cache_size,
        )

    def __repr__(self) -> str:
        return repr(self._engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @checked_keywords(StreamOptions)
    def submit(
        self,
        prompt: str | Sequence[int],
        *,
        model: str = "",
        priority: int = 0,
        timeout: float | None = None,
        choice: int = 0,
        **options: Unpack[StreamOptions],
    ) -> Answering:
        """Begin to answer a prompt; returns at once, with what its chunks are iterated over.

        Args:
            prompt: text, or token ids.
            model: which model answers, by its name.
            priority: prompts with a higher one go first; equals in the order in which they came.
            timeout: seconds after which the answer ends, wherever it is.
            choice: which of several answers to the same prompt and seed this is: each draws other numbers. The prompt
                is read once for those that are under way together.
            options: those of `LanguageModel.stream`, but for `prompt_cache`, `on_prefill` and `cancelled`.

        Raises:
            ContextLengthError: the prompt leaves no room for an answer.
            UsageError: an argument is out of range, the answer can never fit into memory, or the engine was closed.
            BackendError: the model has failed in an earlier step, and answers no more.
        """
        lm = self._model(model, options)
        prepared = lm.prepare(prompt, **options)
        return self._begin(prepared, model, priority, timeout, choice, opening=0)

    @checked_keywords(ChatOptions)
    def submit_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        model: str = "",
        priority: int = 0,
        timeout: float | None = None,
        choice: int = 0,
        **options: Unpack[ChatOptions],
    ) -> Answering:
        """Begin to answer a conversation through the model's chat template; as `submit`.

        Args:
            messages: as in `LanguageModel.chat_stream`, whose options these are.
        """
        lm = self._model(model, options)
        prepared = lm.prepare_chat(messages, **options)
        return self._begin(prepared, model, priority, timeout, choice, opening=self._opening(model))

    def _model(self, name: str, options: Mapping[str, Any]) -> LanguageModel:
        if name not in self._models:
            raise UsageError(f"no model is called {name!r}: there are {', '.join(map(repr, self._models))}")
        for option in OWN:
            if options.get(option) is not None:
                raise UsageError(f"{option} is not for an engine: it keeps prefixes itself, and answers have cancel()")
        return self._models[name]

    def _opening(self, model: str) -> int:
        """How many tokens open the model's turn: the next prompt of a conversation may go on otherwise behind them."""
        if model not in self._openings:
            render, ask = self._models[model].tokenizer.apply_chat_template, [{"role": "user", "content": "hi"}]
            with contextlib.suppress(TemplateError):  # a template that wants more than a user's message
                whole = render(ask, add_generation_prompt=True)
                self._openings[model] = len(whole) - len(render(ask, add_generation_prompt=False))
        return self._openings.setdefault(model, 0)

    def _begin(
        self, prepared: Prepared, model: str, priority: int, timeout: float | None, choice: int, *, opening: int
    ) -> Answering:
        turn = len(prepared.ids) - opening
        ticket = self._engine.submit(
            prepared.ids,
            prepared.params,
            max_tokens=prepared.budget,
            ends=prepared.ends,
            choice=choice,
            priority=priority,
            timeout=timeout,
            turns=(turn,) if 0 < turn < len(prepared.ids) else (),
            guide=prepared.guide,
            proposer=prepared.proposer,
            beside=prepared.beside,
            model=model,
        )
        answer = Answer(prepared.ends, prepared.text, len(prepared.ids), Memory(keeps=None))
        return Answering(ticket, answer, prepared.budget)

    def status(self, model: str = "") -> Status:
        """How a model fares, as of its last step: answered at once, whatever the engine does."""
        return self._engine.status(model)

    def close(self) -> None:
        """End every answer with a UsageError, once the step under way has ended. Closing twice is fine."""
        self._engine.close()
