"""Some outputs or inputs of a quantized matrix, made of those parts of its tensors alone.

Fewer outputs, or fewer whole groups of inputs, of a quantized matrix are a quantized matrix again, whose tensors are
parts of the stored ones along the same axis. So the layer is listed once more, over these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction

import mlx.core as mx

from runner.checkpoint.quantized.floats import Float4, Float8
from runner.checkpoint.quantized.layers import Affine, Layer
from runner.checkpoint.quantized.tensors import Tensors
from runner.errors import RunnerError
from runner.weights.cuts import Axis, Cut, cut_out, cut_shape, read_part
from runner.weights.division import PartHeader
from runner.weights.tags import Header, Source

WHOLE = ("weight_global_scale",)
ORDER = ("g_idx", "weight_g_idx")
SHAPE = "weight_shape"
"""Names of tensors that are for all outputs and inputs, that give inputs their groups, and that say how many these are.
"""


class Window:
    """A `Source` of one layer's tensors, as far as they are of some outputs (axis 0) or inputs (axis 1)."""

    def __init__(self, source: Source, layer: Layer, axis: int, kept: Axis, outputs: int) -> None:
        """Find the parts; `outputs` is the axis of outputs in stored matrices.

        Raises:
            ValueError: a tensor has no such part.
        """
        self._source = source
        self._cuts: dict[str, Cut] = {}
        self._shape = list(layer.shape)
        self._shape[axis] = sum(stop - start for start, stop in kept)
        headers: dict[str, Header] = {}
        for name in layer.stored:
            header, last = source.headers[name], name.rpartition(".")[2]
            if last in ORDER and axis == 1:
                if not isinstance(layer, Affine) or layer.order is not None:
                    raise ValueError("inputs have an order of their own")
                continue  # they have none, so that nothing says so either
            headers[name] = header
            if last in (*WHOLE, *ORDER, SHAPE) or not header.shape:
                continue
            units = _units(layer, axis, header.dtype)
            cut = _cut(header, layer.shape[axis], axis if outputs == 0 else 1 - axis, kept, units)
            self._cuts[name] = cut
            shape = cut_shape(header.shape, cut)
            headers[name] = PartHeader(header.dtype, shape, 0)
        self.headers: Mapping[str, Header] = headers

    def read(self, name: str) -> mx.array:
        """The part of a tensor."""
        if name.endswith(f".{SHAPE}"):
            return mx.array(self._shape)
        cut = self._cuts.get(name)
        return self._source.read(name) if cut is None else read_part(self._source, name, cut)


def _units(layer: Layer, axis: int, dtype: str) -> set[Fraction]:
    """How many outputs (axis 0) or inputs (axis 1) a place in one of the layer's tensors can be for."""
    numbers: set[int | Fraction] = {1}
    if isinstance(layer, Float8):
        numbers |= {layer.block[axis]}
    elif isinstance(layer, Float4):
        numbers |= {2, layer.group_size} if axis else set()
    elif isinstance(layer, Affine):
        numbers |= {Fraction(32, layer.bits)} if dtype == "I32" else set()
        # Where the last group has fewer, what there are groups of could be taken for words.
        if axis and layer.shape[1] % layer.group_size == 0:
            numbers |= {layer.group_size}
        elif axis and layer.group_size < layer.shape[1]:
            raise ValueError("the last group is cut short")
    return {Fraction(number) for number in numbers}


def _cut(header: Header, size: int, axis: int, kept: Axis, units: set[Fraction]) -> Cut:
    """The part of a tensor for some of `size` outputs or inputs, which its `axis` has places for."""
    shape = header.shape
    if len(shape) == 1 and axis:
        return (None,)  # a number for each output
    if len(shape) > 2:
        raise ValueError(f"{list(shape)} has no parts")
    length = shape[axis]
    if length == 1:
        return tuple(None for _ in shape)  # one number for all
    if Fraction(size, length) not in units or any(place * length % size for each in kept for place in each):
        raise ValueError("a word or group would be cut")
    part = tuple((start * length // size, stop * length // size) for start, stop in kept)
    return tuple(part if at == axis else None for at in range(len(shape)))


def read_window(
    source: Source, layer: Layer, suffix: str, cut: Cut, outputs: int, again: Callable[[Tensors], list[Layer]]
) -> mx.array:
    """The kept places of one of a layer's parts; what cannot be made of parts is made whole first.

    Args:
        outputs: the axis of outputs in stored matrices.
        again: lists the layers of some tensors.

    Raises:
        CheckpointError: a number is not finite, or is not allowed by the format.
    """
    axis = 0 if cut[0] is not None else 1
    kept, size = cut[axis], layer.parts()[suffix][1][axis]
    if kept is None or cut[1 - axis] is not None:
        return cut_out(layer.part(suffix, source.read), cut)
    full = layer.shape[axis]
    # A place is a word or group of numbers. Words of three bits are cut between numbers at every third.
    places = tuple((start * full // size, stop * full // size) for start, stop in kept)
    try:
        if any(place * full % size for each in kept for place in each):
            raise ValueError("a number would be cut")
        window = Window(source, layer, axis, places, outputs)
        (found,) = again(Tensors(window))
    except (ValueError, RunnerError):
        return cut_out(layer.part(suffix, source.read), cut)
    found = found.plain() if layer.form is None else found
    if (found.form, found.scales, found.dtype) != (layer.form, layer.scales, layer.dtype):
        return cut_out(layer.part(suffix, source.read), cut)
    return found.part(suffix, window.read)
