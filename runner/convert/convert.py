"""Writes a model anew: quantized, dequantized or in another dtype, a piece of one tensor in memory at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from runner.adapters import AdapterFiles, fit, with_added_tokens
from runner.checkpoint.model_files import ModelFiles
from runner.checkpoint.shard_writer import Piece, write_shards
from runner.checkpoint.writer import new_directory
from runner.convert.checks import Packing
from runner.convert.plan import Conversion, Job, plan_conversion
from runner.convert.quantize import Quantizer, dequantize, quantize
from runner.families import find
from runner.local_files import quoted
from runner.weights.finite import check_rounded
from runner.weights.loading import Progress, reading
from runner.weights.tags import Source
from runner.weights.transforms import Transform
from runner.weights.tree import leaves

SHARD_BYTES = 5 << 30
"""Largest size of one file: where mlx-lm and the hub split too."""

PIECE_BYTES = 1 << 20
"""Bytes of the source that are converted at a time."""


def merged(files: ModelFiles, adapters: Sequence[AdapterFiles]) -> ModelFiles:
    """`files` with adapters added to the matrices they change, which come out dequantized.

    Raises:
        CheckpointError, WeightsError, ConfigError: an adapter does not fit the model.
    """
    if not adapters:
        return files
    fitted = fit(files.config, find(files.config), files.source, adapters)
    base = fitted.merged()

    def check_unchanged() -> None:
        files.check_unchanged()
        for adapter in adapters:
            adapter.source.check_unchanged()

    made = with_added_tokens(files, fitted)
    return dataclasses.replace(made, config=base.raw, source=base.source, check_unchanged=check_unchanged)


def convert(
    files: ModelFiles,
    out: Path,
    *,
    quantizer: Quantizer | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """Write the model `files` into the new directory `out`, which appears complete or not at all.

    Args:
        quantizer: how to quantize the matrices of layers, embeddings and experts (never routers and gates of experts).
            Without it they stay as they are.
        dtype: "float32", "float16" or "bfloat16" for all floating-point tensors; quantized matrices are dequantized to
            it (and quantized again, with `quantizer`). Without it, what is quantized stays as it is.
        progress: called with the source's bytes done so far and in total.

    Raises:
        CheckpointError: the source does not fit its model, or has numbers that are not finite or that `quantizer` or
            `dtype` cannot hold, or its files changed meanwhile, or `out` exists and is not empty, or cannot be written.
        UsageError: no matrix is left to quantize, or `dtype` is unknown.
    """
    work = plan_conversion(files.config, files.source, quantizer=quantizer, dtype=dtype)
    with new_directory(out, work.config, files.side_files()) as directory:
        write_shards(directory, work.headers, pieces(work, files.source, progress), max_shard_bytes)
        files.check_unchanged()
    return work


def pieces(work: Conversion, source: Source, progress: Progress | None = None) -> Iterator[Piece]:
    """Yield the tensors of `work.headers` a piece at a time, made from those of `source` and in their order."""
    transforms = {leaf.name: array.transform for array in work.layout.arrays() for leaf in leaves(array.tree)}
    names = [[leaf.name for leaf, _ in job.arrays.values()] for job in work.jobs]
    total = sum(source.headers[name].nbytes for group in names for name in group)
    done = 0
    for job, group in zip(work.jobs, names, strict=True):
        yield from _run(job, work, source, transforms)
        mx.clear_cache()  # else MLX keeps this tensor's buffers for the next one
        done += sum(source.headers[name].nbytes for name in group)
        if progress is not None:
            progress(done, total)


def _run(job: Job, work: Conversion, source: Source, transforms: Mapping[str, Transform]) -> Iterator[Piece]:
    """Yield what one job writes, made from as many rows at a time as `PIECE_BYTES` has room for."""
    with reading(job.arrays["weight"][0].name):
        stored = {field: source.read(leaf.name) for field, (leaf, _) in job.arrays.items()}
        mx.eval(*stored.values())
    # Reading applies the source's transform and writing undoes the one that the written tensor will be read with.
    leaf, order = job.arrays["weight"]
    new_order = transforms[job.outputs["weight"].target.names[0]]
    turned = order.name != new_order.name  # equal ones move whole rows at most, and back again
    first = stored["weight"].shape[0] if stored["weight"].ndim else 1
    size = sum(array.nbytes for array in stored.values())
    # A transform or a split may take rows from anywhere in a matrix; a stack is cut between experts instead.
    parts = len(job.outputs["weight"].target.names)
    whole = (turned or parts > 1) and leaf.stack is None
    step = first if whole else max(1, first * PIECE_BYTES // max(size, 1))
    packing = None if job.into is None else Packing(leaf.name, job.into)
    for start in range(0, first, step):
        rows = {field: array[start : start + step] if array.ndim else array[None] for field, array in stored.items()}
        if turned:
            rows = {field: job.arrays[field][1].apply(array) for field, array in rows.items()}
        for field, array in _converted(job, rows, new_order if turned else None, packing).items():
            # A piece lies at its row's place in the written tensor, within its expert's slot of a stack.
            target = job.outputs[field].target
            split = mx.split(array, parts, axis=0 if leaf.stack is None else 1) if parts > 1 else [array]
            for name, part in zip(target.names, split, strict=True):
                place = start * (part.nbytes // part.shape[0])
                if target.slot is not None:
                    header = work.headers[name]
                    place += target.slot * (header.nbytes // header.shape[0])
                yield Piece(name, place, part)
    if packing is not None:
        packing.finish()


def _converted(
    job: Job, rows: Mapping[str, mx.array], order: Transform | None, packing: Packing | None
) -> dict[str, mx.array]:
    """Convert some rows of a job's arrays to the form they are written in.

    What is only copied is not checked: a copy is no worse than its source.
    """
    stored = rows["weight"] if job.form is None else dequantize(rows, job.form, mx.float32)
    if order is not None:
        stored = order.invert(stored)
    array = stored if job.dtype is None else stored.astype(job.dtype)
    if packing is not None or array.dtype != stored.dtype or job.form is not None:
        check_rounded(quoted(job.arrays["weight"][0].name), stored, array)
    if packing is None:
        made = {"weight": array}
    else:
        made = quantize(array, packing.form)
        packing.check(array, made)
    mx.eval(*made.values())
    return made
