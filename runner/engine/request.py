"""One request: the ids of a prompt in, tokens out, computed on the thread that owns the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx

from runner.engine.compiled import Broken
from runner.engine.generate import Cancelled, decode, prefill_passes
from runner.engine.loaded import Loaded
from runner.engine.prompt_cache import PromptCache
from runner.engine.replay import Steps
from runner.engine.sampler import Sampled, Sampler, SamplingState, Token
from runner.engine.sampling import SamplingParams
from runner.engine.speculation import Continuation, Guide, Proposer, continued
from runner.errors import NumericsError
from runner.ops.memory import Memory
from runner.ops.owner import OWNER

T = TypeVar("T")

ALONE = 32
"""Tokens of a prompt from which its last one is read by itself, where that saves layers for the others: reading it so
costs a pass over all weights."""

SETTLED_EVERY = 256
"""Tokens of an answer after which freed buffers are given back, on devices where they pile up."""


@dataclass(frozen=True)
class Request:
    """A prompt to answer, checked already.

    Attributes:
        ids: the prompt.
        budget: how many tokens may be generated.
        on_prefill: called after each chunk of the prompt with the tokens done and the tokens in all.
        cancelled: asked before each chunk of the prompt; true ends it with `Cancelled`.
        guide: says which tokens may come next; None: all may.
        proposer: makes what guesses tokens ahead, a job of the owner's thread; None: nothing does.
    """

    ids: list[int]
    params: SamplingParams
    budget: int
    on_prefill: Callable[[int, int], None] | None = None
    cancelled: Callable[[], bool] | None = None
    guide: Guide | None = None
    proposer: Callable[[], Proposer] | None = None


class Run:
    """A request on an engine: iterate over its tokens, with None after each part of the prompt that more follows.

    `reused` is known once the iteration has begun.

    Whatever touches the device is a job of its owner's thread, and a job holds whole passes: an exception that
    interrupts the iterating thread finds every layer at the same offset. The callbacks are called on that thread.
    """

    def __init__(self, engine: Loaded, kept: PromptCache, request: Request) -> None:
        self.engine = engine
        self.active = False  # whether it uses the prompt cache
        self.reused = 0
        self.memory = Memory(engine.device.clears)
        self.budget = request.budget
        self._kept = kept
        self._request = request
        # Adapters as they are weighted now, whatever `set_adapters` does while the answer is under way.
        self._weights = engine.adapter_weights

    def __iter__(self) -> Iterator[Token | None]:
        """Yield the tokens, and None wherever a job has ended and no token came of it.

        Raises:
            UsageError: the prompt cache is in use by another answer.
            NumericsError: the logits are NaN or infinite.
            Cancelled: the request says so while its prompt is read.
        """
        self.active = True
        try:
            self.engine.run(self._begin)
            ids, made = self._request.ids, 0
            course = self._job(lambda: self._course(ids))
            while made < self._request.budget:
                # Once, as a rule; again where RoPE's frequencies change at a length (LongRoPE): keys of the two sides
                # do not go together, so that all is read anew, as transformers does.
                reused = self._job(functools.partial(self._kept.reuse, ids, self._weights))
                self.reused = self.reused if made else reused
                logits = yield from self._prefill(ids, reused, course, self._request.on_prefill if not made else None)
                border, count = self.engine.config.rope_border, self._request.budget - made
                if border is not None and len(ids) <= border:
                    count = min(count, border - len(ids) + 1)
                ids = list(ids)
                for token in self._decode(logits, course, count, len(ids)):
                    ids.append(token.id)
                    made += 1
                    self._kept.add(token.id)
                    yield token
        finally:
            # First of all: an exception that hits the rest of the ending must not leave the cache lent for good.
            self.active = False
            self.engine.unwire(self)

    def _begin(self) -> None:
        self._kept.lend(self)
        self.engine.wire(self, len(self._request.ids) + self._request.budget)

    def _prefill(
        self,
        ids: Sequence[int],
        held: int,
        course: Continuation,
        on_progress: Callable[[int, int], None] | None,
    ) -> Generator[None, None, mx.array]:
        """Read the ids behind the first `held`, yielding after each chunk, and return the logits that follow."""
        cuts = self._kept.cuts()
        chunk = self.engine.device.chunk
        # Layers without keys leave nothing for later tokens: only the last one, whose logits are wanted, passes them.
        last = {len(ids) - 1} if len(ids) - held > ALONE and self.engine.shares_keys else set()
        show = course.saw if course.watched else None
        passes = prefill_passes(
            self.engine.model, ids[held:], self._kept.caches, chunk=chunk, cuts=cuts | last, show=show
        )

        def step() -> tuple[int, mx.array | None]:
            done, logits = next(passes)
            if held + done in cuts:
                self._kept.mark()
            if logits is None:
                self.memory.settle()
            return done, logits

        while True:
            if self._request.cancelled is not None and self._request.cancelled():
                raise Cancelled
            done, logits = self._job(step)
            if on_progress is not None:
                on_progress(done, len(ids) - held)
            if logits is not None:
                return logits
            yield

    def _decode(self, logits: mx.array, course: Continuation, count: int, position: int) -> Iterator[Token]:
        """Yield up to `count` tokens, the first of them at `position` of the sequence."""
        steps = self._steps(logits, course, count)
        made = 0

        def step() -> list[Token]:
            if made % SETTLED_EVERY == SETTLED_EVERY - 1:
                self.memory.settle()
            return next(steps)

        try:
            while made < count:
                tokens = self._job(step)
                made += len(tokens)
                yield from tokens
        except NumericsError as error:
            kind = str(logits.dtype).removeprefix("mlx.core.")
            raise NumericsError(
                f"no token can be picked at position {position + made}: the logits hold {error} ({kind}); "
                "weights or activations are out of the range of their type (dtype='float32' may help), "
                "or a bias or penalty is too large"
            ) from None
        finally:
            # By the owner, and before any later job of it: the device may be ahead of what was read.
            OWNER.post(steps.close)

    def _steps(self, logits: mx.array, course: Continuation, count: int) -> Generator[list[Token], None, None]:
        model, caches, ops = self.engine.model, self._kept.caches, self.engine.device.ops
        sampler = Sampler(ops)
        if not course.plain:
            yield from continued(model, logits, caches, sampler, course, count, ops)
            return

        def sample(row: mx.array) -> Sampled:
            return sampler(row[None], [course.state])

        compiled = self.engine.compiled
        if compiled.refused is None:
            # The first token comes of the prompt's logits: it does not wait for a kernel that must be made first.
            (token,) = sample(logits).read([course.state])
            yield [_picked(token)]
            count -= 1
            try:
                if compiled.prepare():
                    following = compiled.decode(caches, _picked(token), count, course.state)
                    for token in following:
                        count -= 1
                        yield [_picked(token)]
                    return
            except Broken:
                # What came before is right, caches included: operations go on behind it.
                sampler = Sampler(ops)
            if not count:
                return
            logits = Steps(model, caches, ops)(mx.array([[_picked(token).id]], mx.int32))[0]
        for picked in decode(model, logits, caches, sample, count, ops):
            (token,) = picked.read([course.state])
            yield [_picked(token)]

    def _course(self, ids: Sequence[int]) -> Continuation:
        request = self._request
        state = SamplingState(request.params, self.engine.config.vocab_size, ids)
        single = self.engine.config.rope_depends_on_length
        proposer = None if single or request.proposer is None else request.proposer()
        return Continuation(state, ids, guide=request.guide, proposer=proposer, single=single)

    def _job(self, work: Callable[[], T]) -> T:
        """Do `work` on the owner's thread with this answer's adapters; if it fails, the caches are emptied."""

        def job() -> T:
            self.engine.use_adapters(self._weights)
            return self._kept.whole(work)

        return self.engine.run(job)


def _picked(token: Token | NumericsError) -> Token:
    if isinstance(token, NumericsError):
        raise token
    return token
