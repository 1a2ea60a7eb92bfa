"""Which dtype a model computes in: decided once, when it is loaded, and not by how its file is packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx

from runner.errors import UsageError
from runner.families import family_of
from runner.ops.device import Device
from runner.weights.tags import HARMLESS, Header

DTYPES: Mapping[str, mx.Dtype] = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


class Dtypes(NamedTuple):
    """What a model computes in.

    Attributes:
        activations: dtype of activations, and of what caches are given.
        weights: what plain matrices, scales, norms and biases are brought to as they are read; None: they stay as they
            are stored, for kernels that multiply them so.
    """

    activations: mx.Dtype
    weights: mx.Dtype | None


def choose(asked: str | None, device: Device, raw: Mapping[str, Any], headers: Mapping[str, Header]) -> Dtypes:
    """The dtypes for a model with the `config.json` `raw`: what was asked for, else what suits the device.

    Raises:
        UsageError: `asked` is no name of a dtype that models compute in.
    """
    if asked is not None:
        if asked not in DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, not {asked!r}")
        return Dtypes(DTYPES[asked], DTYPES[asked])
    if device.activations is not None:
        return Dtypes(device.activations, None)
    if device.dtype is not None:
        return Dtypes(device.dtype, device.dtype)
    found = suitable(raw, headers)
    return Dtypes(found, found)


def suitable(raw: Mapping[str, Any], headers: Mapping[str, Header]) -> mx.Dtype:
    """The dtype for a device that multiplies numbers of one dtype: bfloat16, with exceptions.

    float16 where the family's activations are known to stay in its range, and config.json names it, or names nothing
    and no matrix or scale is stored in bfloat16, as in GGUF files: that would round them, and all that is computed, to
    8 bits. float32 where all matrices are stored so and config.json names nothing smaller: only who asks for it gets a
    rounded copy of them.
    """
    declared = str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.")
    stored = {info.dtype for name, info in headers.items() if len(info.shape) > 1 and not HARMLESS.search(name)}
    if declared not in ("float16", "bfloat16") and stored == {"F32"}:
        return mx.float32
    finer = declared == "float16" or (declared not in DTYPES and "BF16" not in stored)
    return mx.float16 if finer and family_of(raw).float16 else mx.bfloat16
