"""The tensors that adapters have for each matrix of a model, kept by name and read on demand."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from runner.nn.linear import Embedding
from runner.weights.tags import Source


@dataclass(frozen=True)
class Factors:
    """One adapter's factors A and B for one site, by their names in its file; read on demand."""

    adapter: str
    source: Source
    kind: type
    scale: float
    a: str
    b: str
    magnitude: str | None = None

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.source.headers[self.a].shape[0]

    def up(self) -> mx.array:
        """The factor `[out, r]`: B, or A transposed for an embedding (`out` is then the vocabulary)."""
        return self.source.read(self.a).T if self.kind is Embedding else self.source.read(self.b)

    def down(self) -> mx.array:
        """The factor `[r, width]`: A, or B transposed for an embedding."""
        return self.source.read(self.b).T if self.kind is Embedding else self.source.read(self.a)

    def lengths(self) -> mx.array | None:
        """DoRA's magnitudes m, `[out]`; None without DoRA."""
        return None if self.magnitude is None else self.source.read(self.magnitude)


@dataclass(frozen=True)
class SavedRows:
    """One adapter's rows for single tokens, by the name of their tensor."""

    adapter: str
    source: Source
    name: str
    tokens: tuple[int, ...]

    def read(self) -> mx.array:
        """The rows, `[n, width]`."""
        return self.source.read(self.name)


@dataclass(frozen=True)
class StackFactors:
    """One adapter's factors for all experts of a field, as PEFT's `ParamWrapper` stores them.

    A is `[E * r, width]`, expert after expert; B is `[out, r * E]`, with the experts as the faster of the two indices.
    """

    adapter: str
    source: Source
    scale: float
    a: str
    b: str
    experts: int

    @functools.cached_property
    def downs(self) -> mx.array:
        """A of each expert, `[E, r, width]`."""
        a = self.source.read(self.a)
        return a.reshape(self.experts, -1, a.shape[1])

    @functools.cached_property
    def ups(self) -> mx.array:
        """B of each expert, `[E, out, r]`."""
        b = self.source.read(self.b)
        return b.reshape(b.shape[0], -1, self.experts).transpose(2, 0, 1)


@dataclass(frozen=True)
class ExpertFactors:
    """The factors for rows `[start, stop)` of one expert of a stack, with the interface of `Factors`."""

    stack: StackFactors
    expert: int
    start: int
    stop: int
    magnitude: None = None

    @property
    def adapter(self) -> str:
        """The adapter's name."""
        return self.stack.adapter

    @property
    def scale(self) -> float:
        """The factor that multiplies B A."""
        return self.stack.scale

    def up(self) -> mx.array:
        """The rows of B, `[stop - start, r]`."""
        return self.stack.ups[self.expert, self.start : self.stop]

    def down(self) -> mx.array:
        """A of the expert, `[r, width]`."""
        return self.stack.downs[self.expert]

    def lengths(self) -> None:
        """None: DoRA is not supported for experts."""
        return None


@dataclass(frozen=True)
class Parts:
    """Everything that adapters bring, except whole tensors.

    Attributes:
        factors: by the name of their site.
        rows: rows for single tokens, by the name of their site.
        stacked: factors for all experts of a field, by the name of its stack.
    """

    factors: dict[str, list[Factors]] = field(default_factory=dict)
    rows: dict[str, list[SavedRows]] = field(default_factory=dict)
    stacked: dict[str, list[StackFactors]] = field(default_factory=dict)

    def sites(self) -> list[str]:
        """Names of the sites that some adapter changes, at whatever weight."""
        return list(dict.fromkeys([*self.factors, *self.rows]))

    def active(self, name: str, weights: Mapping[str, float]) -> tuple[list[Factors], list[SavedRows]]:
        """The factors and token rows for the site `name` whose adapters have a weight other than 0."""
        factors = [item for item in self.factors.get(name, ()) if weights[item.adapter]]
        return factors, [item for item in self.rows.get(name, ()) if weights[item.adapter]]
