"""Timing of prefill and decode on one model, with repetitions.

Ids are random (with a seed) and go straight into the model: no tokenizer takes part. Decoding is greedy, and no end
token stops a run. Several sequences are requests to a scheduler (`runner.bench.many`).
"""

from __future__ import annotations

import dataclasses
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np

from runner.bench.many import Many
from runner.bench.models import Subject
from runner.cache.caches import Caches
from runner.engine.loaded import Loaded
from runner.engine.replay import Steps
from runner.errors import UsageError
from runner.nn.batch import Batch
from runner.nn.linear import Embedding
from runner.ops.memory import Memory
from runner.ops.owner import OWNER
from runner.weights import loading

EXPERTS = frozenset({"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"})
"""Config keys for the number of experts; a model with one of them reads only part of its weights for each token."""


@dataclass(frozen=True)
class Case:
    """One test: `pp` prefills `tokens` tokens, `tg` generates that many one by one, after `depth` cached tokens."""

    kind: Literal["pp", "tg"]
    tokens: int
    depth: int = 0
    batch: int = 1

    @property
    def positions(self) -> int:
        """Positions of a sequence that it takes: of several, each makes a token before the clock runs."""
        return self.depth + self.tokens + (self.kind == "tg" and self.batch > 1)

    @property
    def name(self) -> str:
        """The test's name as llama-bench writes it, `tg128 @ d4096`; a batch of several sequences adds ` x 4`."""
        depth = f" @ d{self.depth}" if self.depth else ""
        return f"{self.kind}{self.tokens}{depth}" + (f" x {self.batch}" if self.batch > 1 else "")


@dataclass(frozen=True)
class Result:
    """Measurements of one case.

    Attributes:
        seconds: of each repetition.
        tps: tokens per second of all sequences together, the mean over the repetitions.
        tps_sd: sample standard deviation of the tokens per second; 0 for a single repetition.
        peak_memory: bytes that MLX held at most, the buffers that it freed and keeps for later included.
        peak_rss: bytes of the whole process, since its start.
        bandwidth: bytes per second that decoding reads (weights and KV cache, once per step); None for a prompt, and
            for a model with experts, where a token does not use all weights.
    """

    case: Case
    seconds: list[float]
    tps: float
    tps_sd: float
    peak_memory: int
    peak_rss: int
    bandwidth: float | None


def cases(
    prompts: Sequence[int], generated: Sequence[int], depths: Sequence[int] = (0,), batches: Sequence[int] = (1,)
) -> list[Case]:
    """List the cases: each prompt length and each number of generated tokens, at each depth and batch size.

    A length of 0 leaves its kind out.

    Raises:
        UsageError: a number is negative, a batch is 0, or nothing is left to measure.
    """
    for option, numbers, least in (("-p", prompts, 0), ("-n", generated, 0), ("-d", depths, 0), ("-b", batches, 1)):
        if not numbers or min(numbers) < least:
            raise UsageError(f"{option} needs numbers of at least {least}, not {','.join(map(str, numbers))!r}")
    shapes = [(depth, batch) for batch in batches for depth in depths]
    found = [Case("pp", tokens, depth, batch) for depth, batch in shapes for tokens in prompts if tokens]
    found += [Case("tg", tokens, depth, batch) for depth, batch in shapes for tokens in generated if tokens]
    if not found:
        raise UsageError("nothing to measure: -p and -n are both 0")
    return found


def run(subject: Subject, wanted: Sequence[Case], *, repetitions: int = 5, seed: int = 0) -> Iterator[Result]:
    """Measure each case `repetitions` times, after a warm-up that does not count; one case for each result asked for.

    Raises:
        UsageError: `repetitions` is below 1, or a case does not fit the model's context.
    """
    if repetitions < 1:
        raise UsageError(f"-r must be at least 1, not {repetitions}")
    # All cases are checked before the first one is measured, which may take minutes.
    limit = subject.engine.config.context_length
    for case in wanted:
        if case.positions > limit:
            raise UsageError(
                f"{case.name} needs {case.positions} positions, but {subject.name} has a context of {limit}"
            )
    return (wired(subject.engine, case, repetitions, seed) for case in wanted)


def measure_many(engine: Loaded, case: Case, repetitions: int, seed: int) -> Result:
    """`measure` for several requests at once."""

    def job() -> Result:
        mx.clear_cache()
        mx.reset_peak_memory()
        many = Many(engine, case.batch, case.depth, np.random.default_rng(seed))
        once = many.read if case.kind == "pp" else many.generate
        seconds = [once(case.tokens) for _ in range(repetitions + 1)][1:]
        rates = [case.batch * case.tokens / each for each in seconds]
        bandwidth = None
        if case.kind == "tg" and (weights := weight_bytes(engine)) is not None:
            bandwidth = (weights + many.read_bytes) * case.tokens / statistics.mean(seconds)
        deviation = statistics.stdev(rates) if repetitions > 1 else 0.0
        return Result(case, seconds, statistics.mean(rates), deviation, many.memory.look(), peak_rss(), bandwidth)

    return engine.run(job)


def wired(engine: Loaded, case: Case, repetitions: int, seed: int) -> Result:
    """`measure`, on the thread that owns the device, with the memory wired that answers have wired."""
    if case.batch > 1:
        return measure_many(engine, case, repetitions, seed)
    holder = object()
    engine.run(lambda: engine.wire(holder, case.batch * (case.depth + case.tokens)))
    try:
        # On the thread that measures several sequences, too: what one has prepared, no other thread could use.
        return engine.run(lambda: measure(engine, case, repetitions, seed))
    finally:
        OWNER.post(lambda: engine.unwire(holder))


def measure(engine: Loaded, case: Case, repetitions: int, seed: int) -> Result:
    """Measure one case of one sequence: a warm-up, then the repetitions, each starting from the same depth."""
    numbers = np.random.default_rng(seed)
    ids = numbers.integers(0, engine.config.vocab_size, (1, case.depth + case.tokens), dtype=np.int32)
    before, after = ids[:, : case.depth], ids[:, case.depth :]
    mx.clear_cache()
    mx.reset_peak_memory()
    memory = Memory(engine.device.keeps)
    caches = filled(engine, before, memory)
    seconds = []
    for index in range(repetitions + 1):
        # Filling the caches to the depth can take longer than the test itself, so they are cut back where possible.
        if index > 0 and not rewind(caches, case.depth):
            caches = filled(engine, before, memory)
        start = time.perf_counter()
        if case.kind == "pp":
            mx.eval(read(engine, after, caches, memory))
        else:
            generate(engine, after[:, :1], caches, case.tokens)
        seconds.append(time.perf_counter() - start)
    rates = [case.tokens / each for each in seconds[1:]]
    # Over the steps of a repetition the caches grow from depth + 1 to depth + tokens: take the mean length.
    bandwidth = None
    if case.kind == "tg" and (weights := weight_bytes(engine)) is not None:
        read_bytes = weights + cache_bytes(caches, case.depth + (case.tokens + 1) / 2)
        bandwidth = read_bytes * case.tokens / statistics.mean(seconds[1:])
    return Result(
        case=case,
        seconds=seconds[1:],
        tps=statistics.mean(rates),
        tps_sd=statistics.stdev(rates) if repetitions > 1 else 0.0,
        peak_memory=memory.look(),
        peak_rss=peak_rss(),
        bandwidth=bandwidth,
    )


def filled(engine: Loaded, ids: np.ndarray, memory: Memory | None = None) -> Caches:
    """Make caches that hold `ids` `[B, depth]`."""
    caches = engine.new_caches()
    if ids.shape[1]:
        mx.eval(read(engine, ids, caches, memory))
    return caches


def rewind(caches: Caches, depth: int) -> bool:
    """Cut the caches back to `depth` tokens; returns False, changing nothing, if a cache has dropped some of these."""
    if caches.reach(depth) < depth:
        return False
    caches.rewind(depth)
    return True


def read(engine: Loaded, ids: np.ndarray, caches: Caches, memory: Memory | None = None) -> mx.array:
    """Prefill `ids` `[B, T]` in chunks, as an answer's prompt is; returns the most likely next tokens `[B]`."""
    offset, count, chunk = caches.offset, ids.shape[1], engine.device.chunk
    tokens = mx.array(ids)
    for start in range(0, count, chunk):
        OWNER.check_wanted()  # Ctrl-C ends it within a piece
        piece = tokens[:, start : start + chunk]
        hidden = engine.model(Batch(piece, offset + start, offset + count), caches)
        if start + chunk < count:
            mx.eval(caches.arrays)
            (memory or Memory(engine.device.keeps)).settle()
    return engine.device.ops.argmax(engine.model.logits(hidden[:, -1:])[:, 0])


def generate(engine: Loaded, first: np.ndarray, caches: Caches, count: int) -> None:
    """Decode `count` greedy steps from `first` `[B, 1]`; like `generate.decode`, computes one step ahead."""
    ops = engine.device.ops
    if first.shape[0] == 1 and engine.compiled.prepare():
        if not caches.offset:  # rows that there are none of yet say nothing about their form
            mx.eval(Steps(engine.model, caches, ops)(mx.array(first)))
            count -= 1
        for _ in engine.compiled.decode(caches, int(first[0, 0]), count, None):
            OWNER.check_wanted()
        return
    steps = Steps(engine.model, caches, ops, engine.recordings)
    token = mx.array(first)
    previous = token
    for _ in range(count):
        OWNER.check_wanted()
        token = ops.argmax(steps(token.reshape(-1, 1)))
        ops.schedule(token)
        mx.eval(previous)
        previous = token
    mx.eval(token)


def weight_bytes(engine: Loaded) -> int | None:
    """Bytes of weights that one decode step reads; None for a model with experts, which reads only some of them, and
    for one that is shared out over processes, whose memories read at different times.

    A step reads only a few rows of an embedding that is not also the head: it is left out.
    """
    if engine.part is not None or any(item.name in EXPERTS for item in dataclasses.fields(engine.config)):
        return None
    # An array that occurs twice in the model is tied: the head reads all of it.
    uses = Counter(id(array) for _, array in loading.arrays(engine.model))
    tables = [table for table in vars(engine.model).values() if isinstance(table, Embedding)]
    rows = [array for table in tables for _, array in loading.arrays(table) if uses[id(array)] == 1]
    return engine.nbytes - sum(array.nbytes for array in rows)


def cache_bytes(caches: Caches, length: float) -> float:
    """Bytes of keys, values and states that a decode step reads after `length` tokens."""
    return sum(cache.bytes_read(length) for cache in caches)


def peak_rss() -> int:
    """Peak resident memory of the process, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes, Linux kB
    return most if sys.platform == "darwin" else most * 1024
