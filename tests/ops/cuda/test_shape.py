"""How a decode step is divided among a GPU's blocks: what needs no GPU to be checked, and that it is kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from cuda_shapes import AMPERE, FLOATS, HOPPER, LLAMA_8B, MIXED, QWEN, SMOLLM2

from runner.errors import BackendError
from runner.ops.cuda.decoder import _LAYER, _launch_type
from runner.ops.cuda.nvrtc import Nvrtc, compiled
from runner.ops.cuda.shape import DOWN, GATE_UP, OUTPUT, SPARE, Form, Unfit, divide

PLAIN_8B = dataclasses.replace(LLAMA_8B, forms=(Form(),) * 5, embedding=Form())
SHAPES = {"8b": LLAMA_8B, "plain 8b": PLAIN_8B, "smollm2": SMOLLM2, "qwen": QWEN, "mixed": MIXED, **FLOATS}


def owned(rows: int, unit: int, block: int, blocks: int) -> range:
    """`owned` in step.cu."""
    units = -(-rows // unit)
    return range(unit * (units * block // blocks), min(rows, unit * (units * (block + 1) // blocks)))


@pytest.mark.parametrize("name", SHAPES)
def test_each_row_has_one_block_and_each_block_a_row(name: str) -> None:
    shape = SHAPES[name]
    division = divide(shape, *HOPPER)
    every = set(range(division.blocks))
    for index, product in enumerate(division.products):
        rows = shape.intermediate if index == GATE_UP else product.rows
        shares = [owned(rows, product.unit, block, division.blocks) for block in range(division.blocks)]
        assert [row for share in shares for row in share] == list(range(rows))
        every -= {block for block, share in enumerate(shares) if share}
    assert not every
    assert division.products[OUTPUT].unit == division.products[DOWN].unit  # of the residual


@pytest.mark.parametrize("device", [HOPPER, AMPERE])
@pytest.mark.parametrize("name", SHAPES)
def test_what_a_block_needs_fits(name: str, device: tuple[int, int]) -> None:
    division = divide(SHAPES[name], *device)
    assert division.shared_memory + SPARE < device[1] and division.stages >= 3 and division.stage % 1024 == 0
    for product in division.products:
        assert product.bytes <= division.stage and product.chunk % product.tiles == 0
        assert product.piece * (product.pieces - 1) < product.columns <= product.piece * product.pieces
        # The kernel divides a warp's number by those that share a row with a multiplication.
        divides = product.mapped or product.bits
        assert all((warp * product.recip >> 8) == warp // product.shares for warp in range(16)) or not divides
        assert divides or 1 << product.recip == product.shares
        assert product.shares * product.tiles <= 16 or not product.bits
        if product.mapped:
            lines, *others = product.boxes
            assert lines.lines * lines.width * 8 // (product.bits or 16) == product.piece
            assert lines.rows <= 256 and lines.lines <= 256
            units = (16 if product.scaled else 8) * product.group  # columns whose scales are 16 bytes
            assert all(scales.lines * units == product.piece for scales in others)
            assert len(others) == (0 if not product.bits else 1 if product.scaled else 2)


def test_which_rows_the_tensor_cores_take() -> None:
    mapped = [product.mapped for product in divide(PLAIN_8B, *HOPPER).products]
    assert all(mapped)
    # Tiles of 16 rows would leave most blocks without any.
    assert [p.mapped for p in divide(SMOLLM2, *HOPPER).products] == [False, False, True, False, True]
    assert not any(p.mapped for p in divide(dataclasses.replace(PLAIN_8B, weights="float16"), *HOPPER).products)


def test_the_layouts_that_both_sides_read() -> None:
    division = divide(SMOLLM2, *HOPPER)
    assert _LAYER.itemsize == 192
    assert _launch_type(division).itemsize == 96 + 4 * division.steps * (1 + 64)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"head_dim": 20}, "heads of 20 numbers"),
        ({"heads": 64, "kv_heads": 2}, "32 heads for each head"),
        ({"forms": (Form(3, 64),) * 5}, "weights of 3 bits"),
        ({"scales": "float32"}, "scales in float32"),
        ({"activation": "xielu"}, "the activation xielu"),
        ({"forms": (Form(),) * 5, "hidden": 400000}, "norms and biases|no ring"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changed: dict[str, object], why: str) -> None:
    with pytest.raises(Unfit, match=why):
        divide(dataclasses.replace(LLAMA_8B, **changed), *HOPPER)  # type: ignore[arg-type]


def test_a_compiled_kernel_is_kept_in_a_private_place(tmp_path: Path) -> None:
    try:
        Nvrtc()
    except BackendError:
        pytest.skip("there is no NVRTC here")
    folder = tmp_path / "cuda"
    source = 'extern "C" __global__ void nothing() {}'
    code = compiled(source, "sm_90a", folder)
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o077 == 0 and folder.stat().st_mode & 0o077 == 0
    file.write_bytes(b"kept")
    assert compiled(source, "sm_90a", folder) == b"kept"
    # What others may have written is not run.
    file.chmod(0o666)
    assert compiled(source, "sm_90a", folder) == code
