"""The stored tensors of quantized layers: found by suffix, and checked for the dtype and shape that the format says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import mlx.core as mx
import numpy as np

from runner.errors import WeightsError
from runner.local_files import quoted
from runner.weights.loading import reading
from runner.weights.tags import Header, Source

FLOATS = ("F16", "BF16", "F32")


class Tensors:
    """A `Source` with look-ups and checks for quantized layers."""

    def __init__(self, source: Source) -> None:
        self.source = source

    @property
    def headers(self) -> Mapping[str, Header]:
        return self.source.headers

    def read(self, name: str) -> mx.array:
        """Read the tensor `name`, now: what is read when a checkpoint is opened is small."""
        with reading(name):
            array = self.source.read(name)
            mx.eval(array)
        return array

    def layers(self, suffix: str) -> Iterator[str]:
        """Yield the names of the layers that have a tensor with this suffix."""
        yield from (name.removesuffix(suffix) for name in self.headers if name.endswith(suffix) and name != suffix)

    def shape(self, name: str, dtypes: tuple[str, ...], *dims: int | None) -> tuple[int, ...]:
        """The shape of tensor `name`, which must have one of `dtypes` and the sizes `dims` (None: any size above zero).

        Raises:
            WeightsError: the tensor is missing, or has another dtype or shape.
        """
        header = self.headers.get(name)
        if header is None:
            raise WeightsError(f"tensor {quoted(name)} is missing, so its quantized layer cannot be read")
        fits = len(header.shape) == len(dims) and all(
            size == dim or (dim is None and size > 0) for size, dim in zip(header.shape, dims, strict=True)
        )
        if header.dtype not in dtypes or not fits:
            wanted = ", ".join("n" if dim is None else str(dim) for dim in dims)
            raise WeightsError(
                f"tensor {quoted(name)} is {header.dtype} {list(header.shape)}, "
                f"expected {' or '.join(dtypes)} [{wanted}]"
            )
        return header.shape

    def single(self, name: str) -> bool:
        """Whether tensor `name` exists and holds a single number."""
        header = self.headers.get(name)
        return header is not None and all(size == 1 for size in header.shape)

    def group_order(self, name: str, width: int, groups: int, group_size: int, *, unset: int | None = None) -> bool:
        """Whether the tensor `name`, which gives the group of each input, differs from the usual `i // group_size`.

        Also False where the tensor does not exist, or holds nothing but `unset`, since it was never filled in.

        Args:
            width: number of inputs.
            groups: number of groups.

        Raises:
            WeightsError: the tensor has another dtype or shape, or holds a number that is not a group's.
        """
        if name not in self.headers:
            return False
        self.shape(name, ("I32", "I64"), width)
        index = np.array(self.read(name)).astype(np.int64)
        if (unset is not None and (index == unset).all()) or np.array_equal(index, np.arange(width) // group_size):
            return False
        if index.min() < 0 or index.max() >= groups:
            raise WeightsError(f"{quoted(name)} names groups {index.min()} to {index.max()}, but there are {groups}")
        return True
