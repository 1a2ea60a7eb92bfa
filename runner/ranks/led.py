"""A model and its caches as rank 0's callers see them: whatever is done with them, the other ranks do too.

Callers keep more than caches: marks to come back to, and rows that other caches begin with. Each has a number, by which
the others know theirs, until rank 0's is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import mlx.core as mx

from runner.cache.caches import Caches
from runner.cache.mark import Edge, Marks
from runner.cache.several import Memories as Given
from runner.config.memory import Rows, State
from runner.engine.part import Memories
from runner.families import Model
from runner.nn.batch import Batch
from runner.ranks.link import Message
from runner.ranks.part import flat
from runner.weights.module import Module

T = TypeVar("T")


class Voice(Protocol):
    """What the other ranks are told by."""

    def named(self, make: Callable[[int], T]) -> T: ...
    def tell(self, **message: Any) -> None: ...
    def answers(self) -> list[Message]: ...
    def passed(self, batch: Batch, caches: Given) -> Batch: ...
    def there(self, hidden: mx.array) -> mx.array: ...
    def asked(self, hidden: mx.array) -> mx.array: ...


@dataclass(repr=False)
class Led(Module):
    """A model whose other parts are elsewhere: what it is asked, the other ranks are told."""

    model: Model
    leader: Voice

    def __call__(self, batch: Batch, caches: Given) -> mx.array:
        hidden = self.model(self.leader.passed(batch, caches), caches)
        # Begun at once: the others have begun, too, and wait for what this rank sends.
        mx.async_eval(hidden)
        return self.leader.there(hidden)

    def logits(self, hidden: mx.array) -> mx.array:
        return self.model.logits(self.leader.asked(hidden))


@dataclass(frozen=True, eq=False)
class LedMarks(Marks):
    """A place that the caches of all ranks can come back to, by its number."""

    name: int


@dataclass(frozen=True, eq=False)
class LedEdge(Edge):
    """Rank 0's rows of some tokens, by the number of all ranks' rows of them."""

    name: int
    leader: Voice

    def _made(self, own: Edge, do: str, **message: Any) -> Edge:
        return led_edge(own, self.leader, do, edge=self.name, **message)

    def part(self, first: int, last: int) -> Edge:
        return self._made(super().part(first, last), "part", first=first, last=last)

    def joined(self, others: Sequence[Edge]) -> Edge:
        return self._made(super().joined(others), "joined", others=names(others))


def led_edge(own: Edge, leader: Voice, do: str, **message: Any) -> LedEdge:
    """Rank 0's `own` rows, of which the others make theirs by what `message` says."""

    def make(name: int) -> LedEdge:
        leader.tell(do=do, made=name, **message)
        return LedEdge(own.first, own.last, own.rows, name, leader)

    return leader.named(make)


def names(things: Sequence[Edge] | Sequence[Marks]) -> list[int]:
    """The numbers of rows or marks that all ranks have."""
    found = [thing.name for thing in things if isinstance(thing, LedEdge | LedMarks)]
    assert len(found) == len(things), "rows and marks of one process alone"
    return found


class LedCaches(Caches):
    """Caches of rank 0's layers; those of the other ranks go forward and back with them.

    Attributes:
        name: the number by which all ranks know theirs.
    """

    def __init__(self, own: Caches, memories: Memories, leader: Voice, name: int, *, alike: bool) -> None:
        """`memories` are those of the whole model; `alike`: each rank has all of them."""
        super().__init__(own.layers, list(own))
        self.name = name
        self._leader = leader
        every = flat(memories)
        endless = [isinstance(m, Rows) and m.window is None and m.chunk is None for m in every]
        self._forgets = any(isinstance(m, State | Rows) and not e for m, e in zip(every, endless, strict=True))
        self._endless = any(endless)
        # Where nothing is forgotten, or each rank forgets the same, all can be where this one can be.
        self._knows = alike or not self._forgets
        leader.tell(do="new", caches=name)

    def _told(self, do: str, **message: Any) -> None:
        self._leader.tell(do=do, caches=self.name, **message)

    @property
    def needs_marks(self) -> bool:
        return self._forgets

    @property
    def keeps_rows(self) -> bool:
        return self._endless

    def reserve(self, count: int) -> None:
        self._told("reserve", count=count)
        super().reserve(count)

    def mark(self) -> Marks:
        own = super().mark()

        def make(name: int) -> LedMarks:
            self._told("mark", made=name)
            return LedMarks(own.offset, own.marks, name)

        return self._leader.named(make)

    def reach(self, offset: int, marks: Sequence[Marks] = ()) -> int:
        place = super().reach(offset, marks)
        while place and not self._knows:
            self._told("reach", offset=place, marks=names(marks))
            lower = min(answer["offset"] for answer in self._leader.answers())
            if lower >= place:
                break
            place = super().reach(lower, marks)
        return place

    def rewind(self, offset: int, marks: Sequence[Marks] = ()) -> None:
        self._told("rewind", offset=offset, marks=names(marks))
        super().rewind(offset, marks)

    def clear(self) -> None:
        self._told("clear")
        super().clear()

    def rows(self, first: int, last: int) -> Edge:
        own = super().rows(first, last)
        return led_edge(own, self._leader, "rows", caches=self.name, first=first, last=last)

    def hold(self, edges: Sequence[Edge], marks: Marks | None = None) -> None:
        self._told("hold", edges=names(edges), marks=names(() if marks is None else (marks,)))
        super().hold(edges, marks)
