"""What adapters hold for one place of a model, by the names of tensors; read when it is asked for."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from runner.nn.linear import Embedding
from runner.weights.tags import Source


@dataclass(frozen=True)
class Factors:
    """One adapter's matrices for one site, by the names they have in its file; read when they are asked for."""

    adapter: str
    source: Source
    kind: type
    scale: float
    a: str
    b: str
    magnitude: str | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.source.headers[self.a].shape[0]

    def up(self) -> mx.array:
        """`[out, r]`."""
        return self.source.read(self.a).T if self.kind is Embedding else self.source.read(self.b)

    def down(self) -> mx.array:
        """`[r, width]`."""
        return self.source.read(self.b).T if self.kind is Embedding else self.source.read(self.a)

    def lengths(self) -> mx.array | None:
        """DoRA's m, `[out]`."""
        return None if self.magnitude is None else self.source.read(self.magnitude)


@dataclass(frozen=True)
class SavedRows:
    """Rows that one adapter has for single tokens, by the name of their tensor."""

    adapter: str
    source: Source
    name: str
    tokens: tuple[int, ...]

    def read(self) -> mx.array:
        """`[n, width]`."""
        return self.source.read(self.name)


@dataclass(frozen=True)
class StackFactors:
    """One adapter's matrices for all experts of a field: A `[E * r, width]`, expert by expert, and B `[out, r * E]`,
    whose columns go through the experts first (PEFT's `ParamWrapper`)."""

    adapter: str
    source: Source
    scale: float
    a: str
    b: str
    experts: int

    @functools.cached_property
    def downs(self) -> mx.array:
        """`[E, r, width]`."""
        a = self.source.read(self.a)
        return a.reshape(self.experts, -1, a.shape[1])

    @functools.cached_property
    def ups(self) -> mx.array:
        """`[E, out, r]`."""
        b = self.source.read(self.b)
        return b.reshape(b.shape[0], -1, self.experts).transpose(2, 0, 1)


@dataclass(frozen=True)
class ExpertFactors:
    """What `Factors` are, for rows `[start, stop)` of one expert."""

    stack: StackFactors
    expert: int
    start: int
    stop: int
    magnitude: None = None

    @property
    def adapter(self) -> str:
        """Its name."""
        return self.stack.adapter

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.stack.scale

    def up(self) -> mx.array:
        """`[stop - start, r]`."""
        return self.stack.ups[self.expert, self.start : self.stop]

    def down(self) -> mx.array:
        """`[r, width]`."""
        return self.stack.downs[self.expert]

    def lengths(self) -> None:
        """No DoRA."""
        return None


@dataclass(frozen=True)
class Parts:
    """All that adapters hold: by site, rows of tables likewise, and of all experts of a field by its name."""

    factors: dict[str, list[Factors]] = field(default_factory=dict)
    rows: dict[str, list[SavedRows]] = field(default_factory=dict)
    stacked: dict[str, list[StackFactors]] = field(default_factory=dict)

    def sites(self) -> list[str]:
        """Names of those that some adapter changes."""
        return list(dict.fromkeys([*self.factors, *self.rows]))

    def active(self, name: str, weights: Mapping[str, float]) -> tuple[list[Factors], list[SavedRows]]:
        """What changes the site `name` with these weights."""
        factors = [item for item in self.factors.get(name, ()) if weights[item.adapter]]
        return factors, [item for item in self.rows.get(name, ()) if weights[item.adapter]]
