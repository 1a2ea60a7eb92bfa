"""What a rank after 0 does between its kernels' steps; the kernels are a list of what was asked of them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from places import TESTS

from runner.engine import step_shape
from runner.engine.compiled import Compiled
from runner.engine.loaded import open_loaded
from runner.ranks.follower import _Passes


class Kernels:
    """Notes what it is asked, and writes nothing."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def refresh(self) -> None: ...

    def ready(self, count: int) -> None: ...

    def settle(self) -> None:
        self.asked.append("settle")

    def bound(self, several: Sequence[Any]) -> list[Any]:
        self.asked.append(f"bound {len(several)}")
        return list(several)

    def begin(self, tokens: Sequence[int], positions: Sequence[int], caches: Sequence[Any]) -> None:
        self.asked.append(f"step {list(tokens)} at {list(positions)}")


def test_whatever_comes_between_steps_waits_for_them_and_rows_are_looked_up_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An operation may put rows elsewhere, and kernels still write them where they were."""
    loaded, kernels = open_loaded(TESTS / "fixtures" / "llama" / "llama-gqa"), Kernels()
    loaded.compiled = Compiled(loaded.model, loaded.dtype, None)
    loaded.compiled.part = SimpleNamespace(step=lambda caches, tokens: None)  # type: ignore[assignment]
    loaded.compiled._rows = kernels  # type: ignore[assignment]
    monkeypatch.setattr(step_shape, "rows_of", lambda caches: caches)
    passes = _Passes(SimpleNamespace(reads_ids=False), loaded)  # type: ignore[arg-type]

    def do(**message: Any) -> list[str]:
        kernels.asked.clear()
        loaded.run(lambda: passes._do(message))
        return list(kernels.asked)

    def reads(name: int, offset: int, count: int) -> list[str]:
        return do(
            **{"do": "pass", "caches": [name], "counts": None, "shape": [1, count], "segments": []},
            offset=offset, length=offset + count,
        )  # fmt: skip

    for name in (1, 2):
        assert do(do="new", caches=name) == []
        assert reads(name, 0, 4)[:1] == ["settle"]
    assert do(do="step", caches=[1, 2], tokens=[7, 8]) == ["settle", "bound 2", "step [7, 8] at [4, 4]"]
    assert do(do="step", caches=[1, 2], tokens=[~0, ~1]) == ["step [-1, -2] at [5, 5]"]
    assert do(do="new", caches=3) == []  # nobody's rows move
    assert do(do="step", caches=[1, 2], tokens=[~0, ~1])[-1] == "step [-1, -2] at [6, 6]"
    assert reads(1, 7, 3) == ["settle"]
    assert do(do="step", caches=[1, 2], tokens=[5, 6]) == ["settle", "bound 2", "step [5, 6] at [10, 7]"]
    assert do(do="rewind", caches=1, offset=8, marks=[]) == ["settle"]
    assert do(do="step", caches=[1], tokens=[5]) == ["settle", "bound 1", "step [5] at [8]"]
    assert do(do="drop", names=[2, 3]) == ["settle"]
    assert do(do="step", caches=[1], tokens=[~0]) == ["step [-1] at [9]"]


def test_logits_are_begun_before_a_prompts_end_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 begins them so: whoever begins later holds up the sums of both."""
    loaded, done = open_loaded(TESTS / "fixtures" / "llama" / "llama-gqa"), []
    part = SimpleNamespace(reads_ids=False, exchange=SimpleNamespace(from_first=lambda rows: rows))
    passes = _Passes(part, loaded)  # type: ignore[arg-type]
    begin, logits = mx.async_eval, loaded.model.logits
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: (done.append("begun"), begin(*arrays)))
    monkeypatch.setattr(mx, "eval", lambda *arrays: done.append("waited"))
    monkeypatch.setattr(type(loaded.model), "logits", lambda model, rows: (done.append("logits"), logits(rows))[1])

    def do(**message: Any) -> list[str]:
        done.clear()
        loaded.run(lambda: passes._do(message))
        return list(done)

    reads = {"do": "pass", "caches": [1], "counts": None, "shape": [1, 4], "segments": [], "length": 8}
    do(do="new", caches=1)
    assert do(**reads, offset=0) == ["begun"]
    assert do(do="logits", shape=[1, 1, loaded.config.hidden_size], dtype=0) == ["logits", "begun"]
    assert do(**reads, offset=4) == ["waited", "begun"]  # the activations of one piece at a time
    assert do(do="rewind", caches=1, offset=4, marks=[]) == ["waited"]
    assert do(**reads, offset=4) == ["begun"]
    monkeypatch.setattr(passes, "_step", lambda caches, tokens: done.append("step"))
    assert do(do="step", caches=[1], tokens=[3]) == ["waited", "step"]
    do(do="rewind", caches=1, offset=4, marks=[])
    assert do(**{**reads, "shape": [1, 1]}, offset=4) == ["begun"]
    assert do(do="rewind", caches=1, offset=4, marks=[]) == []  # a token's is not waited for
