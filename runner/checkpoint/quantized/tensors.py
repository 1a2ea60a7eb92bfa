"""The stored tensors of quantised layers: found by suffix, held against the dtype and shape the format gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import mlx.core as mx
import numpy as np

from runner.errors import WeightsError
from runner.local_files import quoted
from runner.weights.tags import Header, Source

FLOATS = ("F16", "BF16", "F32")


class Tensors:
    """A source seen layer by layer."""

    def __init__(self, source: Source) -> None:
        self.source = source

    @property
    def headers(self) -> Mapping[str, Header]:
        return self.source.headers

    def read(self, name: str) -> mx.array:
        """See `Source`."""
        return self.source.read(name)

    def layers(self, suffix: str) -> Iterator[str]:
        """Names of the layers that have a tensor with this suffix."""
        yield from (name.removesuffix(suffix) for name in self.headers if name.endswith(suffix) and name != suffix)

    def shape(self, name: str, dtypes: tuple[str, ...], *dims: int | None) -> tuple[int, ...]:
        """The shape of tensor `name`, which has one of these dtypes and these sizes (None: any but zero).

        Raises:
            WeightsError: it is missing, or has another dtype or shape.
        """
        header = self.headers.get(name)
        if header is None:
            raise WeightsError(f"tensor {quoted(name)} is missing, without which its layer can't be read")
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
        """Whether tensor `name` is there and holds one number."""
        header = self.headers.get(name)
        return header is not None and all(size == 1 for size in header.shape)

    def group_order(self, name: str, width: int, groups: int, group_size: int, *, unset: int | None = None) -> bool:
        """Whether the tensor `name`, the group of each of `width` inputs, has an order of its own.

        False where it is `i // group_size`, where there is none, and where it was never filled in (`unset` throughout).

        Raises:
            WeightsError: it has another dtype or shape, or names a group that there is not.
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
