"""Decoding with kernels for whole steps, where there are some for the model, the device and the answer's options.

One sequence's steps are one kernel. Those of several sequences, and of a mixture of experts, are a graph of kernels.
"""

from __future__ import annotations

from collections.abc import Generator, MutableMapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast
from weakref import WeakKeyDictionary

import mlx.core as mx

from runner.cache.caches import Caches
from runner.cache.several import Memories, SeveralCaches
from runner.engine.chance import chance
from runner.engine.replay import Steps
from runner.engine.sampler import Sampler, SamplingState, Token
from runner.engine.sampling import SMALLEST
from runner.errors import BackendError, NumericsError, RunOver
from runner.ops.cuda.shape import Unfit
from runner.ops.owner import OWNER

if TYPE_CHECKING:
    from runner.engine.part import Part
    from runner.engine.step_shape import ReadModel
    from runner.ops.cuda.decoder import Picking, StepDecoder
    from runner.ops.cuda.rows_decoder import Bound, RowsDecoder, RowsStep


class Place(NamedTuple):
    """Where the rows of a sequence lie, for the kernels, and up to which offset they have room there.

    Attributes:
        moves: those of the caches when that was found out.
    """

    bound: Bound
    limit: int
    moves: int


Known = MutableMapping[Caches, Place]
"""The places of sequences that only kernels have moved on since they were found."""

ROOM = 256
"""Tokens that caches are given room for at once: the GPU waits while they grow."""


class Broken(Exception):
    """The kernel failed, or there is none for these caches; what was yielded before is right, caches included."""


class Compiled:
    """A loaded model's kernels, made when they are first wanted, or the reasons why there are none.

    Attributes:
        refused: why no kernel takes one sequence through its steps; None as long as nothing speaks against it.
        refused_rows: the same of several sequences.
    """

    def __init__(self, model: object, dtype: mx.Dtype, refused: str | None, part: Part | None = None) -> None:
        """`refused` says why none is to be made at all; of the model, `part` may be one of several processes'."""
        self.part = part
        self._model: object | None = model
        self._dtype = dtype
        self._decoder: StepDecoder | None = None
        self._rows: RowsDecoder | None = None
        self._busy = False
        self._single = part is None  # whether one kernel for a whole step may be made, or was
        self.holder: object | None = None  # a mark of whose caches the kernel knows
        self.refused = self.refused_rows = refused

    @property
    def way(self) -> str:
        """How decode steps are computed, in words."""
        if self.refused is not None:
            return f"operations ({self.refused})"
        return "one kernel a step" if self._single else "a graph of kernels a step"

    def prepare(self) -> bool:
        """Make the kernel, unless that was tried before, and say whether it is free. A job of the owner's thread."""
        if self._decoder is None and self._single and self.refused is None:
            from runner.ops.cuda.decoder import StepDecoder  # not where models are computed with operations

            try:
                found = self._read()
                self._decoder = StepDecoder(found.shape, found.tensors)
            except (Unfit, BackendError) as error:
                self._single = False
                if self.rows() is None:
                    self.refused = _reason(error)
        if not self._single and self.refused is None and self.rows() is None:
            self.refused = self.refused_rows
        return (self._decoder is not None or self._rows is not None) and self.refused is None and not self._busy

    def rows(self) -> RowsDecoder | None:
        """The kernels for several sequences, made unless that was tried before; None: there are none."""
        if self._rows is None and self.refused_rows is None:
            from runner.ops.cuda.rows_decoder import RowsDecoder

            try:
                found = self._read()
                self._rows = RowsDecoder(found.shape, found.tensors)
            except (Unfit, BackendError) as error:
                self.refused_rows = _reason(error)
        return self._rows

    def connect(self) -> None:
        """Connect this process's kernels with those of the others, at the same time in all of them.

        Where one has none, none has: `refused_rows` says why. A job of the owner's thread.

        Raises:
            BackendError: they cannot be connected, which is the end of the run.
        """
        assert self.part is not None and OWNER.here
        exchange, rows = self.part.exchange, self.rows()
        if exchange.agreed(rows is not None) and rows is not None:
            rows.connect(exchange)
            try:
                rows.check()
                rows.ready(1)  # to be told of a step that cannot be compiled is too late
            except BackendError as error:
                self.refused_rows = str(error)
            if exchange.agreed(self.refused_rows is None):
                return
        self._rows, self.refused_rows = None, self.refused_rows or "another process has no kernels"
        if rows is not None:
            rows.close()

    def rest(self) -> None:
        """Wait until the steps of all processes have ended: what MLX exchanges must not come between theirs."""
        if self.part is not None and self._rows is not None:
            self._rows.settle()

    def _read(self) -> ReadModel:
        from runner.engine import step_shape

        ranks = 1 if self.part is None else self.part.exchange.size
        return step_shape.read(self._model, self._dtype, ranks)

    @property
    def decoder(self) -> StepDecoder:
        """The kernel, where there is one for a whole step."""
        assert self._decoder is not None
        return self._decoder

    @property
    def whole(self) -> bool:
        """Whether `prepare` has made one kernel for a whole step."""
        return self._decoder is not None

    def give_up(self, error: Exception) -> None:
        """Use the kernel no more, if it failed, or not for these caches."""
        self.holder = None
        if isinstance(error, BackendError):
            self._decoder, self.refused = None, str(error)

    def give_up_rows(self, error: Exception) -> None:
        """Use the kernels for several sequences no more, if they failed, or not for these caches."""
        if isinstance(error, BackendError):
            self._rows, self.refused_rows = None, str(error)
            if not self._single:
                self.refused = self.refused_rows

    def close(self) -> None:
        """Give the kernel's memory back, and let go of the model. A job of the owner's thread."""
        self._model = None
        self.refused, self.refused_rows = self.refused or "it was closed", self.refused_rows or "it was closed"
        decoder, self._decoder = self._decoder, None
        rows, self._rows = self._rows, None
        if decoder is not None:
            decoder.close()
        if rows is not None:
            rows.close()

    def decode(
        self, caches: Caches, token: int | Token, count: int, state: SamplingState | None
    ) -> Generator[Token | NumericsError]:
        """Yield up to `count` tokens that follow `token`, after a `prepare` that returned True.

        Args:
            caches: what came before `token`. They end before the last token that was yielded.
            state: what sampling knows, its position that of the token after `token`; None: greedy.

        Raises:
            Broken: operations must compute what is missing, from `caches` and the last token on.
        """
        if count < 1:
            return
        decoder, made = self._decoder, 0
        if decoder is None and self._rows is not None:
            yield from self._by_rows(caches, token if isinstance(token, int) else token.id, count, state)
            return
        if decoder is None or self._busy:
            raise Broken
        self._busy, self.holder = True, None
        last = token if isinstance(token, int) else token.id
        session: _Session | None = None
        try:
            decoder.refresh()
            session = _Session(decoder, caches, state)
            while made < count:
                if self._decoder is not decoder:  # somebody has closed the model
                    raise Broken
                found = (session.next if session.picking is not None else session.alone)(last, count - made)
                made += 1
                if isinstance(found, Token):
                    last = found.id
                yield found
        except Unfit as error:
            raise Broken from error
        except BackendError as error:
            self.give_up(error)
            raise Broken from error
        finally:
            if session is not None:
                session.count()
            if self._decoder is not None:
                decoder.finish()
            self._busy = False

    def _by_rows(
        self, caches: Caches, last: int, count: int, state: SamplingState | None
    ) -> Generator[Token | NumericsError]:
        """`decode` by the kernels for several sequences, whose logits operations pick from."""
        steps, sampler = RowSteps(self, caches, None), Sampler()
        for _ in range(count):
            found: Token | NumericsError
            before = caches.offset
            try:
                if state is None or greatest(state):
                    (found,) = self.likeliest(steps.begin([last]))
                    if state is not None:
                        state.position += 1
                else:
                    (found,) = sampler(steps(mx.array([[last]], mx.int32)), [state]).read([state])
            except Broken:
                if caches.offset > before:  # its token was counted when the step was begun
                    caches.rewind(caches.reach(before))
                raise
            if isinstance(found, Token):
                last = found.id
            yield found

    def likeliest(self, step: RowsStep) -> list[Token | NumericsError]:
        """Each row's most likely token, once the step has ended, or why none can be picked: the kernels find it.

        Raises:
            Broken: the step has failed.
        """
        from runner.ops.cuda.decoder import problem

        try:
            best = step.best
        except BackendError as error:
            raise self.failed(error) from error
        found = [(token, problem(peak)) for token, peak in best]
        return [Token(token) if why is None else NumericsError(why) for token, why in found]

    def row_logits(self, step: RowsStep) -> mx.array:
        """Logits `[R, V]` float32 of a step, once it has ended; to be computed before the next one is begun.

        Raises:
            Broken: the step has failed.
        """
        try:
            return step.logits
        except BackendError as error:
            raise self.failed(error) from error

    def failed(self, error: BackendError) -> Exception:
        """What to raise where a step that was begun has failed: where other processes wait in it, all is lost."""
        self.give_up_rows(error)
        return Broken() if self.part is None else RunOver(f"a step of several processes has failed: {error}")


class RowSteps:
    """What `Steps` does, by kernels where there are some: tokens `[1, R]` to logits `[R, V]`, a token of each sequence.

    What a sequence gets does not depend on the others. Caches may change between two calls only by these calls.
    """

    def __init__(self, compiled: Compiled, caches: Memories, steps: Steps | None, known: Known | None = None) -> None:
        """Begin with caches that hold a token each.

        Args:
            steps: computes with operations, where there are no kernels; None: that is an error, `Broken`.
            known: where caches lie that only kernels have moved since; it is added to.
        """
        self._compiled = compiled
        self._caches = caches
        self._each: tuple[Caches, ...] = caches.each if isinstance(caches, SeveralCaches) else (caches,)
        self._steps = steps
        self._bound: Known = WeakKeyDictionary() if known is None else known
        self._found = False  # whether the kernels know where the weights lie

    def __call__(self, token: mx.array) -> mx.array:
        known = cast(list[int], token.reshape(-1).tolist())
        try:
            return self._compiled.row_logits(self.begin(known))
        except Broken:
            if self._steps is None:
                raise
        return self._steps(token)

    def begin(self, tokens: Sequence[int]) -> RowsStep:
        """Begin a step by kernels, as `RowsDecoder.begin`; the caches count its tokens from now on.

        Until it has ended, nobody else may touch them.

        Raises:
            Broken: the kernels cannot, now or ever.
            BackendError: they have failed, and other processes with them.
        """
        from runner.ops.cuda.rows_shape import MOST_ROWS

        decoder = self._compiled.rows() if len(self._each) <= MOST_ROWS else None
        if decoder is not None:
            try:
                bound = self._ready(decoder, len(tokens))
            except (Unfit, BackendError) as error:
                self._compiled.give_up_rows(error)
            else:
                try:
                    return self._begun(decoder, tokens, bound)
                except BackendError as error:
                    self._forget()
                    raise self._compiled.failed(error) from error
        self._forget()
        raise Broken

    def _forget(self) -> None:
        for one in self._each:
            self._bound.pop(one, None)

    def _ready(self, decoder: RowsDecoder, count: int) -> list[Bound]:
        """Where the caches lie, once all is there that a step takes."""
        mx.synchronize()  # whoever reads the last step's logits has done so
        if not self._found:
            decoder.refresh()
            self._found = True
        moved = []
        for one in self._each:
            place = self._bound.get(one)
            if place is None or place.limit <= one.offset or place.moves != one.moves:
                moved.append(one)
        self._bind(decoder, moved)
        decoder.ready(count)
        return [self._bound[one].bound for one in self._each]

    def _begun(self, decoder: RowsDecoder, tokens: Sequence[int], bound: Sequence[Bound]) -> RowsStep:
        if self._compiled.part is not None:
            self._compiled.part.step(self._each, tokens)
        step = decoder.begin(tokens, [one.offset for one in self._each], bound)
        self._caches.advance()
        return step

    def _bind(self, decoder: RowsDecoder, which: Sequence[Caches]) -> None:
        from runner.engine.step_shape import rows_of

        if not which:
            return
        decoder.settle()  # a step under way writes where they lie now
        for one in which:
            if not one.room:  # to grow the caches of 32 rows takes as long as some 20 steps
                one.make_room(ROOM)
        for one, bound in zip(which, decoder.bound([rows_of(one) for one in which]), strict=True):
            self._bound[one] = Place(bound, one.offset + one.room, one.moves)


class SingleSteps:
    """What `Steps` does for one sequence, by the kernel where it is free: a step at a time, logits for operations.

    Each call maps tokens `[1, 1]` to logits `[1, V]` and appends keys and values to the caches. They may change between
    two calls only by these calls.
    """

    def __init__(self, compiled: Compiled, caches: Caches, steps: Steps) -> None:
        self._compiled = compiled
        self._caches = caches
        self._steps = steps  # by operations
        self._mark = object()
        self._moves = 0  # those of the caches when the kernel was told of their rows

    def __call__(self, token: mx.array) -> mx.array:
        if token.size == 1 and self._compiled.prepare() and self._compiled.whole:
            try:
                return self._logits(token)
            except (Unfit, BackendError) as error:
                self._compiled.give_up(error)
        self._compiled.holder = None  # operations may put the rows elsewhere
        return self._steps(token)

    def _logits(self, token: mx.array) -> mx.array:
        from runner.engine.step_shape import rows_of
        from runner.ops.cuda.decoder import GREEDY

        compiled, caches = self._compiled, self._caches
        decoder = compiled.decoder
        (known,) = cast(list[int], token.reshape(-1).tolist())
        mx.synchronize()  # whoever reads the last step's logits has done so
        if compiled.holder is not self._mark or not caches.room or caches.moves != self._moves:
            compiled.holder = None
            caches.make_room(1)
            self._moves = caches.moves
            decoder.refresh()
            decoder.bind(rows_of(caches))
            compiled.holder = self._mark
        decoder.launch(1, caches.offset, known, GREEDY, (), keep=True)
        decoder.read()
        decoder.settle()
        caches.advance()
        return decoder.logits[None]


class _Session:
    """One answer's use of the kernel.

    Attributes:
        picking: how the kernel picks this answer's tokens; None where operations do, from its logits.
    """

    def __init__(self, decoder: StepDecoder, caches: Caches, state: SamplingState | None) -> None:
        self._decoder = decoder
        self._caches = caches
        self._state = state
        self._sampler = Sampler()
        self._bound = False  # whether the kernel knows the buffers of the caches
        self._made: list[int] = []  # tokens that it has picked, and that were read, since the state has counted any
        self.picking = _picking(state, decoder.division.blocks)

    def count(self) -> None:
        """Let the state count what the kernel has picked, as far as it was read: the kernel is ahead of that."""
        if self._state is not None and self._state.seen is not None and self._made:
            self._state.seen.count(self._made)
            self._state.counted += len(self._made)
        self._made = []

    def next(self, token: int, wanted: int) -> Token | NumericsError:
        """The token after `token`, picked by the kernel, which is given up to `wanted` steps."""
        decoder, picking = self._decoder, self.picking
        assert picking is not None
        start = None if self._bound else token
        if not self._bound:
            self._bind(min(wanted, ROOM))
        # Keep the GPU busy: launches are given to it before the ones under way have ended.
        while decoder.pending < min(wanted, self._caches.room) and decoder.queued:
            ahead = decoder.pending
            steps = min(decoder.ahead, wanted - ahead, self._caches.room - ahead)
            position = self._caches.offset + ahead
            decoder.launch(steps, position, start, picking, self._chances(ahead, steps), keep=False)
            start = None
        said = decoder.read()
        self._caches.advance()
        if said.unresolved or not self._caches.room:
            decoder.finish()
            self._bound = False
        if said.unresolved:
            return self._sampled()
        if self._state is not None:
            self._state.position += 1
        if said.problem is not None:
            return NumericsError(said.problem)
        self._made.append(said.token)
        return Token(said.token)

    def alone(self, token: int, wanted: int) -> Token | NumericsError:
        """The token after `token`, picked by operations from the logits of one step."""
        from runner.ops.cuda.decoder import GREEDY

        decoder = self._decoder
        if not self._bound or not self._caches.room:
            decoder.finish()
            self._bind(min(wanted, ROOM))
        decoder.launch(1, self._caches.offset, token, GREEDY, (), keep=True)
        decoder.read()
        self._caches.advance()
        decoder.settle()
        return self._sampled()

    def _sampled(self) -> Token | NumericsError:
        assert self._state is not None
        self.count()
        (found,) = self._sampler(self._decoder.logits[None], [self._state]).read([self._state])
        if self.picking is not None:  # with the counts that operations have made anew
            self.picking = _picking(self._state, self._decoder.division.blocks)
        return found

    def _bind(self, count: int) -> None:
        from runner.engine.step_shape import rows_of

        self._caches.make_room(count)
        self._decoder.bind(rows_of(self._caches))
        self._bound = True

    def _chances(self, first: int, steps: int) -> list[float]:
        state = self._state
        if state is None or state.params.temperature < SMALLEST:
            return []
        return [chance(state.seed, state.choice, state.position + first + index) for index in range(steps)]


def greatest(state: SamplingState) -> bool:
    """Whether a sequence's tokens are those of the greatest logits, whatever else is asked for."""
    params = state.params
    plain = state.allowed is None and state.seen is None and state.bias is None
    return params.temperature < SMALLEST and params.logprobs is None and plain


def _reason(error: Exception) -> str:
    return f"the model has {error}" if isinstance(error, Unfit) else str(error)


def _picking(state: SamplingState | None, blocks: int) -> Picking | None:
    """How the kernel picks tokens for this answer; None where it cannot, and gives logits instead."""
    from runner.ops.cuda.decoder import GREEDY, Picking

    if state is None:
        return GREEDY
    params = state.params
    greedy = params.temperature < SMALLEST
    few = greedy or params.top_k <= blocks  # of which the blocks' maxima bound the last
    if params.logprobs is not None or state.allowed is not None or not few:
        return None
    counts = None
    if state.seen is not None:
        if params.penalty_window or state.seen.counts.shape[0] != 1:
            return None
        counts = (
            mx.contiguous(state.seen.counts) * 1
        )  # a copy: the kernel counts on in place, tokens that nobody reads too
    return Picking(
        0.0 if greedy else params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        counts,
        state.bias,
    )
