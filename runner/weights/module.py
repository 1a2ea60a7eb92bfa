"""`Module`: what the parts of a model have in common, a repr that shows the tree below them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import groupby
from typing import Any, ClassVar

import mlx.core as mx

INDENT = "  "


class Module:
    """Base of the dataclasses that a model is made of. The repr is the tree of those with tensors, as torch prints it.

        Block(
          (input_layernorm): RMSNorm([576] float32)
          (self_attn): Attention(
            (qkv_proj): QuantizedLinear([960, 576] in 4 bits, groups of 32)
            (o_proj): QuantizedLinear([576, 576] in 4 bits, groups of 32)
          )
          ...

    A list's elements that print alike are one entry, under the range of their indices.

    Where a model is divided over ranks, `DIVIDES` says that the class's own tensors can be: their rows, columns or
    heads do not need each other. `UNDIVIDED` says that what is in it can't be, because it looks at all of them at once.
    `WHOLE` says that each rank has all of it, whatever is divided around it.
    """

    DIVIDES: ClassVar[bool] = False
    UNDIVIDED: ClassVar[bool] = False
    WHOLE: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # `dataclass` writes a repr with whole arrays into each class that has none of its own.
        cls.__repr__ = Module.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return "\n".join(_lines(self))

    def tensors_repr(self) -> str:
        """Shapes and dtypes of the module's own tensors, for its line of the tree."""
        found = {name: array_repr(value) for name, value in _fields(self).items() if isinstance(value, mx.array)}
        return ", ".join(text if name == "weight" else f"{name} {text}" for name, text in found.items())


def array_repr(array: mx.array) -> str:
    """Shape and dtype of an array, as in `[576, 960] float16`."""
    return f"{list(array.shape)} {str(array.dtype).removeprefix('mlx.core.')}"


def _lines(value: Any) -> list[str]:
    """The repr of an array, a list or a module, line by line; a module without such fields shows its settings."""
    if isinstance(value, mx.array):
        return [array_repr(value)]
    if isinstance(value, list | tuple):
        return _list_lines(value)
    name, fields = type(value).__name__, _fields(value)
    if all(isinstance(child, mx.array) for child in fields.values()):
        # Called on the class, so that dataclasses of families elsewhere need no base of ours.
        own = value.tensors_repr() if isinstance(value, Module) else Module.tensors_repr(value)
        return [f"{name}({own or _settings(value)})"]
    lines = [f"{name}("]
    for label, child in fields.items():
        first, *rest = _lines(child)
        lines += [f"{INDENT}({label}): {first}", *(INDENT + line for line in rest)]
    return [*lines, ")"]


def _list_lines(values: Sequence[Any]) -> list[str]:
    """The lines of a list: elements that print alike once, in the order of their first."""
    alike: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        alike.setdefault("\n".join(_lines(value)), []).append(index)
    if len(alike) == 1:
        (text,) = alike
        return f"{len(values)} x {text}".split("\n")
    lines = ["["]
    for text, indices in alike.items():
        count = f"{len(indices)} x " if len(indices) > 1 else ""
        lines += [INDENT + line for line in f"({ranges(indices)}): {count}{text}".split("\n")]
    return [*lines, "]"]


def _fields(module: Any) -> dict[str, Any]:
    """The fields with tensors below them. What a module computed for itself, as RoPE its frequencies, is no part."""
    given = [item.name for item in dataclasses.fields(module) if item.init]
    return {name: value for name in given if _holds_tensors(value := vars(module).get(name))}


def _holds_tensors(value: object) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_holds_tensors, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return bool(_fields(value))
    return isinstance(value, mx.array)


def ranges(indices: Sequence[int]) -> str:
    """Ascending numbers as in `0-2, 4-6, 8`."""
    runs = (list(run) for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]))
    ends = ((run[0][1], run[-1][1]) for run in runs)
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def _settings(module: Any) -> str:
    """The plain values among the fields of a module without tensors."""
    found = {item.name: vars(module).get(item.name) for item in dataclasses.fields(module)}
    return ", ".join(f"{name}={value!r}" for name, value in found.items() if isinstance(value, int | float | str))
