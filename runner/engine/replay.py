"""Decode steps: the graph of a step is built in Python for each token or, where the device can record it, replayed.

For a small model, building and scheduling its roughly 500 operations takes a quarter as long as computing them. As long
as the buffers of the KV caches have room, the steps of different tokens differ only in positions. So a step is built
for the next position, the one after it, one in the middle and the last that there is room for, and is recorded if these
graphs differ in nothing but positions that advance with the token. A model that looks at its token, or that decides by
its position within that range, gives graphs that differ in more, and is built anew for each token (the tests compare
every position, for every family).

What was found so is kept for a model: between positions that were compared once, another request's step, or that of as
many others, is built once over its own caches, must be the same operation by operation, and is recorded at once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator

import mlx.core as mx

from runner.cache.several import Memories, SeveralCaches
from runner.errors import RunnerError
from runner.families import Model
from runner.nn.batch import Batch, Segment
from runner.ops.table import Ops, Outline, Program, Recorder

PATIENCE = 8
"""Steps that are built before one is compared and recorded: a short answer would not win back the cost of that."""

LEAST = 32
"""Steps that a recording must be valid for: comparing costs as much as building four steps."""

ROOM = 128
"""Steps that there is to be room for in the caches of several requests: as much as in those of one, in the mean."""

OUTLINES = 16
"""Outlines that are kept for one kind of step, each for positions at which it is another step."""

KINDS = 128
"""Kinds of steps of which outlines are kept: numbers of requests, and what adapters each has."""


Kind = tuple[bool, tuple[int, ...], Hashable]
"""Whether requests are side by side, the shape of their tokens, and the adapters of each."""

Span = tuple[int, int]
"""Positions from a first one to a last one."""


class Spans:
    """Spans of positions between which a step was compared, apart from each other."""

    def __init__(self) -> None:
        self._spans: list[Span] = []

    def add(self, span: Span) -> None:
        """Join a span with those that have a position in common with it: nothing was compared across a mere border.

        All of them are of one outline, by which what advances does so at one pace.
        """
        apart = [one for one in self._spans if one[1] < span[0] or span[1] < one[0]]
        met = [span, *(one for one in self._spans if one not in apart)]
        self._spans = [*apart, (min(first for first, _ in met), max(last for _, last in met))]

    def join(self, others: Spans) -> None:
        """Add those of another."""
        for span in others:
            self.add(span)

    def __iter__(self) -> Iterator[Span]:
        return iter(list(self._spans))

    def meets(self, others: Spans) -> bool:
        """Whether one has a position in common with one of the others."""
        return any(first <= span[1] and span[0] <= last for first, last in self._spans for span in others)

    def __contains__(self, span: Span) -> bool:
        return any(first <= span[0] and span[1] <= last for first, last in self._spans)


class Recordings:
    """What is known of a model's decode steps, for each kind of them: their outlines, and between which positions each
    holds for any of the requests."""

    def __init__(self) -> None:
        self._known: dict[Hashable, list[tuple[Outline, Spans]]] = {}

    def __contains__(self, kind: Hashable) -> bool:
        return kind in self._known

    def find(self, kind: Hashable, spans: Iterable[Span]) -> Outline | None:
        """The outline of a step of this kind that holds for requests at these positions, if there is one."""
        wanted = list(spans)
        if kind in self._known:
            self._known[kind] = self._known.pop(kind)  # the last one to be forgotten
        holding = (outline for outline, known in self._known.get(kind, ()) if all(span in known for span in wanted))
        return next(holding, None)

    def add(self, kind: Hashable, outline: Outline, spans: Iterable[Span]) -> None:
        """Keep the outline of a step that was compared for requests at these positions.

        It holds for those of older ones of the same step, too. A program moves all of a step on by its outline's paces,
        whichever request it belongs to: where these differ, the older one stays, unless both were compared at one
        position, which speaks for the new one. Past `OUTLINES` the oldest goes.
        """
        new, known = Spans(), Spans()
        for span in spans:
            new.add(span)
        known.join(new)
        apart: list[tuple[Outline, Spans]] = []
        for older in self._known.pop(kind, ()):
            if outline.same_as(older[0]):
                known.join(older[1])
            elif not older[1].meets(new):
                apart.append(older)
        self._known[kind] = [*apart, (outline, known)][-OUTLINES:]
        while len(self._known) > KINDS:
            del self._known[next(iter(self._known))]

    def drop(self, kind: Hashable) -> None:
        """Forget what is known of a kind of step: the model computes something else now."""
        self._known.pop(kind, None)

    def clear(self) -> None:
        """Let go of the model's weights."""
        self._known.clear()


class Steps:
    """Runs decode steps: each call maps tokens `[B, 1]` to logits `[B, V]` and appends keys and values to `caches`.

    With the caches of several requests, it maps `[1, R]`, a token of each, to logits `[R, V]`.
    """

    def __init__(
        self,
        model: Model,
        caches: Memories,
        ops: Ops,
        recordings: Recordings | None = None,
        adapters: Hashable = None,
    ) -> None:
        """Begin with caches that hold a token each.

        Args:
            recordings: what is known of the model's steps; None: nothing, and nobody else will ask.
            adapters: by which adapters each token is computed, now and as long as these steps are taken.
        """
        self._model = model
        self._caches = caches
        self._schedule = ops.schedule
        self._recorder = ops.recorder
        self._recordings = Recordings() if recordings is None else recordings
        self._adapters = adapters
        self._program: Program | None = None
        self._left = 0  # steps that the program is still valid for
        self._built = 0  # steps that were built in Python
        self._at = caches.offset  # where the last step left the caches

    def __call__(self, token: mx.array) -> mx.array:
        """Return the logits, lazy or already being computed; the earlier steps must have been scheduled."""
        if self._at != self._caches.offset:  # another pass has moved them since
            self.forget()
        if self._left == 0:
            self._program = self._recorded(token)
        if self._program is None:
            self._built += 1
            built = self._logits(token, self._caches)
            self._at = self._caches.offset
            return built
        # The program writes keys and values into the caches' buffers; Python only moves the offsets along.
        logits = self._program.run(token)
        self._left -= 1
        self._caches.advance()
        self._at = self._caches.offset
        return logits

    def forget(self) -> None:
        """Forget a recorded step, as a pass of another size has moved the caches on."""
        self._program, self._left, self._built = None, 0, 0

    def _logits(self, ids: mx.array, caches: Memories) -> mx.array:
        if isinstance(caches, SeveralCaches):
            batch = Batch.of(ids, [Segment(1, offset) for offset in caches.offset])
            return mx.squeeze(self._model.logits(self._model(batch, caches)), 0)
        return self._model.logits(self._model(Batch(ids, caches.offset), caches))[:, -1]

    def _recorded(self, token: mx.array) -> Program | None:
        """Record a step that is valid for as many tokens as the caches have room for; None: build this step instead."""
        if self._recorder is None or token.dtype not in (mx.int32, mx.uint32):
            return None
        kind = (isinstance(self._caches, SeveralCaches), tuple(token.shape), self._adapters)
        if self._recordings.find(kind, self._spans(1)) is not None:
            return self._again(kind, self._recorder)
        # Comparing must pay, now or for others: the answer is long enough already, or there were some, and the program
        # will serve enough steps.
        if self._built < PATIENCE and kind not in self._recordings:
            return None
        # A program addresses the buffers it was recorded with, so it lasts until the first cache needs larger ones: of
        # several the first would soon, so all get some room.
        if isinstance(self._caches, SeveralCaches):
            self._make_room(ROOM)
        room = self._caches.room
        if room < LEAST:
            return None
        # The slot stands for any token: a graph that needs the token's value cannot be built over it.
        slot = self._recorder.slot(list(token.shape))
        # Positions 0 and 1 show what advances per token, the others that it does so up to the end of the room.
        ahead = [0, 1, room // 2, room - 1]
        try:
            # Each graph is built over copies of the caches: the caches themselves must not move before a step runs.
            steps = [self._logits(slot, self._caches.ahead(count)) for count in ahead]
            program = self._recorder.record(slot, steps, ahead, self._caches.arrays)
        except (RuntimeError, RunnerError):  # the model looked at its token, or has no position as far ahead as these
            program = None
        # A model whose steps differ will differ again: do not try a second time.
        if program is None:
            self._recorder = None
        else:
            self._recordings.add(kind, program.outline, self._spans(room))
            self._left = room
        return program

    def _again(self, kind: Kind, recorder: Recorder) -> Program | None:
        """Record a step that was compared for others before, which costs no more than to build it; None: it is another
        one now."""
        if self._caches.room < 1:
            self._make_room(LEAST)
        room, outline = self._caches.room, None
        while room > 0 and (outline := self._recordings.find(kind, self._spans(room))) is None:
            room //= 2  # what is known may end before the buffers do
        if outline is None:
            return None
        slot = recorder.slot(list(kind[1]))
        try:
            program = outline.record(slot, self._logits(slot, self._caches.ahead(0)), self._caches.arrays, room)
        except (RuntimeError, RunnerError):  # it looks at its token now
            program = None
        if program is None:
            self._recordings.drop(kind)
        else:
            self._left = room
        return program

    def _make_room(self, count: int) -> None:
        """Give all caches room for `count` more tokens."""
        self._caches.make_room(count)
        # They hold what is computed from here on: of a recorded graph nothing may be held by others.
        self._schedule(*self._caches.arrays)

    def _spans(self, room: int) -> list[tuple[int, int]]:
        """Positions of each request's tokens, from the next one on, in as many steps."""
        return [(each.offset, each.offset + room - 1) for each in self._caches.each]
