"""The weights of adapters by which a model computes now: the same for all tokens, or others for some of a pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

import mlx.core as mx

from runner.nn.batch import Apart, together

Weights = Mapping[str, float]
"""Each adapter's weight, by name; 0: it is off."""


class Used:
    """What all adapted layers of a model share; it is set before a pass is built.

    A pass that several requests share has their tokens one behind the other. The base's product is that of all tokens;
    what adapters add is computed run by run, and a token's sums are those it has alone.
    """

    def __init__(self, weights: Weights) -> None:
        self._runs: list[tuple[int, Weights]] = [(0, dict(weights))]

    def set(self, runs: Sequence[tuple[int, Weights]]) -> None:
        """Compute with these weights from now on: of so many tokens each; how many does not matter to a single run."""
        if len(runs) > 1:
            self._runs = [(count, dict(weights)) for count, weights in runs]
        elif len(self._runs) > 1 or self._runs[0][1] != runs[0][1]:
            self._runs = [(0, dict(runs[0][1]))]

    @property
    def key(self) -> Hashable:
        """Two are equal where the model computes the same."""
        return tuple((count, tuple(sorted(weights.items()))) for count, weights in self._runs)

    def same(self, names: Collection[str]) -> Weights:
        """The weights of the adapters `names`, which are the same for all tokens.

        Raises:
            Apart: they are not.
        """
        runs = self.runs(names)
        if len(runs) > 1:
            raise Apart("adapters change what is computed once for all tokens")
        return runs[0][1]

    def of(self, token: int) -> Used:
        """What the pass's token at this place has, for all that is computed with it."""
        ends = itertools.accumulate(count for count, _ in self._runs)
        places = zip(ends, self._runs, strict=True)
        return Used(next((weights for end, (_, weights) in places if token < end), self._runs[-1][1]))

    def added(
        self,
        names: Collection[str],
        x: mx.array,
        y: mx.array,
        add: Callable[[Weights, mx.array, mx.array], mx.array],
    ) -> mx.array:
        """`add(weights, x, y)`, run by run along axis 1, which has the tokens of the pass.

        Args:
            names: the adapters that the layer has.
            x: the layer's input, `[1, T, ...]`.
            y: what the base made of it, `[1, T, out]`.

        Raises:
            Apart: the runs differ for these adapters, and the arrays hold other tokens than those of the pass.
        """
        runs = self.runs(names)
        if len(runs) == 1:
            return add(runs[0][1], x, y)
        if x.shape[:2] != (1, sum(count for count, _ in runs)) or y.ndim != 3:
            raise Apart(f"a layer with adapters sees {x.shape}")
        pieces, start = [], 0
        for count, weights in runs:
            place = slice(start, start + count)
            pieces.append(add(weights, x[:, place], y[:, place]))
            start += count
        return together(pieces)

    def runs(self, names: Collection[str]) -> list[tuple[int, Weights]]:
        """How many neighbouring tokens have which weights, as far as these adapters' differ; one run: all of them."""
        found: list[tuple[int, Weights]] = []
        for count, weights in self._runs:
            if found and all(found[-1][1][name] == weights[name] for name in names):
                found[-1] = (found[-1][0] + count, found[-1][1])
            else:
                found.append((count, weights))
        return found
