"""The stored tensors of quantised layers: found by suffix, held against the dtype and shape the format gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import mlx.core as mx

from runner.errors import WeightsError
from runner.local_files import shown
from runner.weights import Header, Source

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
            raise WeightsError(f"tensor {shown(name)} is missing, without which its layer can't be read")
        fits = len(header.shape) == len(dims) and all(
            size == dim or (dim is None and size > 0) for size, dim in zip(header.shape, dims, strict=True)
        )
        if header.dtype not in dtypes or not fits:
            wanted = ", ".join("n" if dim is None else str(dim) for dim in dims)
            raise WeightsError(
                f"tensor {shown(name)} is {header.dtype} {list(header.shape)}, "
                f"expected {' or '.join(dtypes)} [{wanted}]"
            )
        return header.shape
