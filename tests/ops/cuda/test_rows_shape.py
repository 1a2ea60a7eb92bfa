"""Kernels for steps of several sequences: what needs no GPU to be checked."""

from __future__ import annotations

import dataclasses

import pytest
from cuda_shapes import FLOATS, LLAMA_8B, MIXED, MIXTURE, QWEN, SMOLLM2

from runner.ops.cuda.rows_shape import MOST_WARPS, RowsPlan, columns_at_once
from runner.ops.cuda.shape import DOWN, GATE_UP, Form, Unfit, divide

SHAPES = {"8b": LLAMA_8B, "smollm2": SMOLLM2, "qwen": QWEN, "mixed": MIXED, "mixture": MIXTURE, **FLOATS}


@pytest.mark.parametrize("name", SHAPES)
def test_every_row_of_a_matrix_and_every_column_is_taken(name: str) -> None:
    shape = SHAPES[name]
    plan = RowsPlan(shape, 32)
    for index in range(5):
        tiles, down, along = plan.warps(index)
        assert down * along <= MOST_WARPS and along <= shape.columns[index] // columns_at_once(shape.forms[index].bits)
        if not shape.experts or index not in (GATE_UP, DOWN):
            launch = plan.product(index)
            lines = launch.grid[1] * 16 * down * tiles
            assert shape.rows[index] <= lines < shape.rows[index] + 32 * down and launch.threads == 32 * down * along
            assert launch.grid[0] * plan.tiles * 8 == 32
    if shape.experts:
        assert plan.opened(3).grid[1] == 3 * shape.chosen and plan.closed(3).threads <= 32 * MOST_WARPS


@pytest.mark.parametrize("name", SHAPES)
def test_the_number_of_rows_does_not_decide_how_sums_are_taken(name: str) -> None:
    each = [[RowsPlan(SHAPES[name], rows).warps(index) for index in range(5)] for rows in (8, 16, 32, 64)]
    assert each[1:] == each[:-1]


@pytest.mark.parametrize("used", [1, 7, 16, 64])
@pytest.mark.parametrize("parts", [4, 64, 1024])
def test_every_part_of_a_long_sequence_is_attended_to(parts: int, used: int) -> None:
    plan = RowsPlan(LLAMA_8B, 64)
    each, blocks = plan.parts_each(parts, used), plan.attention(parts, used).grid[0]
    assert 1 <= each <= 8 and parts <= each * blocks < parts + each
    # Few sequences are divided among all multiprocessors, many are not divided.
    assert plan.parts_each(4, 1) == 1 and plan.parts_each(4, 64) == 4


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"cache": "float32"}, "activations"),
        ({"scales": "float16"}, "another type"),
        ({"forms": (Form(6, 64),) * 5}, "6 bits"),
        ({"hidden": 4064}, "4064"),
        ({"experts": 8, "chosen": 20}, "another kind"),
        ({"experts": 8, "chosen": 2, "biased": (True, False, False, False, False)}, "biases"),
    ],
)
def test_what_there_are_no_kernels_for(changes: dict[str, object], why: str) -> None:
    with pytest.raises(Unfit, match=why):
        RowsPlan(dataclasses.replace(LLAMA_8B, **changes), 8)  # type: ignore[arg-type]


def test_one_kernel_takes_no_mixture() -> None:
    with pytest.raises(Unfit, match="mixture"):
        divide(MIXTURE, 132, 232448)
