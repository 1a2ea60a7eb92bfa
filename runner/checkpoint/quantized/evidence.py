"""What the tensors themselves show: plain numbers, float8 under scales, or packed in a way that only a method explains.

The name of a method in config.json often outlives its tensors (a model unpacked and saved again), so it is asked only
for tensors that do not explain themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from runner.weights.tags import FLOAT, HARMLESS, Header

FLOAT8 = ("F8_E4M3", "F8_E5M2")
SCALE_NAMES = ("weight_scale_inv", "weight_scale")
"""Names beside `weight` of the scales by which float8 weights are multiplied (the first one's name misleads)."""


def float8_layers(headers: Mapping[str, Header]) -> list[str]:
    """Names of the layers whose `weight` is float8 and has scales beside it."""
    stems = (name.removesuffix(".weight") for name, header in headers.items() if header.dtype in FLOAT8)
    return [stem for stem in stems if f"{stem}.weight" in headers and scale_of(stem, headers) in headers]


def scale_of(layer: str, headers: Mapping[str, Header]) -> str:
    """Name of the tensor with the scales of a float8 layer; of a missing one, the name that it should have."""
    first, second = (f"{layer}.{name}" for name in SCALE_NAMES)
    return second if second in headers and first not in headers else first


def packed(headers: Mapping[str, Header]) -> list[str]:
    """Names of the tensors that are not plain numbers, in MLX's form, or tables that no model reads."""
    return [
        name
        for name, header in headers.items()
        if header.dtype not in FLOAT and not HARMLESS.search(name) and not _is_mlx(name, header, headers)
    ]


def _is_mlx(name: str, header: Header, headers: Mapping[str, Header]) -> bool:
    """Whether the tensor is one of MLX's uint32 `weight` and (where those are bytes) `scales`."""
    stem = re.sub(r"\.(weight|scales)$", "", name)
    weight = headers.get(f"{stem}.weight")
    return stem != name and weight is not None and weight.dtype == "U32" and f"{stem}.scales" in headers


def signs(headers: Mapping[str, Header]) -> bool:
    """Whether names are there that only quantized layers have: their weights may be plain by mistake alone."""
    return any(name.endswith((".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv")) for name in headers)


def unexplained(names: list[str], headers: Mapping[str, Header]) -> list[str]:
    """Find the packed tensors that are neither float8 weights with scales nor the scales of such weights."""
    layers = float8_layers(headers)
    known = {f"{layer}.weight" for layer in layers} | {scale_of(layer, headers) for layer in layers}
    return [name for name in names if name not in known]
