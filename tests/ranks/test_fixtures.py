"""Models shared out over processes of this machine give what they give alone; ranks hold and send what was said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from places import TESTS
from ranks import over_fixtures

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


def checked(found: Sequence[dict[str, Any]], *, exact: bool) -> int:
    """How many fixtures could be shared out; each of them must have given what it gives alone."""
    count = 0
    for one in found:
        assert "raised" not in one and "lost" not in one, one
        if "refused" in one:
            continue
        count += 1
        assert one["tokens"], one
        assert one["equal"] if exact else one["error"] < 1e-4, one
        assert one["sent"] == one["sent_said"], one
        assert one["held"] == one["held_said"] or one["twins"], one
    return count


def test_a_pipeline_of_two_gives_the_same_bits(tmp_path: Path) -> None:
    found = over_fixtures(tmp_path, FEW, size=2, mode="pipeline", tokens=4)
    assert checked(found, exact=True) == len(FEW)


@pytest.mark.long
def test_every_fixture_in_a_pipeline_of_two(tmp_path: Path) -> None:
    found = over_fixtures(tmp_path, EVERY, size=2, mode="pipeline", tokens=12)
    assert checked(found, exact=True) == len(EVERY)


@pytest.mark.long
def test_every_fixture_with_enough_layers_in_a_pipeline_of_four(tmp_path: Path) -> None:
    found = over_fixtures(tmp_path, EVERY, size=4, mode="pipeline", tokens=12)
    assert checked(found, exact=True) >= 10
    assert all("cannot be shared out over 4 ranks" in one["refused"] for one in found if "refused" in one)
