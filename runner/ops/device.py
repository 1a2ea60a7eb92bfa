"""Chooses the operations and settings for this machine's device, once, when a model is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from runner.cache.kv import History
from runner.cache.several import New
from runner.cache.storage import PLAIN, Storage
from runner.errors import UsageError
from runner.ops import metal as apple
from runner.ops import per_expert as per_expert
from runner.ops import side_by_side
from runner.ops.attention import MaskRule
from runner.ops.fusion import fusing
from runner.ops.memory import capacity
from runner.ops.metal import Metal
from runner.ops.picking import Draw
from runner.ops.quantized import QuantizedWeight
from runner.ops.side_by_side import Buffers
from runner.ops.table import PORTABLE, Ops, biased

PREFILL_CHUNK = 512
"""Prompt tokens per forward pass on a CPU: enough to fill it, few enough to cancel soon and keep activations small."""


CUDA_PAUSE = 0.05
"""`Device.pause` of an NVIDIA GPU: the host takes some 20 ms for a pass with prompts, whatever their length."""

KEPT = 16
"""The part of an NVIDIA GPU's memory that freed buffers may take, one in so many: to get them anew takes as long as a
third of a pass of 2,048 tokens of an 8B model."""

EAGER = 256
"""`Ops.eager` of an NVIDIA GPU, which would wait some 5 ms until the host has built a pass of 32 layers."""

EXACT = "exact"
ACTIVATIONS = (EXACT, "int8")
"""Values of `activations` in `runner.load`."""


@dataclass(frozen=True)
class Device:
    """A table of operations, with the settings that suit it.

    Attributes:
        activations: dtype of activations, for kernels that multiply weights of any dtype with it; None: weights and
            activations have one dtype, which suits the model (`runner.engine.dtypes`).
        storage: how caches keep float32 rows, unless float32 was asked for.
        threads: threads of our kernels; None where MLX decides.
        chunk: prompt tokens per forward pass.
        cut: prompts are cut at multiples of so many tokens, where attention is compiled for each length it meets.
        pause: seconds by which a piece of a prompt may prolong a step of others in any case; see `runner.engine.pace`.
        keeps: bytes of MLX's freed buffers up to which they are not given back after each chunk, and now and then
            between tokens; None: they never are. On a GPU they pile up, as each length has sizes of its own.
        tf32: whether MLX multiplies float32 matrices in TF32 there, 10 bits of mantissa, unless MLX_ENABLE_TF32=0.
        metal: the Apple GPU that it computes on; None: it is none.
        dtype: of weights and activations alike, where none was asked for; None: what suits the model.
        placing: what moves each array of a model of so many bytes once it is read, if anything does.
        shared_out: the operations of a model that is shared out over processes, if they are others.
        int8: the operations with activations of 8 bits in products with packed weights; None: it has none.
        notice: why the device is slower than this machine can be; None if it is not.
        fix: the command that removes the notice.
        needs: what must be installed before that command.
        compiles: whether whole decode steps can be one kernel there (`runner.ops.cuda`).
        mlx: MLX's name for the device.
    """

    name: str
    ops: Ops
    activations: mx.Dtype | None = None
    storage: Storage = PLAIN
    threads: int | None = None
    chunk: int = PREFILL_CHUNK
    cut: int = 1
    pause: float = 0.0
    keeps: int | None = None
    tf32: bool = False
    metal: Metal | None = None
    dtype: mx.Dtype | None = None
    placing: Callable[[int], Callable[[mx.array], None] | None] | None = None
    shared_out: Ops | None = None
    int8: Ops | None = None
    notice: str | None = None
    fix: str | None = None
    needs: str | None = None
    compiles: bool = False
    mlx: mx.Device = field(default_factory=mx.default_device)

    def rounding(self, activations: str) -> Device:
        """The device with activations as `runner.load`'s argument of that name says.

        Raises:
            UsageError: the name is unknown, or the device has no such operations.
        """
        if activations not in ACTIVATIONS:
            raise UsageError(f"activations must be {' or '.join(ACTIVATIONS)}, not {activations!r:.80}")
        if activations == EXACT:
            return self
        if self.int8 is None:
            raise UsageError(
                f"activations={activations!r} needs runner's CPU kernels, and this model would run on {self.name}"
                + (f" ({self.notice})" if self.notice else "")
            )
        return dataclasses.replace(self, ops=self.int8)

    def __repr__(self) -> str:
        return f"Device({self.name!r})"


def current() -> Device:
    """The `Device` for MLX's default device.

    Raises:
        BackendError: MLX is built for Macs and finds no Metal device.
    """
    metal = apple.find()
    if mx.default_device() != mx.Device(mx.cpu):
        if mx.cuda.is_available():
            return Device(
                "MLX's CUDA kernels", CUDA, storage=CUDA.storage, chunk=2048, cut=512, pause=CUDA_PAUSE,
                keeps=(capacity(mx.default_device()) or 0) // KEPT, tf32=True, compiles=True,
                shared_out=CUDA_SHARED_OUT,
            )  # fmt: skip
        # Half of a CUDA device's: an M1 reads some hundred tokens a second, and a prompt is cancelled between chunks.
        tf32 = metal is not None and metal.tf32
        return Device("MLX's GPU kernels", METAL, chunk=1024, keeps=0, tf32=tf32, metal=metal)
    from runner.ops import cpu as kernels

    why = kernels.unavailable()
    if why is None:
        from runner.ops.cpu.ops import DENSE, INT8, KERNELS
        from runner.ops.cpu.placing import placing

        threads = kernels.num_threads()
        name = f"runner's CPU kernels ({kernels.isa()}, {threads} threads)"
        return Device(name, KERNELS, mx.float32, DENSE, threads, placing=placing, int8=INT8)
    return Device(
        "plain MLX on the CPU",
        CPU_WITHOUT_KERNELS,
        dtype=mx.float32,  # a CPU computes in it anyway: 16 bits are half as fast there, and as coarse as on a GPU
        notice=f"plain MLX, many times slower than this machine can: {why.reason}",
        fix=why.fix,
        needs=why.needs,
    )


MANY = 4
"""Rows from which packed matrices that our kernels do not take are unpacked and multiplied on CUDA.

Measured on an H200 with MLX 0.32.4 (28672 x 4096 in 4 bits, ms): packed 0.116 for 1 row, 0.148 for 2, 0.276 for 4;
unpacked 0.3 for 4 to 16 rows, 0.45 for 512 and 0.86 for 2048, where packed takes 1.02 and 3.94. From 8 rows on MLX has
kernels that take 40 seconds and more to compile at their first call: nobody waits for those.
"""


def _cuda_quantized_linear(x: mx.array, matrix: QuantizedWeight, bias: mx.array | None) -> mx.array:
    """MLX's quantized product for one row, our kernel's for a few, and that of the unpacked matrix for many.

    The last also where MLX's is wrong.
    """
    from runner.ops.cuda import packed  # not where there is no such GPU

    outputs = matrix.weight.shape[0]
    if wrong_on_cuda(x, outputs, matrix.group_size, matrix.mode):
        return _unpacked_linear(x, matrix, bias)
    # Rows lie flat: `[8, 1, K]` would be eight products of one row.
    rows = x.reshape(-1, x.shape[-1])
    if 1 < rows.shape[0] <= packed.FEW and packed.fits(x, matrix):
        y = packed.linear(rows, matrix)
        y = y if bias is None else y + bias
    elif rows.shape[0] >= MANY:
        y = PORTABLE.linear(rows, matrix.dequantize().astype(x.dtype), bias)
    else:
        y = PORTABLE.quantized_linear(rows, matrix, bias)
    return y.reshape(*x.shape[:-1], outputs)


def _cuda_gather_linear(
    x: mx.array, weight: mx.array, experts: mx.array, bias: mx.array | None = None, *, sorted_indices: bool = False
) -> mx.array:
    """Expert by expert, where rows are sorted: MLX's takes 5 ms for a layer of 128 experts and a prompt of 2,048."""
    from runner.ops.cuda import packed  # not where there is no such GPU

    if sorted_indices and packed.fits_plain(x, weight):
        return biased(packed.by_expert(x, weight, experts), bias, experts)
    return PORTABLE.gather_linear(x, weight, experts, bias, sorted_indices=sorted_indices)


def _cuda_take_rows(x: mx.array, ids: mx.array) -> mx.array:
    from runner.ops.cuda import experts  # not where there is no such GPU

    return experts.take_rows(x, ids)


def _cuda_put_rows(x: mx.array, ids: mx.array) -> mx.array:
    from runner.ops.cuda import experts  # not where there is no such GPU

    return experts.put_rows(x, ids)


def _cuda_mixture(outputs: mx.array, weights: mx.array) -> mx.array:
    from runner.ops.cuda import experts  # not where there is no such GPU

    return experts.mixture(_FUSED.mixture, outputs, weights)


def _cuda_gather_quantized_linear(
    x: mx.array,
    matrices: QuantizedWeight,
    experts: mx.array,
    bias: mx.array | None = None,
    *,
    sorted_indices: bool = False,
) -> mx.array:
    """Expert by expert, where rows are sorted: MLX's takes 8 ms for a layer of 128 experts and a prompt of 512."""
    from runner.ops.cuda import packed  # not where there is no such GPU

    if sorted_indices and packed.fits(x, matrices):
        return biased(packed.by_expert(x, matrices, experts), bias, experts)
    return PORTABLE.gather_quantized_linear(x, matrices, experts, bias, sorted_indices=sorted_indices)


def _cuda_attention_step(
    query: mx.array, new: New, counts: Sequence[int], steps: Sequence[bool], **how: Any
) -> mx.array | None:
    """By our kernel, for those sequences that have a decoded token each."""
    from runner.ops.cuda.several import attention_step  # not where there is no such GPU

    return attention_step(CUDA.attention_rows, query, new, counts, steps, **how)


def wrong_on_cuda(x: mx.array, outputs: int, group_size: int, mode: str) -> bool:
    """Whether MLX 0.32.4's product of `x` with quantized weights is wrong or fails on an NVIDIA GPU.

    Measured on an H100 over bits, groups, shapes and dtypes: affine matrices with a single group per row (inputs =
    group_size) give wrong numbers for two rows of x or more; groups of 128 in float32 fail to launch from about 16 rows
    on; with 32 outputs there is no kernel for 37 rows, in affine mode and mxfp8 alike, and with 32 inputs as well none
    for one row (with 96 and 64 there is). Which numbers of outputs have a kernel was not searched: any that is not a
    multiple of 64 is taken to have none, which is always right and at worst costs dequantizing the matrix.
    """
    # One row and several fail in different cases.
    several, odd = x.size > x.shape[-1], outputs % 64 != 0
    one_group, wide = x.shape[-1] == group_size, group_size == 128 and x.dtype == mx.float32
    if not several:
        return odd and x.shape[-1] == 32
    return odd or (mode == "affine" and (one_group or wide))


def _unpacked_linear(x: mx.array, matrix: QuantizedWeight, bias: mx.array | None) -> mx.array:
    """Dequantize the matrix for each product, in float32: on a CPU 5 times faster than MLX's own quantized product."""
    full = matrix.dequantize().astype(mx.float32)
    return PORTABLE.linear(x.astype(mx.float32), full, bias).astype(x.dtype)


CPU_WITHOUT_KERNELS = dataclasses.replace(
    PORTABLE,
    name="mlx, unpacking",
    quantized_linear=_unpacked_linear,
    gather_linear=per_expert.gather_linear(PORTABLE.linear),
    gather_quantized_linear=per_expert.gather_quantized_linear(_unpacked_linear),
)

METAL = dataclasses.replace(fusing(PORTABLE, delta_kernel=True), name="mlx, metal")

_FUSED = fusing(PORTABLE, delta_kernel=False)


def _cuda_attention(query: mx.array, key: mx.array, value: mx.array, mask: MaskRule, **settings: Any) -> mx.array:
    """Of prompts whose lengths are filled up."""
    from runner.ops.cuda import prompts  # not where there is no such GPU

    return prompts.attention_of_one(_FUSED.attention, query, key, value, mask, **settings)


def _cuda_attention_rows(
    query: mx.array, histories: Sequence[History], counts: Sequence[int], **settings: Any
) -> mx.array:
    """The first passes of several prompts by one call, as far as they are of about the same length."""
    from runner.ops.cuda import prompts  # not where there is no such GPU

    return prompts.attention(_FUSED.attention_rows, query, histories, counts, **settings)


def _cuda_draw(logits: mx.array, rows: Sequence[Draw]) -> tuple[mx.array, mx.array]:
    """By a kernel that does not sort."""
    from runner.ops.cuda.draw import draw  # not where there is no such GPU

    return draw(logits, rows)


def _cuda_write_rows(
    buffers: Sequence[Buffers], keys: mx.array, values: mx.array, at: Sequence[int], counts: Sequence[int]
) -> list[Buffers]:
    """The first rows of several prompts by one kernel."""
    from runner.ops.cuda import prompts  # not where there is no such GPU

    return prompts.write_rows(buffers, keys, values, at, counts)


def _cuda_rope(x: mx.array, offset: int | mx.array | tuple[int, ...], *, dims: int, **settings: Any) -> mx.array:
    """Tokens with a position each, as many at once as MLX can start a kernel for."""
    if not isinstance(offset, tuple):
        return PORTABLE.rope(x, offset, dims=dims, **settings)
    most = most_turned_on_cuda(x.shape[1], dims)
    return side_by_side.rope(PORTABLE.rope, x, offset, most=most, dims=dims, **settings)


def most_turned_on_cuda(heads: int, dims: int) -> int | None:
    """How many sequences of one token MLX 0.32.4's RoPE takes on an NVIDIA GPU; None: any number.

    A block has 1,024 threads at most, first over the pairs of a head, then over sequences and fours of heads; of these
    it is given as many as there are (a power of two), and CUDA starts none of more than 64: "invalid argument". So it
    was for 36 tokens of four heads with 8 rotated numbers. (MLX: `backend/cuda/rope.cu`, `get_block_dims_common`.)
    """
    pairs = max(1, dims // 2)
    return None if pairs >= 16 else max(1, 127 // -(-heads // 4))


CUDA = dataclasses.replace(
    _FUSED,
    name="mlx, cuda",
    eager=EAGER,
    attention=_cuda_attention,
    rope=_cuda_rope,
    attention_rows=_cuda_attention_rows,
    draw=_cuda_draw,
    storage=dataclasses.replace(PLAIN, write_rows=_cuda_write_rows),
    quantized_linear=_cuda_quantized_linear,
    gather_linear=_cuda_gather_linear,
    mixture=_cuda_mixture,
    take_rows=_cuda_take_rows,
    put_rows=_cuda_put_rows,
    gather_quantized_linear=_cuda_gather_quantized_linear,
)

CUDA_SHARED_OUT = dataclasses.replace(CUDA, name="mlx, cuda, shared out", attention_step=_cuda_attention_step)
"""Over ranks: tokens of several sequences stand beside pieces of prompts, or no graph of kernels takes the model."""
