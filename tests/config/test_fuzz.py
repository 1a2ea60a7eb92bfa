"""Thousands of damaged config.json objects: each gives a clean error, or a config that can be planned."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from places import TESTS

from runner.checkpoint.directory import Checkpoint
from runner.errors import RunnerError
from runner.families import find
from runner.weights.plan import plan

FIXTURES = sorted(path.parent for path in TESTS.glob("fixtures/*/*/config.json"))
ROUNDS = 60
"""Mutations of each fixture's config: over 130 fixtures, more than 7,000 in all."""

STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 3, 7, 2**31, 2**63, 1e308, 0.5, -0.0, float("inf"), float("nan"), "", "x", "silu",
    [], [1], [None], {}, {"a": 1}, {"rope_type": "yarn"}, {"type": "linear", "factor": -1}, "\ud800", [[[]]],
]  # fmt: skip


def mutate(raw: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Return a copy of `raw` with one to three random changes, at the top or in a nested object."""
    result = copy.deepcopy(raw)
    for _ in range(rng.randint(1, 3)):
        target = result
        nested = [value for value in result.values() if isinstance(value, dict) and value]
        if nested and rng.random() < 0.4:
            target = rng.choice(nested)
        name = rng.choice(list(target))
        action = rng.random()
        if action < 0.2:
            del target[name]
        elif action < 0.3:
            target[name[:-1] + "_"] = target[name]
        elif action < 0.45 and isinstance(target[name], int):
            target[name] = target[name] * rng.choice([0, -1, 2, 10, 1000]) + rng.choice([0, 1])
        else:
            target[name] = rng.choice(STRANGE)
        if not target or not result:
            return result
    return result


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_a_damaged_config_is_refused_or_planned(path: Path) -> None:
    rng = random.Random(path.name)
    raw = json.loads((path / "config.json").read_text())
    headers = Checkpoint.open(path).headers
    told = 0
    for _ in range(ROUNDS):
        damaged = mutate(raw, rng)
        try:
            config_class, model_class = find(damaged)
            config = config_class.from_dict(damaged)
            plan(model_class, config, headers)
            told += bool(config.notes)
        except RunnerError as error:
            told += 1
            assert str(error), damaged
    assert told > ROUNDS // 4  # a reader that accepts nearly anything would pass the rest
