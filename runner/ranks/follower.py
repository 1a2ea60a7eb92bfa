"""The ranks after 0: each holds its part of the model, and computes what rank 0 says."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx

from runner.cache.caches import Caches
from runner.cache.mark import Edge, Marks
from runner.cache.several import Memories as Given
from runner.cache.several import SeveralCaches
from runner.engine.budget import Footprint
from runner.engine.compiled import Broken, Known, RowSteps
from runner.engine.loaded import Loaded
from runner.engine.part import Memories, Own, Whole
from runner.errors import RunnerError
from runner.families import Model
from runner.ops.device import Device
from runner.ops.exchange import CODES, Exchange
from runner.ops.memory import Memory, capacity
from runner.ops.owner import OWNER
from runner.ranks.link import ENDED, QUIET, SILENT, Link, Message
from runner.ranks.part import Held, fingerprint, held, sizes, suited
from runner.ranks.passes import batch_of
from runner.ranks.settings import Settings
from runner.weights.loading import read_nbytes
from runner.weights.plan import ModulePlan
from runner.weights.tags import Header

SETTLED_EVERY = 256
"""Passes after which freed buffers are given back, on devices where they pile up."""

WIRED = 8192
"""Tokens of a cache that macOS is told of beside the weights, as the longest answer is not known here."""


class Follower:
    """The side of a rank after 0: a `Part` of the model."""

    elsewhere = 0
    over = False  # where rank 0 is lost, this process ends at once
    whole: ModulePlan | None = None

    def __init__(self, settings: Settings, rank: int, versions: Mapping[str, str]) -> None:
        """Find rank 0. Where it is lost, this process ends."""
        self.settings = settings
        self.exchange = Exchange(rank, settings.size, settings.backend, sends=settings.sends)
        self.link = Link(_connected(settings), _end)
        self._held: Held | None = None
        self._fingerprint: dict[str, str] = {}
        self.link.send(token=settings.token, rank=rank, pid=os.getpid(), versions=dict(versions))
        self.link.start()

    def follow(self, load: Callable[[Message, Follower], Loaded]) -> None:
        """Load what rank 0 says, by `load`, and compute what it says; does not return."""
        message = self.link.receive()
        try:
            while True:
                self.exchange.reset()
                engine = load(message, self)
                self.link.send(
                    loaded=read_nbytes(engine.model, engine.layout),
                    available=capacity(engine.device.mlx),
                    caches=sizes(engine.footprint),
                )
                message = engine.run(_Passes(self, engine).run)
                engine.close()
        except (RunnerError, OSError) as error:
            self._give_up(str(error))
        except MemoryError:
            self._give_up("out of memory")
        except Broken:
            why = engine.compiled.refused_rows or "for these caches"
            self._give_up(f"its kernels do not take a step that rank 0's take: {why}")
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {' '.join(str(error).split())}")

    def _give_up(self, why: str) -> None:
        self.link.send(do="end", why=why)
        time.sleep(2)  # rank 0 ends the run meanwhile; ended at once, this process would look as if it had died
        os._exit(1)

    # What loading asks: `runner.engine.part.Part`.

    def own(self, whole: Whole) -> Own:
        """See `Part.own`."""
        self._held = held(whole, self.settings, self.exchange)
        self._fingerprint = {"activations": str(whole.activations), "dtype of weights": str(whole.weights)}
        return self._held.own

    def suited(self, device: Device) -> Device:
        """See `Part.suited`."""
        return suited(device, self.settings)

    def agree(self, raw: Mapping[str, Any], headers: Mapping[str, Header], needed: int, available: int | None) -> None:
        """See `Part.agree`: tells rank 0 what is here, and waits until it says go."""
        found = fingerprint(raw, headers, **self._fingerprint)
        self.link.send(fingerprint=found, needed=needed, available=available)
        self.link.receive()
        self.exchange.open()

    def led(self, model: Model) -> Model:
        """See `Part.led`."""
        return model

    def here(self, model: Model) -> Model:
        """See `Part.here`."""
        return model

    def ready(self, rest: Callable[[], None]) -> None:
        """See `Part.ready`; rank 0 is told once the model is there."""

    def step(self, caches: Sequence[Caches], tokens: Sequence[int]) -> None:
        """See `Part.step`; rank 0 leads."""

    def caches(self, caches: Caches, memories: Memories) -> Caches:
        """See `Part.caches`."""
        return caches

    def room(self, limit: int, room: int, footprint: Footprint) -> int:
        """See `Part.room`; rank 0 decides."""
        return room

    @property
    def reads_ids(self) -> bool:
        """Whether this rank needs the ids of tokens."""
        return self._held is not None and self._held.reads_ids


class _Passes:
    """Does what rank 0 says, message by message; a job of the thread that owns the device."""

    def __init__(self, follower: Follower, engine: Loaded) -> None:
        self._follower = follower
        self._engine = engine
        self._caches: dict[int, Caches] = {}
        self._marks: dict[int, Marks] = {}
        self._edges: dict[int, Edge] = {}
        self._steps: tuple[list[int], RowSteps] | None = None  # of the last caches, while nothing else comes between
        self._places: Known = WeakKeyDictionary()
        self._done = 0
        self._memory = Memory(engine.device.keeps)
        self._reading: mx.array | None = None  # what a prompt's piece gives, until that was waited for

    def run(self) -> Message:
        """Compute until another model is to be loaded; returns the message that says so."""
        self._engine.wire(self, WIRED)
        while (message := self._follower.link.receive())["do"] != "load":
            self._do(message)
        return message

    def _do(self, message: Message) -> None:
        do = message["do"]
        if do != "logits":  # which rank 0 asks for while the pass is computed
            self._wait()
        if do == "step":
            self._step(message["caches"], message["tokens"])
            return
        if do != "new":  # nobody looks at caches, or lets go of them, while kernels write into them
            self._engine.compiled.rest()
        if do not in ("new", "drop", "logits"):
            self._steps, self._places = None, WeakKeyDictionary()
        if do == "pass":
            self._pass(message)
        elif do == "logits":
            # Which rows are wanted, rank 0 says by sending them; all ranks have the same hidden states.
            rows = mx.zeros(tuple(message["shape"]), CODES[message["dtype"]])
            mx.async_eval(self._engine.model.logits(self._follower.exchange.from_first(rows)))
        elif do == "sent":
            kept = len(self._caches) + len(self._marks) + len(self._edges)
            self._follower.link.send(sent=self._follower.exchange.sent, kept=kept)
        elif do == "drop":
            self._steps = None
            for name in message["names"]:
                for held in (self._caches, self._marks, self._edges):
                    held.pop(name, None)  # those of an earlier model went with it
        elif do == "new":
            self._caches[message["caches"]] = self._engine.new_caches()
        elif do in ("part", "joined"):
            self._cut(do, message)
        else:
            self._move(do, self._caches[message["caches"]], message)

    def _move(self, do: str, caches: Caches, message: Message) -> None:
        """What is done to caches between passes."""
        if do == "reserve":
            caches.reserve(message["count"])
        elif do == "mark":
            self._marks[message["made"]] = made = caches.mark()
            mx.eval(made.arrays)
        elif do == "reach":
            place = caches.reach(message["offset"], self._named(message["marks"]))
            self._follower.link.send(offset=place)
        elif do == "rewind":
            caches.rewind(message["offset"], self._named(message["marks"]))
        elif do == "clear":
            caches.clear()
        elif do == "rows":
            self._edges[message["made"]] = caches.rows(message["first"], message["last"])
        elif do == "hold":
            marks = self._named(message["marks"])
            caches.hold([self._edges[name] for name in message["edges"]], marks[0] if marks else None)
            mx.eval(caches.arrays)  # now, before anybody writes into what is copied
        else:
            raise ValueError(f"rank 0 says {do!r}, which means nothing here")

    def _named(self, names: Sequence[int]) -> list[Marks]:
        return [self._marks[name] for name in names]

    def _cut(self, do: str, message: Message) -> None:
        """Make rows of others: views, or copies."""
        edge = self._edges[message["edge"]]
        if do == "part":
            made = edge.part(message["first"], message["last"])
        else:
            made = edge.joined([self._edges[name] for name in message["others"]])
            mx.eval(made.arrays)  # now, before anybody writes into what is copied
        self._edges[message["made"]] = made

    def _step(self, names: list[int], tokens: Sequence[int]) -> None:
        """Begin a step by kernels behind a token of each sequence."""
        if self._steps is None or self._steps[0] != names:
            each = [self._caches[name] for name in names]
            caches: Given = each[0] if len(each) == 1 else SeveralCaches(each, [1] * len(each))
            self._steps = names, RowSteps(self._engine.compiled, caches, None, self._places)
        self._steps[1].begin(tokens)

    def _pass(self, message: Message) -> None:
        each = [self._caches[name] for name in message["caches"]]
        counts, shape = message["counts"], tuple(message["shape"])
        caches: Given = each[0] if counts is None else SeveralCaches(each, counts)
        # Only their shape counts, unless layers look ids up themselves.
        ids = mx.zeros(shape, mx.int32)
        if self._follower.reads_ids:
            ids = self._follower.exchange.from_first(ids)
        hidden = self._engine.model(batch_of(message, ids), caches)
        mx.async_eval(hidden, caches.arrays)
        self._done += 1
        if shape[1] > len(each):
            self._reading = hidden
        elif self._done % SETTLED_EVERY == 0:
            self._memory.settle()

    def _wait(self) -> None:
        """Wait for a prompt's piece: its activations are not to be held beside the next one's; a token's may be."""
        if self._reading is not None:
            mx.eval(self._reading)
            self._reading = None
            self._memory.settle()


def _connected(settings: Settings) -> socket.socket:
    """A connection to rank 0, which may still be starting; the process ends where it does not come."""
    end = time.monotonic() + settings.wait
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            return socket.create_connection((settings.host, settings.port), timeout=2)
        time.sleep(0.1)
    os._exit(1)


def _end(reason: str) -> None:
    """The end of the connection to rank 0 is the end of this process, whatever it is waiting for."""
    os._exit(0 if reason == ENDED else SILENT if reason.startswith(QUIET) else 1)


def run_follower(
    settings: Settings, rank: int, versions: Mapping[str, str], load: Callable[[Message, Follower], Loaded]
) -> None:
    """Be a rank after 0 until the run is over; does not return."""
    OWNER.start()
    Follower(settings, rank, versions).follow(load)
