"""One answer under way: its tokens, how many of them its caches hold, and what it puts into the next pass."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner.cache.caches import Caches
from runner.engine.compiled import RowSteps, SingleSteps
from runner.engine.prefix_tree import Kept
from runner.engine.replay import Steps
from runner.engine.sampler import Token
from runner.engine.speculation import Continuation
from runner.engine.ticket import Ended, Mailbox, Order, Progress
from runner.errors import NumericsError

if TYPE_CHECKING:
    from runner.engine.passes import Flight

AnySteps = Steps | SingleSteps | RowSteps
"""What takes sequences through their decode steps."""

NUMBERS = itertools.count()
"""The order in which requests came."""


@dataclass(frozen=True)
class Feed:
    """What a row puts into a pass: ids, or (None) the token that was picked last, which need not be known yet.

    Attributes:
        length: as `Segment.length`.
        picks: by how many of the last rows of logits a token is picked: 0 within a prompt, 1 behind it and in an
            answer, more where guesses are read along.
    """

    ids: list[int] | None
    length: int | None
    picks: int

    @property
    def count(self) -> int:
        """Tokens of the pass."""
        return 1 if self.ids is None else len(self.ids)


class Row:
    """A request while the scheduler has it.

    Attributes:
        ids: prompt and answer, as far as they were read from the device.
        prompt: how many of them are read as a prompt: frequencies of RoPE that depend on the length are those of all.
        picked: tokens of the answer that were picked, those that nobody has read yet included.
        caches: None while it waits.
        kept: what `Prefixes` lent them as; None where nothing is shared.
        course: how its tokens are picked; None before its first turn.
        steps: its decode steps while it is alone; None after a pass with others.
        flight: the pass that picked its last token, and at which place among those that it picked; None: that token is
            read like a prompt's.
        session: its tokens by a kernel for whole steps, while it is alone; the last one of them is read already.
        broken: whether that has failed, so that operations compute the rest.
        done: whether the caller was told of its end.
    """

    def __init__(self, order: Order, mailbox: Mailbox) -> None:
        self.order = order
        self.mailbox = mailbox
        self.number = next(NUMBERS)
        self.ids = list(order.ids)
        self.prompt = len(order.ids)
        self.picked = 0
        self.caches: Caches | None = None
        self.kept: Kept | None = None
        self.course: Continuation | None = None
        self.steps: AnySteps | None = None
        self.flight: tuple[Flight, int] | None = None
        self.session: Generator[Token | NumericsError] | None = None
        self.broken = False
        self.done = False

    def __repr__(self) -> str:
        return f"Row({self.number}, {len(self.ids)} tokens, {self.offset} held)"

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: the smallest."""
        return (-self.order.priority, self.number)

    @property
    def offset(self) -> int:
        """Tokens that the caches hold."""
        return 0 if self.caches is None else self.caches.offset

    @property
    def nbytes(self) -> int:
        """Bytes of its caches, and of those of what guesses for it."""
        proposer = None if self.course is None else self.course.proposer
        beside = 0 if proposer is None else proposer.nbytes
        return beside + (0 if self.caches is None else self.caches.nbytes)

    @property
    def length(self) -> int:
        """Tokens of prompt and answer, those that nobody has read yet included."""
        return len(self.order.ids) + self.picked

    @property
    def unread(self) -> int:
        """Tokens that were picked, and that nobody has read from the device."""
        return self.length - len(self.ids)

    @property
    def reading(self) -> bool:
        """Whether more than the token that was picked last is to be read: a prompt, as a rule."""
        return self.offset < self.length - (self.flight is not None or self.session is not None)

    @property
    def finished(self) -> bool:
        """Whether all that may be picked was picked."""
        return self.done or (self.picked >= self.order.budget and not (self.reading and not self.picked))

    def begin(self, caches: Caches) -> None:
        """Take up `caches`, which hold the beginning of the ids."""
        self.caches = caches

    def end_session(self) -> None:
        """Leave the kernel: it computes no further ahead, and the last token is read like a prompt's."""
        session, self.session = self.session, None
        if session is not None:
            session.close()

    def rest(self) -> None:
        """Wait until nobody computes with the caches any more but MLX, in its order: kernels write on by themselves."""
        self.end_session()
        if self.flight is not None:
            self.flight[0].rest()

    def leave(self) -> None:
        """Let go of the caches: what they hold is read again, if the row goes on."""
        self.rest()
        if self.course is not None and self.course.proposer is not None:
            self.course.proposer.rest()
        self.caches, self.steps, self.flight = None, None, None

    def anew(self) -> None:
        """Let go of the caches, and read all there is as a prompt."""
        self.leave()
        self.prompt = len(self.ids)

    def feed(self, count: int, *, exact: bool) -> Feed:
        """The next known tokens, `count` at most; where the caches hold all but it, the token picked last.

        Args:
            exact: whether frequencies depend on the length: tokens of an answer that is read again go one by one then.
        """
        if not self.reading:
            return Feed(None, None, picks=1)
        start = self.offset
        prompt = start < self.prompt
        end = min(start + count, len(self.ids))
        if exact:
            end = min(end, self.prompt if prompt else start + 1)
        picks = end == len(self.ids) and self.picked < self.order.budget
        return Feed(self.ids[start:end], self.prompt if prompt else None, int(picks))

    def guessed(self) -> Feed:
        """The last token, which is known, and the guesses behind it."""
        assert self.course is not None and self.caches is not None
        drafts = self.course.plan(self.order.budget - self.picked - 1)
        if not drafts:
            return Feed(None, None, picks=1)
        self.caches.reserve(1 + len(drafts))
        return Feed([self.ids[-1], *drafts], None, picks=1 + len(drafts))

    def take(self, token: Token) -> None:
        """Add a token of the answer, which was read from the device."""
        self.ids.append(token.id)
        self.mailbox.put(token)

    def lose(self, fed: int) -> None:
        """Go on without the token that a kernel has failed to pick, and the `fed` ones that it was given for that."""
        self.end_session()
        self.picked, self.broken = self.picked - 1, True
        if fed and self.caches is not None:
            self.caches.rewind(self.caches.reach(self.caches.offset - fed))
            self.flight = None

    def settle(self, flight: Flight, place: int, right: int, fed: int) -> None:
        """Keep the first `right` of the `fed` tokens of a pass with guesses, and go back behind them.

        The last right one was picked at `place` of the pass `flight`.
        """
        assert self.caches is not None
        self.picked += right - 1
        wanted = self.caches.offset - fed + right
        reached = self.caches.reach(wanted)
        self.caches.rewind(reached)
        # Where the caches cannot be there, what they lack is read again.
        self.flight = (flight, place) if reached == wanted else None

    def progressed(self) -> None:
        """Tell how much of the prompt is read."""
        total = len(self.order.ids) - self.mailbox.reused
        done = min(self.offset, len(self.order.ids)) - self.mailbox.reused
        if done > self.mailbox.read:
            self.mailbox.read = done
            self.mailbox.put(Progress(done, total))

    def end(self, reason: str, error: BaseException | None = None) -> None:
        """Tell the caller, once, that this is the end."""
        if not self.done:
            self.done = True
            self.mailbox.put(Ended(reason, error))
