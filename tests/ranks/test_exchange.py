"""When what ranks send each other is waited for; what arrives, runs of several processes test."""

from __future__ import annotations

import mlx.core as mx
import pytest

from runner.ops.exchange import Exchange


@pytest.mark.parametrize("apart", [False, True])
def test_what_a_ring_adds_up_for_a_gpu_of_nvidias_is_waited_for(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun in one evaluation and used in another one on the other device, it would be waited for without end."""
    done: list[str] = []

    def all_sum(x: mx.array, group: object) -> mx.array:
        done.append("sum")
        return x

    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: done.append("begun"))
    monkeypatch.setattr(mx, "eval", lambda *arrays: done.append("waited"))
    exchange = Exchange(0, 2)
    exchange.apart = apart
    exchange.from_first(mx.zeros(3))
    assert done == (["waited", "sum", "begun", "waited"] if apart else ["sum", "begun"])
    done.clear()
    exchange.total(mx.zeros(3))  # within an evaluation MLX waits itself
    assert done == ["sum"]
