"""Rank 0: speaks to the user, draws the tokens, and tells the other ranks what to compute.

Whatever a command does with a model comes down to two things: calling it, and going back in its caches. Both are told
to the other ranks before they are done here, so that generation, scoring and measuring need not know of them.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import mlx.core as mx

from runner.cache.caches import Caches
from runner.cache.several import Memories as Given
from runner.cache.several import SeveralCaches
from runner.engine.budget import Footprint
from runner.engine.part import Memories, Own, Whole
from runner.errors import BackendError, RunOver, UsageError
from runner.families import Model
from runner.nn.batch import Batch
from runner.ops.device import Device
from runner.ops.exchange import CODES, Exchange
from runner.ranks.led import Led, LedCaches
from runner.ranks.link import ENDED, GONE, Link, Message
from runner.ranks.part import Held, difference, fingerprint, held, least_room, sizes, suited
from runner.ranks.passes import described
from runner.ranks.settings import PIPELINE, Settings
from runner.weights.plan import ModulePlan
from runner.weights.tags import Header

T = TypeVar("T")

PATIENCE, LONGEST_HELLO = 2.0, 4096
"""Seconds in which somebody who has connected must have said who it is, and in how many bytes at most."""

GRACE = 0.7
"""Seconds after the first sign of a failure until it is told: the rank that died is named, not those that it took down.
"""


@dataclass(frozen=True)
class Peer:
    """Another rank: where it runs, and the connection to it."""

    rank: int
    host: str
    pid: int
    link: Link

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Leader:
    """Rank 0's side of a run: a `Part` of the model, and the one that the others follow."""

    def __init__(
        self,
        settings: Settings,
        versions: Mapping[str, str],
        fail: Callable[[str], None],
        warned: Callable[[], bool] = lambda: False,
        connects: Callable[[bool], None] = lambda begins: None,
    ) -> None:
        """Wait for the other ranks.

        Args:
            versions: what must be the same in all processes, by name.
            fail: called once, on any thread, if a rank is lost: tells the user, and ends this process.
            warned: whether a process has ended already, so that there is nobody to wait for.
            connects: told before and after the call of MLX that connects all ranks, which lets no thread run.

        Raises:
            BackendError: not all came in time, or one has other versions; the message names it.
            OSError: nobody can be waited for at the address of `settings`.
        """
        self.settings = settings
        self.exchange = Exchange(0, settings.size, settings.backend, sends=settings.sends)
        self.elsewhere = 0
        self.whole: ModulePlan | None = None
        self.loaded: list[int] = []  # bytes of weights that each other rank has read
        self._ready: list[Message] = []  # what each said then
        self._rest: Callable[[], None] = lambda: None
        self._fail = fail
        self._connects = connects
        self._versions = versions
        self._losses: list[tuple[Peer, str]] = []
        self._telling = threading.Lock()
        self._closed = False
        self._held: Held | None = None
        self._fingerprint: dict[str, str] = {}
        self._named = 0  # how many caches, marks and rows there have been
        self._dropped: deque[int] = deque()  # those that are gone, of which the others have not been told yet
        self._peers: list[Peer] = []
        with socket.create_server((settings.host, settings.port), backlog=settings.size) as server:
            self._gather(server, warned)

    def _gather(self, server: socket.socket, warned: Callable[[], bool]) -> None:
        found: dict[int, Peer] = {}
        end = time.monotonic() + self.settings.wait
        while len(found) < self.settings.size - 1:
            server.settimeout(0.2)
            peer = None
            with contextlib.suppress(TimeoutError):
                connection, address = server.accept()
                peer = self._greeted(connection, str(address[0]))
            if peer is not None:
                found[peer.rank] = peer
            elif time.monotonic() > end or warned():
                missing = ", ".join(str(rank) for rank in range(1, self.settings.size) if rank not in found)
                if warned():
                    raise BackendError(f"a process has ended before all had come; missing: rank {missing}")
                raise BackendError(
                    f"rank {missing} of {self.settings.size} has not come within {self.settings.wait:.0f} seconds: "
                    "its host cannot be reached, or has no runner to start (see --wait)"
                )
        self._peers = [found[rank] for rank in sorted(found)]
        for peer in self._peers:
            peer.link.start()

    def _greeted(self, connection: socket.socket, host: str) -> Peer | None:
        """The rank that has connected; None if it is no rank of this run."""
        hello = _hello(connection)
        # The run's word first: of strangers nothing else is looked at.
        if not hmac.compare_digest(str(hello.get("token")).encode(errors="replace"), self.settings.token.encode()):
            connection.close()
            return None
        rank, pid = hello.get("rank"), hello.get("pid")
        if type(rank) is not int or type(pid) is not int or not 0 < rank < self.settings.size:
            connection.close()
            return None
        link = Link(connection, lambda reason: self._lost(peer, reason))
        peer = Peer(rank, host, pid, link)
        other = difference(self._versions, hello["versions"] if isinstance(hello.get("versions"), dict) else {})
        if other is not None:
            link.send(do="end", why=ENDED)
            raise BackendError(f"{peer}: {other}: all ranks need the same")
        return peer

    def _lost(self, peer: Peer, reason: str) -> None:
        """A rank is lost: tell so, and end. The first to go takes others with it, which are not to be blamed."""
        if self._closed:
            return
        self._losses.append((peer, reason))
        time.sleep(GRACE)
        with self._telling:
            if self._closed:
                return
            self._closed = True
            blamed, why = min(self._losses, key=lambda loss: ("[ring]" in loss[1], loss[1] != GONE))
            for other in self._peers:
                other.link.send(do="end", why=f"{blamed} was lost")
            self._fail(f"{blamed}: {why}; the run is over")

    @property
    def over(self) -> bool:
        """See `Part.over`."""
        return bool(self._losses)

    @property
    def local(self) -> list[int]:
        """Processes of other ranks on this machine."""
        return [peer.pid for peer in self._peers if peer.host in ("127.0.0.1", self.settings.host)]

    def close(self) -> None:
        """Tell the others that all is done. Closing twice is fine.

        Where a rank was lost, that is told instead, which ends this process.
        """
        if self._losses and not self._closed:
            time.sleep(2 * GRACE)
        if not self._closed:
            self._closed = True
            for peer in self._peers:
                peer.link.send(do="end", why=ENDED)

    def tell(self, **message: Any) -> None:
        """Send a message to all other ranks.

        Raises:
            RunOver: the run is over.
        """
        if self._closed:
            raise RunOver("the run of several processes is over: nothing can be computed any more")
        dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
        for peer in self._peers:
            if dropped:
                peer.link.send(do="drop", names=dropped)
            peer.link.send(**message)

    def answers(self) -> list[Message]:
        """The next message of each other rank."""
        return [peer.link.receive() for peer in self._peers]

    def sent(self) -> list[int]:
        """Bytes that each rank has sent for the model, from rank 0 on."""
        self.tell(do="sent")
        return [self.exchange.sent, *(answer["sent"] for answer in self.answers())]

    def kept(self) -> list[int]:
        """How many caches, marks and rows each other rank holds."""
        self.tell(do="sent")
        return [answer["kept"] for answer in self.answers()]

    # What loading asks: `runner.engine.part.Part`.

    def begin(self, **what: Any) -> None:
        """Make the others open the model that `what` describes, in place of the one that they had, if any."""
        self.elsewhere = 0
        self._rest = lambda: None
        self.exchange.reset()
        self.tell(do="load", **what)

    def own(self, whole: Whole) -> Own:
        """See `Part.own`."""
        self.whole = whole.layout
        self._held = held(whole, self.settings, self.exchange)
        self._fingerprint = {"activations": str(whole.activations), "dtype of weights": str(whole.weights)}
        return self._held.own

    def suited(self, device: Device) -> Device:
        """See `Part.suited`."""
        return suited(device, self.settings)

    def agree(self, raw: Mapping[str, Any], headers: Mapping[str, Header], needed: int, available: int | None) -> None:
        """See `Part.agree`: compares what the others have found, lets all read, and connects."""
        mine = fingerprint(raw, headers, **self._fingerprint)
        short = [("rank 0", needed, available)]
        for peer, answer in zip(self._peers, self.answers(), strict=True):
            other = difference(mine, answer["fingerprint"])
            if other is not None:
                raise UsageError(f"{peer}: {other}")
            short.append((str(peer), answer["needed"], answer["available"]))
            self.elsewhere += answer["needed"]
        for name, wanted, there in short:
            if there is not None and wanted > there:
                raise UsageError(
                    f"{name} would hold {wanted / 1e9:.1f} GB of weights, and has {there / 1e9:.1f} GB of memory: it "
                    "needs a smaller --share, or the run more ranks"
                )
        self.tell(do="go")
        self._connects(True)
        self.exchange.open()
        self._connects(False)

    def led(self, model: Model) -> Model:
        """See `Part.led`."""
        return Led(model, self)

    def here(self, model: Model) -> Model:
        """See `Part.here`."""
        assert isinstance(model, Led)
        return model.model

    def ready(self, rest: Callable[[], None]) -> None:
        """See `Part.ready`."""
        self._rest = rest
        self._ready = self.answers()
        self.loaded = [answer["loaded"] for answer in self._ready]

    def caches(self, caches: Caches, memories: Memories) -> Caches:
        """See `Part.caches`."""
        # By tensors, all ranks remember the same of each layer; in a pipeline, one may forget what another has.
        alike = self.settings.mode != PIPELINE
        return self.named(lambda name: LedCaches(caches, memories, self, name, alike=alike))

    def room(self, limit: int, room: int, footprint: Footprint) -> int:
        """See `Part.room`."""
        return least_room(limit, room, sizes(footprint), zip(map(str, self._peers), self._ready, strict=True))

    # What a model and its caches do.

    def named(self, make: Callable[[int], T]) -> T:
        """What `make` makes of a new number, by which all ranks know caches, marks or rows until it is gone here."""
        self._named += 1
        made = make(self._named)
        weakref.finalize(made, self._dropped.append, self._named).atexit = False
        return made

    def step(self, caches: Sequence[Caches], tokens: Sequence[int]) -> None:
        """See `Part.step`."""
        self.tell(do="step", caches=_names(caches), tokens=list(tokens))

    def passed(self, batch: Batch, caches: Given) -> Batch:
        """Tell the others of a pass, and return it with the ids that all have."""
        self._rest()
        self.tell(
            do="pass",
            caches=_names(caches.each),
            counts=list(caches.counts) if isinstance(caches, SeveralCaches) else None,
            **described(batch),
        )
        assert self._held is not None
        return replace(batch, ids=self.exchange.from_first(batch.ids)) if self._held.reads_ids else batch

    def there(self, hidden: mx.array) -> mx.array:
        """See `Exchange.there`."""
        return self.exchange.there(hidden)

    def asked(self, hidden: mx.array) -> mx.array:
        """Tell the others that the logits of `hidden` are wanted, if they have a part of the head."""
        assert self._held is not None
        if not self._held.gathers:
            return hidden
        self._rest()
        self.tell(do="logits", shape=list(hidden.shape), dtype=CODES.index(hidden.dtype))
        return self.exchange.from_first(hidden)


def _hello(connection: socket.socket) -> Message:
    """What somebody says first, a line of JSON; {} where that is no such message, too long, or takes too long."""
    end, line = time.monotonic() + PATIENCE, bytearray()
    try:
        while not line.endswith(b"\n") and len(line) < LONGEST_HELLO:
            connection.settimeout(max(0.001, end - time.monotonic()))
            byte = connection.recv(1)  # what comes behind the line is for others to read
            if not byte:
                return {}
            line += byte
        found = json.loads(line)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _names(caches: Sequence[Caches]) -> list[int]:
    """The numbers by which all ranks know these caches."""
    found = [one.name for one in caches if isinstance(one, LedCaches)]
    assert len(found) == len(caches), "caches of one process alone"
    return found
