"""Models shared out over processes of this machine give what they give alone; ranks hold and send what was said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from places import TESTS
from ranks import over_fixtures

from runner.inspect_model import inspect_ranks
from runner.ranks.settings import TENSOR, Settings

EVERY = sorted(path.parent for path in TESTS.glob("fixtures/*/*/config.json"))
FEW = [
    TESTS / "fixtures" / name
    for name in (
        "llama/llama-gqa",
        "families/gemma3n_text-base",  # streams, inputs for each layer, keys of other layers
        "families/bloom-base",  # masks that are made before the layers
        "families/qwen3_next-base",  # recurrent states, experts
    )
]
ONE = [TESTS / "fixtures" / "llama" / "llama-gqa"]
"""Sums over ranks are slow where processes share two cores: the others are left to the long tier."""


def checked(found: Sequence[dict[str, Any]], *, exact: bool, requests: int = 0) -> int:
    """How many fixtures could be shared out; each of them must have given what it gives alone."""
    count = 0
    for one in found:
        assert "raised" not in one and "lost" not in one, one
        if "refused" in one:
            continue
        count += 1
        assert one["tokens"], one
        # The CPU kernels round what they multiply to 16 bits, row by row: a part of a row is rounded otherwise.
        # So do kernels for whole steps, which one GPU takes.
        limit = 3e-4 if one["path"] == "llama-mlx-4bit" or mx.cuda.is_available() else 1e-4
        assert one["equal"] if exact else one["error"] < limit, one
        assert one["sent"] == one["sent_said"], one
        assert one["held"] == one["held_said"], one
        if requests:
            assert one["served"] < limit and not one["kept"], one
    # Where frequencies depend on the length, or states were not marked where prompts part, nothing is read anew.
    assert not requests or sum(one["reused"] > 0 for one in found) > count // 2
    return count


def test_a_pipeline_of_two_gives_the_same_bits(tmp_path: Path) -> None:
    found = over_fixtures(tmp_path, FEW, size=2, mode="pipeline", tokens=4, requests=24)
    assert checked(found, exact=True, requests=24) == len(FEW)


@pytest.mark.parametrize("size", [2, 4])
def test_a_pipeline_that_cannot_send_gives_the_same_bits(tmp_path: Path, size: int) -> None:
    """As over NCCL: in each step of the pipeline all ranks take part, by adding zeros."""
    found = over_fixtures(tmp_path, ONE, size=size, mode="pipeline", tokens=3, times=2, sends=False)
    assert checked(found, exact=True) == len(ONE)


needs_gpu = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs an NVIDIA GPU")


@needs_gpu
@pytest.mark.long  # processes that share a GPU wait for each other
@pytest.mark.parametrize("mode", ["tensor", "pipeline"])
def test_models_over_nccl_give_the_same_tokens(tmp_path: Path, mode: str) -> None:
    found = over_fixtures(
        tmp_path, FEW, size=2, mode=mode, tokens=4, requests=6, backend="nccl", sends=False, patience=120
    )
    assert checked(found, exact=mode == "pipeline", requests=6) == len(FEW)


def test_tensors_over_two_give_the_same_tokens(tmp_path: Path) -> None:
    found = over_fixtures(tmp_path, ONE, size=2, mode="tensor", tokens=2)
    assert checked(found, exact=False) == len(ONE)


def test_steps_that_all_ranks_begin_by_kernels(tmp_path: Path) -> None:
    """Twins of the kernels, on each rank: rank 0 tells the others which tokens of which sequences a step takes."""
    fixtures = [ONE[0], TESTS / "fixtures" / "llama" / "llama-tied"]  # whose head is that of rank 0
    found = over_fixtures(tmp_path, fixtures, size=2, mode="tensor", tokens=2, requests=8, twin=True)
    assert checked(found, exact=False, requests=8) == len(fixtures)
    assert all(one["steps"] > 8 for one in found)


def test_heads_fewer_than_ranks_stay_whole() -> None:
    """Were they on several ranks, sums would count them twice."""
    reports = inspect_ranks(TESTS / "fixtures" / "llama" / "llama-rope-yarn", Settings(4, TENSOR, (), "", 0, "", 0.0))
    assert any("its 32 inputs are in fewer parts than there are ranks" in note for note in reports[0].notes)


@pytest.mark.parametrize("mode", ["pipeline", TENSOR])
def test_a_head_beside_the_table_may_be_another_matrix(mode: str) -> None:
    """Rank 0 has the head; only reading tells whether it is held besides, or the same."""
    path = TESTS / "fixtures" / "families" / "muse_glimmer_text-v5"
    reports = inspect_ranks(path, Settings(2, mode, (), "", 0, "", 0.0))
    assert [report.twins for report in reports] == [3072, 0]


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 4])
def test_every_fixture_by_tensors(tmp_path: Path, size: int) -> None:
    found = over_fixtures(tmp_path, EVERY, size=size, mode="tensor", tokens=4, patience=7200)
    assert checked(found, exact=False) > 0.9 * len(EVERY)
    assert all("nothing of this model can be shared out" in one["refused"] for one in found if "refused" in one)


@pytest.mark.long
def test_every_fixture_in_a_pipeline_of_two(tmp_path: Path) -> None:
    found = over_fixtures(tmp_path, EVERY, size=2, mode="pipeline", tokens=12, requests=8, patience=7200)
    assert checked(found, exact=True, requests=8) == len(EVERY)


@pytest.mark.long
def test_every_fixture_in_a_pipeline_of_four(tmp_path: Path) -> None:
    """Few have four layers: theirs come twice, one after another, or the last one does, or there are others."""
    found = over_fixtures(tmp_path, EVERY, size=4, mode="pipeline", tokens=12, times=2, patience=7200)
    assert checked(found, exact=True) == len(EVERY)
