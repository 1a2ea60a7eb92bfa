"""Scheduling a graph as one task gives MLX's results, whatever operations it has and whoever holds parts of it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twins import rand

from runner.ops.table import Ops

DIM = 32


def grown(ops: Ops, seed: int, count: int) -> list[mx.array]:
    """`count` arrays `[1, 2, 32]`, each made of earlier ones by an op of the table or of MLX."""
    picks = np.random.default_rng(seed)
    weight = mx.array(picks.standard_normal((DIM, DIM)).astype(np.float32)) * 0.1
    both = mx.concatenate([weight, weight])
    gain = mx.ones(DIM)
    made = [mx.array(picks.standard_normal((1, 2, DIM)).astype(np.float32)) for _ in range(2)]
    for _ in range(count):
        x, y = (made[i] for i in picks.integers(0, len(made), 2))
        kind = picks.integers(0, 11)
        if kind == 0:
            made.append(ops.linear(x, weight, None))
        elif kind == 1:
            made.append(x + y)
        elif kind == 2:
            made += ops.add_rms_norm(x, y, gain, 1e-5)
        elif kind == 3:
            made.append(ops.rms_norm(x, gain, 1e-5))
        elif kind == 4:  # views, one of them of something that is not contiguous
            made.append(x.swapaxes(1, 2).reshape(1, 2, DIM) * 0.5)
        elif kind == 5:
            made += [part.reshape(1, 2, DIM) for part in mx.split(ops.linear(x, both, None), 2, axis=-1)]
        elif kind == 6:
            heads = x.reshape(1, 2, 2, 16).swapaxes(1, 2)
            turned = ops.rope(heads, 3, dims=16, traditional=False, base=1e4, scale=1.0, freqs=None)
            made.append(
                ops.attention(turned, turned, heads, "causal", scale=0.25, window=None, sinks=None).flatten(2, 3)
            )
            made[-1] = made[-1].reshape(1, 2, DIM)
        elif kind == 7:
            made.append(ops.glu(mx.concatenate([x, y], axis=-1), "silu"))
        elif kind == 8:
            made.append(mx.tanh(x) - y[:, ::-1])
        elif kind == 9:
            made += [x * 0.75, 0.5 * y, x / 3.0, 2.0 / (mx.abs(x) + 1.0), ops.activate(x, "gelu_pytorch_tanh")]
        else:
            made.append(x + y[:, :1])  # a sum that broadcasts
    return made[2:]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(st.integers(0, 2**31), st.integers(1, 40), st.data())
def test_random_graphs(ops: Ops, seed: int, count: int, data: st.DataObject) -> None:
    """Some arrays are evaluated, some scheduled and some requested beforehand; what is held is right afterwards."""
    expected, found = grown(ops, seed, count), grown(ops, seed, count)
    mx.eval(expected)
    index = st.integers(0, len(found) - 1)
    mx.eval([found[i] for i in data.draw(st.lists(index, max_size=2))])
    mx.async_eval([found[i] for i in data.draw(st.lists(index, max_size=2))])
    # Memory of the others is free for what comes behind them.
    held = data.draw(st.lists(index, min_size=1, unique=True))
    expected, found = ([made[i] for i in held] for made in (expected, found))
    index = st.integers(0, len(found) - 1)
    ops.schedule(*[found[i] for i in data.draw(st.lists(index, max_size=3))])
    ops.schedule(*[found[i] for i in data.draw(st.lists(index, min_size=1, max_size=4))])
    later = ops.linear(found[0] + found[-1], mx.eye(DIM), None)  # made of what is on its way
    for i in data.draw(st.permutations(range(len(found)))):
        assert np.array_equal(np.array(found[i]), np.array(expected[i]), equal_nan=True)
    assert np.array_equal(np.array(later), np.array(expected[0] + expected[-1]), equal_nan=True)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(st.integers(0, 2**31), st.integers(1, 40))
def test_recorded_graphs(ops: Ops, seed: int, count: int) -> None:
    """Results of a recorded graph take each other's place, but none that is read later on, itself or as a view."""
    table, weight = (rand(DIM, DIM, seed=seed + i) for i in range(2))
    both = mx.concatenate([weight, weight])
    mx.eval(table, weight, both)

    def made_of(ids: mx.array) -> mx.array:
        picks = np.random.default_rng(seed)
        made = [ops.embed(ids, table, None)]
        for _ in range(count):
            x, y = (made[i] for i in picks.integers(0, len(made), 2))
            kind = picks.integers(0, 5)
            if kind == 0:
                made.append(ops.linear(x, weight, None))
            elif kind == 1:
                made.append(x + y)
            elif kind == 2:
                made += ops.add_rms_norm(x, y, None, 1e-5)
            elif kind == 3:
                made.append(x.reshape(2, 1, DIM).reshape(1, 2, DIM))
            else:
                made.append(ops.glu(ops.linear(x, both, None), "silu"))
        return made[-1] + made[0]

    if ops.recorder is None:
        return  # plain MLX
    slot = ops.recorder.slot([1, 2])
    program = ops.recorder.record(slot, [made_of(slot), made_of(slot)], [0, 1], [])
    assert program is not None
    for ids in (mx.array([[3, 1]]), mx.array([[0, 31]])):
        assert np.array_equal(np.array(program.run(ids)), np.array(made_of(ids)), equal_nan=True)


def test_the_cases_without_a_task(ops: Ops) -> None:
    """No arrays, arrays already evaluated, another CPU stream, and results of MLX's too large to be kept."""
    ops.schedule()
    x, weight = mx.ones((1, DIM)), mx.eye(DIM)
    done = ops.linear(x, weight, None)
    ops.schedule(done, done)
    ops.schedule(done)
    with mx.stream(mx.new_stream(mx.cpu)):
        elsewhere = ops.linear(done, weight, None)
    ops.schedule(elsewhere + 1)
    large = mx.tan(ops.linear(mx.ones((1 << 13, DIM)), mx.zeros((1024, DIM)), None)) + DIM
    ops.schedule(mx.sum(large[:2]))
    assert np.array_equal(np.array(done + elsewhere), np.full((1, DIM), 2.0))
    assert large[-1, -1].item() == DIM


def test_rows_are_appended_once_and_in_order(ops: Ops) -> None:
    """A cache is written in place: each step's task reads what that step wrote, before the next one writes."""
    write = ops.storage.write
    keys, values = mx.zeros((1, 1, 8, 4)), mx.zeros((1, 1, 8, 4))
    sums = []
    for at in range(8):
        row = mx.full((1, 1, 1, 4), float(at + 1))
        keys, values = write(keys, values, row, -row, at)
        sums.append(mx.sum(keys + 0.0))
        ops.schedule(sums[-1])
    assert [each.item() for each in sums] == [4.0 * sum(range(1, at + 2)) for at in range(8)]
    assert np.array_equal(np.array(values[0, 0, :, 0]), -np.arange(1.0, 9.0))


def test_what_a_task_reads_stays_until_it_has_run(ops: Ops) -> None:
    """The inputs are released, and new arrays could take their memory, while the task that reads them waits."""
    weight = mx.eye(256)
    busy = mx.random.normal((64, 256))
    mx.eval(weight, busy)
    for value in range(1, 30):
        rows = [mx.full((1, 256), float(value)) for _ in range(4)]
        mx.eval(rows)
        before = busy
        for _ in range(20):
            before = ops.linear(before, weight, None)
        ops.schedule(before)
        total = ops.linear(rows[0], weight, None)
        for row in rows[1:]:
            total = ops.linear(row, weight, None) + total
        twice, normed = ops.add_rms_norm(total, total, None, 0.0)
        total = twice + ops.linear(normed, weight, None)  # 8 v and 1, which only this task holds
        ops.schedule(total)
        del rows, row, twice, normed
        others = [mx.array(np.full((1, 256), -1.0, dtype=np.float32)) for _ in range(64)]
        assert np.allclose(np.array(total), np.full((1, 256), 8.0 * value + 1.0), rtol=1e-5)
        assert all(np.array_equal(np.array(other), np.full((1, 256), -1.0)) for other in others)


def test_a_large_graph_lets_go_of_its_results(ops: Ops) -> None:
    """Of 400 results of 1 MB each, MLX holds about a hundred at a time, and a list of ours one and the one before."""
    gain, x = mx.ones(256), mx.ones((1024, 256))
    mx.eval(gain, x)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(400):
        x = ops.rms_norm(x, gain, 1e-5)
    ops.schedule(x)
    mx.eval(x)
    assert mx.get_peak_memory() - before < (200 if ops.recorder is None else 4) << 20
