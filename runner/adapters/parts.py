"""The tensors that adapters have for each matrix of a model, kept by name and read on demand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx

from runner.checkpoint.overlay import Change
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


class AllExperts(Protocol):
    """One adapter's factors for all experts of a field.

    Attributes:
        downs: A of each expert, `[E, r, width]`.
        ups: B of each expert, `[E, out, r]`, with rows in transformers' order.
    """

    @property
    def adapter(self) -> str: ...
    @property
    def scale(self) -> float: ...
    @property
    def downs(self) -> mx.array: ...
    @property
    def ups(self) -> mx.array: ...


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
class SwitchFactors:
    """One adapter's factors for all experts of a field, as mlx-lm stores them: gate and up have factors of their own.

    Attributes:
        pairs: names of A `[E, r, width]` and B `[E, rows, r]`, and the first row of the field that B changes.
        out: rows of the field, in which gate comes before up.
        reorder: brings B's rows `[E, out, r]` from the field's order to transformers'.
    """

    adapter: str
    source: Source
    scale: float
    pairs: tuple[tuple[str, str, int], ...]
    out: int
    reorder: Callable[[mx.array], mx.array]

    @functools.cached_property
    def downs(self) -> mx.array:
        """A of each expert, `[E, r, width]`: the pairs' one after another."""
        return mx.concatenate([self.source.read(a) for a, _, _ in self.pairs], axis=1)

    @functools.cached_property
    def ups(self) -> mx.array:
        """B of each expert, `[E, out, r]`, in columns of its own for each pair and zero in the others' rows."""
        columns = []
        for _, name, start in self.pairs:
            b = self.source.read(name)
            columns.append(mx.pad(b, [(0, 0), (start, self.out - start - b.shape[1]), (0, 0)]))
        return self.reorder(mx.concatenate(columns, axis=2))


@dataclass(frozen=True)
class ExpertFactors:
    """The factors for rows `[start, stop)` of one expert of a stack, with the interface of `Factors`."""

    stack: AllExperts
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
    stacked: dict[str, list[AllExperts]] = field(default_factory=dict)

    def sites(self) -> list[str]:
        """Names of the sites that some adapter changes, at whatever weight."""
        return list(dict.fromkeys([*self.factors, *self.rows]))

    def active(self, name: str, weights: Mapping[str, float]) -> tuple[list[Factors], list[SavedRows]]:
        """The factors and token rows for the site `name` whose adapters have a weight other than 0."""
        factors = [item for item in self.factors.get(name, ()) if weights[item.adapter]]
        return factors, [item for item in self.rows.get(name, ()) if weights[item.adapter]]


@dataclass
class Matched:
    """What one adapter brings.

    Attributes:
        factors, rows: its factors, and its rows for single tokens, by the name of their site.
        stacked: its factors for all experts of a field, by the name of their stack.
        changes: the tensors that it replaces, by name.
        untied: whether head and embeddings, one tensor in the base, become two with this adapter.
    """

    factors: dict[str, Factors] = field(default_factory=dict)
    rows: dict[str, SavedRows] = field(default_factory=dict)
    stacked: dict[str, AllExperts] = field(default_factory=dict)
    changes: dict[str, Change] = field(default_factory=dict)
    untied: bool = False
