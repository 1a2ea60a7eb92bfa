"""Tensor parallel: which part of each tensor a rank holds, and a checkpoint that consists of such parts.

Tags say what can be divided: a matrix whose tag has a dimension of `num_attention_heads` has rows or columns of heads,
one with `intermediate_size` those of a feed-forward layer. A rank computes with a config in which these numbers are its
own share (`Config.divided`); where that gives a tensor another shape, the rank holds that part of it. So a model is
planned three times: as a whole, which finds every tensor; with the rank's config, which finds the parts; and, checked
in full, over a source whose tensors *are* those parts. The last plan is the rank's model.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from runner.config.base import Config
from runner.errors import ConfigError, WeightsError
from runner.weights.cuts import Axis, Cut, cut_shape, read_part
from runner.weights.module import Module
from runner.weights.plan import ArrayPlan, ModulePlan, Place, Planner, Value
from runner.weights.tags import Choice, Chooses, Header, Source
from runner.weights.tree import Leaf, Size, leaf_shapes, leaves


class Indivisible(Exception):
    """A model cannot be divided by some names of its config; the text says why."""


@dataclass(frozen=True)
class PartHeader:
    """The header of a tensor's part."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Parts:
    """A source whose tensors are parts of another's."""

    def __init__(self, source: Source | None, headers: Mapping[str, Header], cuts: Mapping[str, Cut]) -> None:
        """`source` None: for headers alone."""
        self._source = source
        self.cuts = cuts
        self.headers: Mapping[str, Header] = {
            name: _part_header(header, cuts[name]) if name in cuts else header for name, header in headers.items()
        }

    def read(self, name: str) -> mx.array:
        """The part of tensor `name`."""
        assert self._source is not None
        cut = self.cuts.get(name)
        return self._source.read(name) if cut is None else read_part(self._source, name, cut)


def _part_header(header: Header, cut: Cut) -> PartHeader:
    shape = cut_shape(header.shape, cut)
    return PartHeader(header.dtype, shape, header.nbytes * math.prod(shape) // max(math.prod(header.shape), 1))


@dataclass(frozen=True)
class Division:
    """A rank's part of a model.

    Attributes:
        config: the config that it computes with.
        cuts: which part of each tensor it holds, by name; the others it holds whole.
        summed: paths of layers whose outputs are only the rank's share of a sum.
    """

    config: Config
    cuts: Mapping[str, Cut]
    summed: frozenset[str]


class _Whole(Planner):
    """Plans the whole model, and remembers the dimensions of each module."""

    def __init__(self, headers: Mapping[str, Header], provided: Mapping[str, Any]) -> None:
        super().__init__(headers, provided)
        self.sizes: dict[str, tuple[Size, ...]] = {}

    def module(self, cls: type, place: Place) -> ModulePlan:
        self.sizes[place.path] = place.sizes
        return super().module(cls, place)


class _Own(_Whole):
    """Plans the model of a rank's config over the whole model's tensors, whose shapes it does not look at."""

    def __init__(
        self, headers: Mapping[str, Header], provided: Mapping[str, Any], whole: Mapping[str, tuple[Size, ...]]
    ) -> None:
        super().__init__(headers, provided)
        self.whole = whole

    def choose(self, cls: type[Chooses], place: Place) -> Choice:
        """The class for parts of what is stored: as if headers had as few columns as this rank has."""
        (full, own) = (sizes[-1] if sizes else 0 for sizes in (self.whole.get(place.path, ()), place.sizes))
        headers: Mapping[str, Header] = self.headers
        if full != own:
            assert isinstance(full, int) and isinstance(own, int)
            below = [name for leaf in leaves(place.tree) for name in self.below(leaf.name)]
            headers = {**self.headers, **{name: _narrowed(self.headers[name], full, own, name) for name in below}}
        try:
            return cls.choose(place.tree, place.sizes, headers, place.config)
        except (WeightsError, ConfigError, ZeroDivisionError) as error:
            raise Indivisible(f"{place.path}: {error}") from error

    def check(self, array: ArrayPlan, tree: Any) -> None:
        """Shapes are those of the whole model, which was planned already."""


def _narrowed(header: Header, full: int, own: int, name: str) -> Header:
    """A header with its last axis as long as it is for `own` of `full` inputs."""
    if len(header.shape) < 2:
        return header
    last, rest = divmod(header.shape[-1] * own, full)
    if rest:
        raise Indivisible(f"{name}: {own} of its {full} inputs are no whole number of groups or words")
    return PartHeader(header.dtype, (*header.shape[:-1], last), header.nbytes * own // full)


class Divider:
    """Finds the parts of a model that ranks hold."""

    def __init__(self, cls: type, config: Config, headers: Mapping[str, Header], provided: Mapping[str, Any]) -> None:
        """Plan the whole model; raises `WeightsError` if it does not fit its tensors."""
        self._cls = cls
        self._config = config.stored_as(headers)
        self._headers = headers
        self._provided = provided
        self._whole = _Whole(headers, provided)
        self._full = self._whole.module(cls, Place.root(self._config))
        self._whole.finish(self._config)

    def divide(self, names: Sequence[str], rank: int, size: int) -> Division:
        """The part that `rank` of `size` holds, where the numbers `names` of the config are shared out.

        Raises:
            Indivisible: the model cannot be divided so.
        """
        try:
            config = self._config.divided(names, size)
            own = _Own(self._headers, self._provided, self._whole.sizes)
            part = own.module(self._cls, Place.root(config))
        except ConfigError as error:
            raise Indivisible(str(error)) from error
        walk = _Walk(rank, size, self._whole.sizes, own.sizes)
        walk.module(self._full, part)
        return Division(config, walk.cuts(), frozenset(walk.summed))


@dataclass
class _Walk:
    """Compares the plan of the whole model with a rank's, module by module."""

    rank: int
    size: int
    whole: Mapping[str, tuple[Size, ...]]
    own: Mapping[str, tuple[Size, ...]]
    summed: set[str] = field(default_factory=set)
    found: dict[str, Cut] = field(default_factory=dict)
    pieces: dict[str, dict[int, tuple[int, int]]] = field(default_factory=dict)
    untouched: set[str] = field(default_factory=set)  # tensors that a field needs whole

    def module(self, full: ModulePlan, part: ModulePlan) -> bool:
        """Compare two plans of a module; whether it or what is in it is divided."""
        if full.cls is not part.cls:
            raise Indivisible(f"{full.path}: {full.cls.__name__} would be {part.cls.__name__}")
        divided = changed = False
        for name, item in full.fields.items():
            other = part.fields[name]
            if isinstance(item, ArrayPlan):
                assert isinstance(other, ArrayPlan)
                divided |= self.array(full, item, other)
            elif isinstance(item, ModulePlan):
                assert isinstance(other, ModulePlan)
                divided |= self.module(item, other)
            elif isinstance(item, list):
                assert isinstance(other, list)
                if len(item) != len(other):
                    raise Indivisible(f"{item[0].path} and the like are stored one by one")
                divided |= any([self.module(*pair) for pair in zip(item, other, strict=True)])
            else:
                assert isinstance(other, Value)
                changed |= _differs(item.value, other.value)
        if changed and not divided:
            # It computes with a number that is now another, and nothing of it is divided: ALiBi's slopes of all heads.
            raise Indivisible(f"{full.path or 'the model'} ({full.cls.__name__}) computes with all of them")
        if divided and issubclass(full.cls, Module) and full.cls.UNDIVIDED:
            raise Indivisible(f"{full.path} ({full.cls.__name__}) computes over all of them together")
        sizes, own = self.whole.get(full.path, ()), self.own.get(full.path, ())
        if len(sizes) > 1 and sizes[-1] != own[-1]:
            if not (issubclass(full.cls, Module) and full.cls.DIVIDES):
                raise Indivisible(f"{full.path} ({full.cls.__name__}) belongs to all of them together")
            if sizes[0] != own[0]:
                raise Indivisible(f"{full.path}: both its inputs and its outputs would be divided")
            if sizes[-1] != own[-1] * self.size:
                # Key-value heads may be the same on several ranks; what is added up may not, or it would count twice.
                raise Indivisible(f"{full.path}: its {sizes[-1]} inputs are in fewer parts than there are ranks")
            self.summed.add(full.path)
        return divided

    def array(self, module: ModulePlan, full: ArrayPlan, part: ArrayPlan) -> bool:
        """Note which part of each tensor of an array is held; whether that is not all of it."""
        if full.sizes == part.sizes and full.shape == part.shape:
            self.untouched.update(leaf.name for leaf in leaves(full.tree))
            return False
        if not (issubclass(module.cls, Module) and module.cls.DIVIDES):
            raise Indivisible(f"{full.path} ({module.cls.__name__}) belongs to all of them together")
        if full.same_as is not None:
            raise Indivisible(f"{full.path} may be one with another tensor")
        stored, kept = (list(leaf_shapes(plan.tree, plan.sizes)) for plan in (full, part))
        if len(stored) != len(kept):
            raise Indivisible(f"{full.path} is stored one by one")
        sizes = itertools.chain(_first_sizes(full), itertools.repeat(None))
        own = itertools.chain(_first_sizes(part), itertools.repeat(None))
        pairs = zip(stored, kept, sizes, own, strict=False)
        for (leaf, shape), (other, narrow), first, narrow_first in pairs:
            self.leaf(full, part, (leaf, shape, first), (other, narrow, narrow_first))
        return True

    def leaf(
        self,
        full: ArrayPlan,
        part: ArrayPlan,
        whole: tuple[Leaf, tuple[int, ...], Size | None],
        own: tuple[Leaf, tuple[int, ...], Size | None],
    ) -> None:
        """Note which part of one tensor is held."""
        (leaf, shape, first), (other, narrow, narrow_first) = whole, own
        stored, kept = full.transform.stored_shape(shape), part.transform.stored_shape(narrow)
        rows = (0 if leaf.stack is None else 1) if not full.transform.swaps else len(stored) - 1
        cut: list[Axis | None] = []
        for axis, (length, left) in enumerate(zip(stored, kept, strict=True)):
            if leaf.rows is not None and axis == rows:
                # One of several fields that hold rows of this tensor: the parts of all of them, one after another.
                assert other.rows is not None
                at = self.pieces.setdefault(leaf.name, {})
                at[leaf.rows[0]] = (leaf.rows[1] - leaf.rows[0], other.rows[1] - other.rows[0])
                cut.append(None)
            elif length == left:
                cut.append(None)
            elif axis == rows and first is not None and narrow_first is not None:
                cut.append(self.rows(full, part, first, narrow_first))
            else:
                cut.append((self.span(length, left, full.path),))
        if self.found.setdefault(leaf.name, tuple(cut)) != tuple(cut):
            raise Indivisible(f"{leaf.name} is held by two fields, which would need other parts of it")

    def rows(self, full: ArrayPlan, part: ArrayPlan, first: Size, own: Size) -> Axis:
        """The rows of one stored tensor, which may hold several matrices one after another, or in another order."""
        wholes, owns = (size if isinstance(size, tuple) else (size,) for size in (first, own))
        lengths = list(zip(wholes, owns, strict=True))
        starts = itertools.accumulate(wholes, initial=0)
        spans = [
            (start + at, start + end)
            for start, (at, end) in zip(starts, (self.span(*each, full.path) for each in lengths), strict=False)
        ]
        if full.transform.order is None or part.transform.order is None:
            return tuple(spans)
        # Row i of the field is row order[i] of the file; of the part, row own_order[i].
        order = full.transform.order(sum(wholes))
        wanted = [order[row] for start, stop in spans for row in range(start, stop)]
        own_order = part.transform.order(len(wanted))
        if sorted(own_order) != list(range(len(wanted))):
            raise Indivisible(f"{full.path}: its rows are stored in an order that is not divided evenly")
        kept = [0] * len(wanted)
        for place, row in zip(own_order, wanted, strict=True):
            kept[place] = row
        return _ranges(kept)

    def span(self, length: int, own: int, path: str) -> tuple[int, int]:
        """Which `own` places of `length` this rank has; where there are too few for all, some ranks have the same."""
        shares = length // own if own and not length % own else 0
        if not shares or self.size % shares:
            raise Indivisible(f"{path}: {length} cannot be shared out evenly over {self.size} ranks")
        start = self.rank * shares // self.size * own
        return start, start + own

    def cuts(self) -> dict[str, Cut]:
        """What was found, by name of tensor; only those that are cut."""
        for name, at in self.pieces.items():
            spans, begin = [], 0
            for start in sorted(at):
                length, own = at[start]
                if start != begin:
                    raise Indivisible(f"{name}: some of its rows belong to no field")
                first, last = self.span(length, own, name)
                spans.append((start + first, start + last))
                begin = start + length
            cut = list(self.found[name])
            cut[0] = tuple(spans)
            self.found[name] = tuple(cut)
        both = self.untouched & set(self.found)
        if both:
            raise Indivisible(f"{min(both)} is needed whole as well")
        return {name: cut for name, cut in self.found.items() if any(kept is not None for kept in cut)}


def _first_sizes(array: ArrayPlan) -> Iterator[Size | None]:
    """The size of the first axis of each tensor of an array, a tuple where one tensor holds several matrices."""

    def sizes(tree: Any, first: Size) -> Iterator[Size | None]:
        if isinstance(tree, Leaf):
            yield first
            return
        for index, part in enumerate(tree.parts):
            yield from sizes(part, first[index] if isinstance(first, tuple) and not tree.stacked else first)

    return sizes(array.tree, array.sizes[0]) if array.sizes else iter(())


def _ranges(places: Sequence[int]) -> Axis:
    """Ranges that give these places in this order."""
    found: list[list[int]] = []
    for place in places:
        if found and found[-1][1] == place:
            found[-1][1] += 1
        else:
            found.append([place, place + 1])
    return tuple((start, stop) for start, stop in found)


def _differs(one: object, other: object) -> bool:
    """Whether two values of a setting are different numbers; what is made for a plan, as tables of ops, is not."""
    return isinstance(one, int | float | str | tuple) and one != other


def wrapped(plan: ModulePlan, paths: frozenset[str], wrap: Callable[[ModulePlan], ModulePlan]) -> ModulePlan:
    """A plan with `wrap` around the modules of these paths."""
    fields: dict[str, Any] = {}
    for name, item in plan.fields.items():
        if isinstance(item, ModulePlan):
            fields[name] = wrapped(item, paths, wrap)
        elif isinstance(item, list):
            fields[name] = [wrapped(element, paths, wrap) for element in item]
        else:
            fields[name] = item
    changed = dataclasses.replace(plan, fields=fields)
    return wrap(changed) if plan.path in paths else changed
