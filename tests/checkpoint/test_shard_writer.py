"""Shards written piece by piece, in any order and of any size; pieces that do not add up to a tensor are refused."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.checkpoint.directory import Checkpoint
from runner.checkpoint.shard_writer import WIDTHS, Piece, Planned, write_shards
from runner.errors import CheckpointError, UsageError

DTYPES = {"U8": mx.uint8, "F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32, "U32": mx.uint32}
ONE = {"a": Planned("F32", (4, 2))}


def array(planned: Planned, seed: int) -> mx.array:
    numbers = np.random.default_rng(seed).integers(0, 100, planned.shape)
    return mx.array(numbers).astype(DTYPES[planned.dtype])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(WIDTHS)), st.integers(1, 7), st.integers(1, 5)), min_size=1, max_size=6),
    st.integers(1, 120),
    st.randoms(use_true_random=False),
)
def test_what_is_written_is_read(kinds: list[tuple[str, int, int]], limit: int, order: Random) -> None:
    tensors = {f"t{i}": Planned(dtype, (rows, width)) for i, (dtype, rows, width) in enumerate(kinds)}
    arrays = {name: array(planned, seed) for seed, (name, planned) in enumerate(tensors.items())}
    pieces = [
        Piece(name, row * whole.nbytes // whole.shape[0], whole[row : row + 1])
        for name, whole in arrays.items()
        for row in range(whole.shape[0])
    ]
    order.shuffle(pieces)
    with tempfile.TemporaryDirectory() as directory:
        write_shards(Path(directory), tensors, pieces, limit)
        (Path(directory) / "config.json").write_text("{}")
        found = Checkpoint.open(Path(directory))
        assert set(found.headers) == set(arrays) and found.metadata == {"format": "mlx"}
        for name, whole in arrays.items():
            assert found.read(name).dtype == whole.dtype and mx.array_equal(found.read(name), whole)
        for path in Path(directory).glob("*.safetensors"):
            held = [header.nbytes for header in found.headers.values() if header.file.name == path.name]
            assert sum(held) <= limit or len(held) == 1


@pytest.mark.parametrize(
    ("tensors", "pieces", "message"),
    [
        (ONE, [Piece("a", 0, mx.zeros((3, 2)))], "'a' was not written whole: 24 of 32 bytes"),
        (ONE, [Piece("a", 8, mx.zeros((4, 2)))], "'a' is larger than planned"),
        ({}, [], "no tensors to write"),
    ],
)
def test_sizes_must_add_up(tensors: dict[str, Planned], pieces: list[Piece], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_shards(tmp_path, tensors, pieces)


def test_a_full_disk_is_said_in_a_line(tmp_path: Path) -> None:
    """Every write to /dev/full fails with a full disk."""
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_shards(tmp_path, ONE, [Piece("a", 0, mx.zeros((4, 2)))])
    with pytest.raises(UsageError, match="max_shard_bytes is 0"):
        write_shards(tmp_path, ONE, [], 0)
