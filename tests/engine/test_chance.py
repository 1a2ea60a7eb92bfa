"""The numbers of draws: the published generator, and numbers that are uniform and of one another independent."""

from __future__ import annotations

import numpy as np
import pytest

from runner.engine.chance import chance, philox

ONES = 0xFFFFFFFF


def test_known_answers() -> None:
    """From kat_vectors of Random123, the authors' own library."""
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((ONES,) * 4, (ONES,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert philox(*pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@pytest.mark.parametrize("varied", ["seed", "choice", "position"])
def test_numbers_are_uniform_and_neighbours_are_independent(varied: str) -> None:
    """Of neighbouring seeds, choices and positions: mean, variance, shares of 64 boxes, and of 16 x 16 for pairs."""
    count = 20_000
    x = np.array([chance(**{"seed": 7, "choice": 0, "position": 11, varied: index}) for index in range(count)])
    assert x.min() >= 0 and x.max() < 1
    assert abs(x.mean() - 0.5) < 5 * (1 / 12 / count) ** 0.5 and abs(x.var() - 1 / 12) < 0.003
    for boxes in (np.histogram(x, 64, (0, 1))[0], np.histogram2d(x[:-1], x[1:], 16, ((0, 1), (0, 1)))[0].ravel()):
        wanted = boxes.sum() / boxes.size
        chi = float((((boxes - wanted) ** 2) / wanted).sum())
        assert abs(chi - boxes.size) < 6 * (2 * boxes.size) ** 0.5  # six standard deviations
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 5 / count**0.5


def test_large_seeds_and_positions_count_in_full() -> None:
    places = [
        (seed, choice, position) for seed in (1, 1 + (1 << 32), 1 << 62) for choice in (0, 1) for position in (5, 6)
    ]
    assert len({chance(*place) for place in [*places, (1, 0, 5 + (1 << 32)), (1, 1 << 32, 5)]}) == len(places) + 2
