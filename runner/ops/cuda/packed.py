"""Products of packed matrices with a few vectors, and of experts' matrices, packed or not, with theirs.

MLX 0.32.4 multiplies packed matrices well for one vector, and for many once they are unpacked. Between these, and for
experts, what it does takes ten times as long as reading the weights, or 40 seconds to compile.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import mlx.core as mx

from runner.errors import BackendError
from runner.ops.cuda.driver import Driver
from runner.ops.cuda.nvrtc import compiled
from runner.ops.cuda.rows_shape import columns_at_once, divided
from runner.ops.cuda.shape import Form, text
from runner.ops.quantized import QuantizedWeight

FEW = 64
"""Vectors up to which a packed matrix is multiplied as it is, and not unpacked before."""

MOST_EXPERTS = 1024
"""Experts that one block finds the vectors of."""

WIDE = 16
"""Tiles of 8 vectors of a block of `grouped.cu`, which has shared memory for both of what it multiplies."""

_STEP, _STAGES = 64, 3
"""Columns of such a block's step, and steps whose tiles are on their way at once."""

_TYPES = {mx.float16: 1, mx.bfloat16: 2}


def fits(x: mx.array, matrix: QuantizedWeight) -> bool:
    """Whether there is a kernel for this matrix, or stack of matrices, and vectors of this type."""
    weight, scales, biases, group_size, bits, mode = matrix
    columns = weight.shape[-1] * 32 // bits
    known = Form(bits, group_size, mode).known and (biases is not None) == (mode == "affine")
    same = x.dtype in _TYPES and (biases is None or scales.dtype == x.dtype)
    experts = weight.shape[0] if weight.ndim == 3 else 0
    return known and same and columns % columns_at_once(bits) == 0 and experts <= MOST_EXPERTS and not _impossible()


def fits_plain(x: mx.array, matrices: mx.array) -> bool:
    """Whether there is a kernel for vectors of this type and a stack of matrices `[E, out, in]` that are not packed."""
    experts, _, columns = matrices.shape
    same = x.dtype == matrices.dtype and x.dtype in _TYPES
    return same and columns % columns_at_once(0) == 0 and experts <= MOST_EXPERTS and not _impossible()


def linear(x: mx.array, matrix: QuantizedWeight) -> mx.array:
    """`x W^T` for up to `FEW` vectors x `[R, in]`: `[R, out]`. A vector's sums do not depend on the others."""
    rows, tiles = x.shape[0], 1 if x.shape[0] <= 8 else 4
    made = _kernels(Product.of(x, matrix, tiles, experts=0))
    return made.run(_arrays(x, matrix), rows, -(-rows // (8 * tiles)), (rows, made.outputs), x.dtype)


def by_expert(x: mx.array, matrices: QuantizedWeight | mx.array, chosen: mx.array) -> mx.array:
    """The product of each vector of x `[R, 1, in]` with the matrix of its expert `chosen` `[R]`: `[R, 1, out]`.

    `chosen` is uint32, in ascending order. Matrices that are not packed are `[E, out, in]`.
    """
    stack, plain = (matrices, True) if isinstance(matrices, mx.array) else (matrices.weight, False)
    rows, experts = x.shape[0], stack.shape[0]
    tiles = 4
    if plain:
        tiles = 2 if rows <= 8 * experts else WIDE if rows >= 32 * experts and stack.shape[1] % 8 == 0 else 4
    made = _kernels(Product.of(x, matrices, tiles, experts=experts))
    most = rows // (8 * tiles) + min(experts, rows)
    (parts,) = mx.fast.precompiled_cuda_kernel(
        name=f"parts_{made.name}",
        compiled_source=made.code,
        inputs=[chosen.astype(mx.uint32)],
        output_shapes=[(most, 3)],
        output_dtypes=[mx.int32],
        scalars=[rows, most],
        grid=(1024, 1, 1),
        threadgroup=(1024, 1, 1),
        ensure_row_contiguous=True,
    )
    return made.run([*_arrays(x, matrices), parts], rows, most, (rows, 1, made.outputs), x.dtype)


def _arrays(x: mx.array, matrix: QuantizedWeight | mx.array) -> list[mx.array]:
    """What the kernel is given; of a form without scales or biases something that it does not read."""
    if isinstance(matrix, mx.array):
        return [x, matrix, matrix, matrix]
    return [x, matrix.weight, matrix.scales, matrix.scales if matrix.biases is None else matrix.biases]


class Product(NamedTuple):
    """What a kernel is made for: K `inputs` and N `outputs`, for `tiles` tiles of 8 vectors a block.

    `bits` is 0 for matrices that are not packed.
    """

    kind: int
    bits: int
    group: int
    scaled: int
    inputs: int
    outputs: int
    experts: int
    tiles: int

    @classmethod
    def of(cls, x: mx.array, matrix: QuantizedWeight | mx.array, tiles: int, *, experts: int) -> Product:
        if isinstance(matrix, mx.array):
            _, outputs, inputs = matrix.shape
            return cls(_TYPES[x.dtype], 0, 1, 0, inputs, outputs, experts, tiles)
        inputs = matrix.weight.shape[-1] * 32 // matrix.bits
        form = Form(matrix.bits, matrix.group_size, matrix.mode)
        kind, outputs = _TYPES[x.dtype], matrix.weight.shape[-2]
        return cls(kind, form.bits, form.group, form.scaled, inputs, outputs, experts, tiles)

    @property
    def name(self) -> str:
        """Of the kernel, behind `product_`; and of that which assigns blocks to experts, behind `parts_`."""
        return "_".join(map(str, self))

    @property
    def warps(self) -> tuple[int, int, int]:
        """How a block divides a product: tiles of 16 rows a warp, warps along the rows, and along the columns."""
        if self.experts:  # there are blocks enough, whatever each of them takes
            return 2, 4, min(2, self.inputs // columns_at_once(self.bits))
        return divided(self.outputs, self.inputs, self.bits)

    @property
    def source(self) -> str:
        """The kernels' text."""
        tiles, down, along = (0, 0, 0) if self.tiles == WIDE else self.warps
        constants = {
            "XT": self.kind, "BITS": self.bits, "G": self.group, "S": self.scaled, "K": self.inputs, "N": self.outputs,
            "RT": self.tiles, "MT": tiles, "WM": down, "WK": along,
        }  # fmt: skip
        lines = [f"constexpr int {key} = {value};" for key, value in constants.items()]
        if self.tiles == WIDE:
            lines += [f"constexpr int BLOCK = {8 * WIDE}, STEP = {_STEP}, STAGES = {_STAGES};"]
        lines += [f"#define EXPERTS {self.experts}"]
        lines += [f"#define PARTS parts_{self.name}", f"#define PRODUCT product_{self.name}"]
        name = "grouped.cu" if self.tiles == WIDE else "packed.cu"
        return "\n".join([*lines, *map(text, ("forms.cu", "tiles.cu", "parts.cu", name))])


class _Kernels(NamedTuple):
    """Compiled code, and how it is started."""

    name: str
    code: bytes
    outputs: int
    lines: int
    threads: int
    shared_memory: int

    def run(self, arrays: list[mx.array], rows: int, parts: int, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        (y,) = mx.fast.precompiled_cuda_kernel(
            name=f"product_{self.name}",
            compiled_source=self.code,
            inputs=arrays,
            output_shapes=[shape],
            output_dtypes=[dtype],
            scalars=[rows],
            grid=(-(-self.outputs // self.lines) * self.threads, parts, 1),
            threadgroup=(self.threads, 1, 1),
            shared_memory=self.shared_memory,
            ensure_row_contiguous=True,
        )
        return y


@functools.cache
def _kernels(product: Product) -> _Kernels:
    """The kernels of a product, compiled unless they were kept."""
    code = compiled(product.source, Driver().architecture)
    if product.tiles == WIDE:
        lines = 8 * WIDE  # as many rows of weights as vectors
        return _Kernels(product.name, code, product.outputs, lines, 256, _STAGES * 2 * lines * _STEP * 2)
    tiles, down, along = product.warps
    memory = along * down * tiles * 16 * (8 * product.tiles + 1) * 4
    return _Kernels(product.name, code, product.outputs, down * tiles * 16, 32 * down * along, memory)


@functools.cache
def _impossible() -> bool:
    """Whether the GPU is too old, or nothing can be compiled for it here."""
    try:
        driver = Driver()
        compiled('extern "C" __global__ void nothing() {}', driver.architecture)
    except BackendError:
        return True
    return driver.capability < (8, 0)
