"""One process of a run over two GPUs: kernels' steps against those of operations on one, and against float32.

    python rank_steps.py RESULTS CASE ...

with `RUNNER_RANKS`, `MLX_RANK` and what NCCL needs in the environment; a case is JSON: shape, quantization, and changes
of the config. Rank 0 writes a line of JSON for each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from made_models import made
from rank_run import run_rank

from runner.cache.several import SeveralCaches
from runner.engine.compiled import RowSteps
from runner.engine.loaded import Loaded
from runner.engine.replay import Steps
from runner.nn.batch import Batch, Segment
from runner.ops.owner import OWNER
from runner.ranks.follower import Follower
from runner.ranks.leader import Leader

LENGTHS = [7 + 37 * index for index in range(11)]


def filled(loaded: Loaded, count: int) -> SeveralCaches:
    """Caches of the first so many of all sequences, each with a prompt of another length, which one pass reads."""
    numbers = np.random.default_rng(1)
    prompts = [numbers.integers(0, 1000, length).astype(np.int32) for length in LENGTHS]
    ids = mx.array(np.concatenate(prompts)[None])
    each = [loaded.new_caches() for _ in prompts]
    segments = [Segment(len(prompt), 0, len(prompt)) for prompt in prompts]
    loaded.model(Batch.of(ids, segments), SeveralCaches(each, [len(prompt) for prompt in prompts]))
    mx.eval([array for caches in each for array in caches.arrays])
    return SeveralCaches(each[:count], [1] * count)


def logits(loaded: Loaded, kernels: bool, count: int) -> np.ndarray:
    """Those of three steps `[3, count, V]` behind the same random tokens."""
    tokens = np.random.default_rng(0).integers(0, loaded.config.vocab_size, (3, len(LENGTHS)))
    caches = filled(loaded, count)
    steps = RowSteps(loaded.compiled, caches, None) if kernels else Steps(loaded.model, caches, loaded.device.ops)
    return np.stack([np.array(steps(mx.array(row[None, :count])).astype(mx.float32)) for row in tokens])


def likeliest(loaded: Loaded, count: int, ahead: bool) -> list[list[int]]:
    """The likeliest tokens of eight steps, each begun before the one before has ended if `ahead`."""
    steps = RowSteps(loaded.compiled, filled(loaded, count), None)
    step, found = steps.begin(list(range(1, count + 1))), []
    for _ in range(7):
        if ahead:
            after = steps.begin([~row for row in range(count)])
            found.append([token for token, _ in step.best])
            step = after
        else:
            found.append([token for token, _ in step.best])
            step = steps.begin(found[-1])
    return [*found, [token for token, _ in step.best]]


def compared(case: Any, leader: Leader) -> dict[str, Any]:
    """What comes of one case."""
    shape, quantize, changes = case
    count = len(LENGTHS)
    exact, near = (OWNER.run(lambda run=run: made(shape, quantize, run, changes)) for run in ("float32", "bfloat16"))
    want, others = (OWNER.run(lambda one=one: logits(one, False, count)) for one in (exact, near))

    def shared() -> Loaded:
        leader.begin(case=case)
        return made(shape, quantize, "bfloat16", changes, leader)

    loaded = OWNER.run(shared)
    if loaded.compiled.refused_rows is not None:
        return {"refused": loaded.compiled.refused_rows}
    before = OWNER.run(leader.sent)
    mine = OWNER.run(lambda: logits(loaded, True, count))
    sent = OWNER.run(leader.sent)
    again = OWNER.run(lambda: logits(loaded, True, 2))
    # Of two experts that are nearly equal a row may take the other, which changes its logits by a third of a deviation.
    of_all = np.median if "num_experts" in changes else np.max
    kernels, operations = (float(of_all(np.abs(one - want).max(-1))) / float(want.std()) for one in (mine, others))
    greedy = [OWNER.run(lambda ahead=ahead: likeliest(loaded, 3, ahead)) for ahead in (False, True)]
    return {
        "kernels": kernels,
        "operations": operations,
        "alone": bool((again == mine[:, :2]).all()),
        "ahead": greedy[0] == greedy[1],
        "sent": [there - here for there, here in zip(sent, before, strict=True)],
    }


def follow(message: Mapping[str, Any], part: Follower) -> Loaded:
    """Make what rank 0 has."""
    shape, quantize, changes = message["case"]
    return OWNER.run(lambda: made(shape, quantize, "bfloat16", changes, part))


def main() -> None:
    results, *cases = sys.argv[1:]
    run_rank(results, [json.loads(case) for case in cases], follow, compared, lambda case: {"case": case})


if __name__ == "__main__":
    main()
