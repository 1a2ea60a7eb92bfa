"""What each layer remembers between tokens, as plain data: said by configs, made into caches, counted by budgets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Rows:
    """Keys and values of attention: a row per token.

    Attributes:
        heads: key-value heads; 1 where all heads share a latent (MLA).
        key_size: numbers in a head's key.
        value_size: numbers in a head's value.
        window: how many tokens attention looks back, the newest included; None: to the first token.
        chunk: into how many tokens positions are divided, counted from the first: attention looks back to the start of
            the query's own chunk (Llama 4); None: they are not divided. Excludes a window.
        joined: whether attention reads a token's key and value as one row, so that they should lie side by side.
    """

    heads: int
    key_size: int
    value_size: int
    window: int | None = None
    chunk: int | None = None
    joined: bool = False

    def numbers(self, tokens: int) -> int:
        """How many numbers are kept for a sequence of `tokens`."""
        kept = min([tokens, *(limit for limit in (self.window, self.chunk) if limit is not None)])
        return kept * self.heads * (self.key_size + self.value_size)


@dataclass(frozen=True)
class State:
    """Arrays of a fixed size that each token changes: a recurrence, the last rows of a short convolution.

    Attributes:
        shapes: the shape of each array, without the batch, by name. All are zero before the first token.
        dtypes: the dtype of those that have one of their own ("float32" for what accumulates); the others have that of
            the activations.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]

    def nbytes(self, itemsize: int) -> int:
        """Bytes of the arrays, where activations have `itemsize` bytes per number."""
        sizes = {name: SIZES.get(self.dtypes.get(name, ""), itemsize) for name in self.shapes}
        return sum(math.prod(shape) * sizes[name] for name, shape in self.shapes.items())


@dataclass(frozen=True)
class Shared:
    """Nothing of its own: attention over the keys and values of an earlier layer.

    Attributes:
        layer: the index of the layer whose `Rows` are looked at.
    """

    layer: int


Memory = Rows | State | Shared


def needed(memories: Iterable[Memory], tokens: int, itemsize: int) -> int:
    """Bytes that a sequence of `tokens` needs, at `itemsize` bytes for each number of a row."""
    total = 0
    for memory in memories:
        if isinstance(memory, Rows):
            total += memory.numbers(tokens) * itemsize
        elif isinstance(memory, State):
            total += memory.nbytes(itemsize)
    return total
