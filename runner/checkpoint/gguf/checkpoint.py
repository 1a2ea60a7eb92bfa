"""A GGUF file as a model: a `Source` of tensors under transformers' names, with its config and tokenizer."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from runner.checkpoint.gguf.architecture import ENCODER, IGNORED, ROPE_TENSORS, Architecture
from runner.checkpoint.gguf.container import Container, Entry, open_container
from runner.checkpoint.gguf.formats import nbytes
from runner.checkpoint.gguf.settings import architecture_of, config_of, generation_config_of
from runner.checkpoint.gguf.tokenizer import Vocabulary, tokenizer_files, tokenizer_of, vocabulary_of
from runner.checkpoint.gguf.value_heads import GroupedHeads, ValueHeads, grouped_heads, value_heads
from runner.errors import CheckpointError
from runner.local_files import quoted
from runner.text.tokenizer import Tokenizer
from runner.weights.cuts import Cut, cut_out, cut_shape

_BLOCK = re.compile(r"blk\.(0|[1-9]\d*)\.([a-z_][a-z_0-9.]*)\.(weight|bias)")
_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,8})\.(.+)")
_MOST_PILED = 64
_TOP = re.compile(r"([a-z_]+)\.(weight|bias)")


@dataclass(frozen=True)
class Part:
    """An array under transformers' name: a plain tensor, or the weight, scales or biases of a quantized one.

    Attributes:
        entry: the GGUF tensor that the array is made from.
        suffix: `.weight`, `.scales` or `.biases` of a quantized tensor, "" for a plain one.
        dtype: dtype in safetensors' spelling.
        shape: shape of the array in memory.
        head_rows: rows per attention head where llama.cpp reordered the rows of each head, which `GGUF.read` undoes.
        plus_one: llama.cpp added 1 to the stored numbers, which `GGUF.read` subtracts.
        negated_exp: the stored numbers are minus the exponentials of those that `GGUF.read` returns.
        heads: how llama.cpp sorted heads, which `GGUF.read` undoes; None: it did not.
        place: which of the tensor's matrices it is; None: the tensor is one array.
    """

    entry: Entry
    suffix: str
    dtype: str
    shape: tuple[int, ...]
    head_rows: int | None = None
    plus_one: bool = False
    negated_exp: bool = False
    heads: ValueHeads | GroupedHeads | None = None
    place: int | None = None

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True, repr=False, eq=False)
class GGUF:
    """A checked GGUF file (or all shards of one). Build it with `open`.

    Attributes:
        container: metadata and tensors as the file has them.
        architecture: table entry of the file's architecture.
        config: what `config.json` would hold.
        generation_config: what `generation_config.json` would hold.
        headers: every array by transformers' name; quantized tensors as `.weight`, `.scales` and `.biases`.
        vocabulary: checked tokenizer metadata.
        beside: scales and biases that were read with their weight, and not asked for yet.
        first: those that were asked for before their weight was.
    """

    container: Container
    architecture: Architecture
    config: dict[str, Any]
    generation_config: dict[str, Any]
    headers: Mapping[str, Part]
    vocabulary: Vocabulary
    beside: dict[str, tuple[Cut | None, mx.array]] = field(init=False, default_factory=dict)
    first: set[str] = field(init=False, default_factory=set)

    def __repr__(self) -> str:
        return f"GGUF({str(self.container.path)!r}, {len(self.container.tensors)} tensors)"

    @classmethod
    def open(cls, path: Path) -> GGUF:
        """Read and check a file's header; of the tensors, only RoPE tables are read.

        Raises:
            CheckpointError: the file is malformed, or has a type, architecture, key or tensor that is not supported.
            TokenizerError: the file's vocabulary is malformed or of a kind that is not supported.
        """
        # All names, types and shapes are checked here; a later read fails only on its own bytes, or a changed file.
        container = open_container(path)
        architecture = architecture_of(container)
        config = config_of(container)
        headers = _parts(container, architecture, config)
        quantization = _quantization(headers)
        if quantization:
            config["quantization"] = quantization
        vocabulary = vocabulary_of(container.metadata)
        # llama.cpp reads no file with more tokens than rows; here, those that are named must have theirs.
        for name, index in vocabulary.ids.items():
            if index >= config["vocab_size"]:
                token = quoted(vocabulary.tokens[index])
                rows = f"token_embd.weight has {config['vocab_size']} rows"
                raise CheckpointError(f"{path}: the {name} token is {token}, number {index}, but {rows}")
        config |= vocabulary.config
        generation = {**generation_config_of(container.metadata), **vocabulary.config}
        return cls(container, architecture, config, generation, MappingProxyType(headers), vocabulary)

    def read(self, name: str) -> mx.array:
        """Read the array `name` now, a few MiB of the file at a time.

        Raises:
            CheckpointError: no array has this name, a scale is not finite, or the file changed since it was opened.
        """
        return self.read_part(name, None)

    def read_part(self, name: str, cut: Cut | None) -> mx.array:
        """Read the kept places of array `name`, or all of it (None), as `read`; rows that are left out stay unread."""
        if name not in self.headers:
            raise CheckpointError(f"{self.container.path}: no tensor {quoted(name)}")
        part, entry = self.headers[name], self.headers[name].entry
        if name in self.beside and (found := self.beside.pop(name))[0] == cut:
            return found[1]
        if cut is not None and not _by_rows(part):
            return cut_out(self.read(name), cut)
        # A weight's scales and biases are made of the same bytes: they are kept until they are asked for, soon, unless
        # they were before.
        stem = name.removesuffix(".weight")
        names = [name] if part.suffix != ".weight" else [stem + each for each in entry.format.parts(entry.shape)]
        wanted = {each: self.headers[each] for each in names}
        cuts = {each: None if cut is None else _alike(cut, part.shape, made.shape) for each, made in wanted.items()}
        slots = _slots(part, cut)
        multiple = part.head_rows or 1
        in_order = cut is None and part.place is None and (part.heads is None or part.heads.size is None)
        filled: dict[str, Any] = {}
        # Whole heads at a time, since the rows of a head are reordered among themselves.
        for first, rows in self.container.rows(entry, multiple, None if cut is None else _spans(slots, part)):
            ordered = _in_order(rows, part.head_rows)
            places = slots[first : first + len(rows)]
            kept = places >= 0
            if not kept.any():
                continue
            try:
                for each, made in wanted.items():
                    numbers = entry.format.part(made.suffix, ordered if kept.all() else ordered[kept])
                    numbers = _columns(_undone(numbers, made), cuts[each])
                    if len(rows) == entry.rows and in_order:
                        filled[each] = numbers
                        continue
                    if each not in filled:
                        filled[each] = np.empty((int((slots >= 0).sum()), numbers.shape[1]), numbers.dtype)
                    at = slice(first, first + len(rows)) if in_order else places[kept]
                    filled[each][at] = numbers
            except CheckpointError as error:
                raise CheckpointError(f"{entry.file}: tensor {quoted(entry.name)}: {error}") from error
        for each, made in wanted.items():
            whole = cuts[each]
            shape = made.shape if whole is None else cut_shape(made.shape, whole)
            # MLX takes a view with its steps: one of each block's first byte would keep all of the file's bytes.
            array = mx.array(np.ascontiguousarray(filled.pop(each)).reshape(shape))
            array = array.view(mx.bfloat16) if made.dtype == "BF16" else array
            if each == name:
                asked = array
            elif each in self.first:
                self.first.remove(each)
            else:
                self.beside[each] = whole, array
        if part.suffix != ".weight":
            self.first.add(name)
        return asked

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer; raises `TokenizerError` where the file's one is malformed or not supported."""
        return tokenizer_of(self.vocabulary, self.container.path, self.architecture.rstrip)

    def side_files(self) -> dict[str, bytes | str]:
        """Contents, by name, of the files that a hub repository has besides config and weights.

        Raises:
            TokenizerError: for the same reasons as in `tokenizer`.
        """
        generation_config = json.dumps(self.generation_config, indent=2)
        return {
            **tokenizer_files(self.vocabulary, self.architecture.rstrip),
            "generation_config.json": generation_config,
        }


def _by_rows(part: Part) -> bool:
    """Whether the rows of the array are rows of the file's tensor: not where it has another shape."""
    rows = part.shape if len(part.shape) == 1 else part.shape[:-1]
    return math.prod(rows) * (1 if part.place is None else part.entry.shape[0]) == part.entry.rows


def _alike(cut: Cut, shape: tuple[int, ...], other: tuple[int, ...]) -> Cut:
    """The cut of an array of shape `other` that keeps what `cut` does of one of `shape`: words or groups of numbers."""
    return tuple(
        None if kept is None else tuple((start * there // here, stop * there // here) for start, stop in kept)
        for kept, here, there in zip(cut, shape, other, strict=True)
    )


def _slots(part: Part, cut: Cut | None) -> npt.NDArray[np.int64]:
    """For each row of the file's tensor, which row of the array it becomes; -1: none."""
    entry = part.entry
    places = np.arange(entry.rows)
    if part.heads is not None and part.heads.size is not None:
        places = part.heads.places(0, entry.rows)
    if part.place is not None:
        rows = math.prod(part.shape[:-1])
        places = np.where(places // rows == part.place, places % rows, -1)
    if cut is None:
        return places
    by_row = cut if len(cut) == 1 else cut[:-1]
    shape = part.shape if len(cut) == 1 else part.shape[:-1]
    kept = np.arange(math.prod(shape)).reshape(shape)
    for axis, each in enumerate(by_row):
        if each is not None:
            kept = np.concatenate([kept.take(range(*one), axis) for one in each], axis=axis)
    slots = np.full(math.prod(shape) + 1, -1)  # the last one is that of no row
    slots[kept.reshape(-1)] = np.arange(kept.size)
    return slots[places]


def _spans(slots: npt.NDArray[np.int64], part: Part) -> list[tuple[int, int]]:
    """Ranges of a tensor's rows that hold all that are kept, of whole heads where their rows are reordered."""
    multiple = part.head_rows or 1
    wanted = (slots >= 0).reshape(-1, multiple).any(axis=1)
    ends = np.flatnonzero(np.diff(wanted, prepend=False, append=False)) * multiple
    return list(zip(ends[::2].tolist(), ends[1::2].tolist(), strict=True))


def _columns(numbers: Any, cut: Cut | None) -> Any:
    """The kept columns of rows `[n, columns]`."""
    kept = None if cut is None or len(cut) == 1 else cut[-1]
    return numbers if kept is None else np.concatenate([numbers[:, slice(*each)] for each in kept], axis=1)


def _undone(numbers: Any, part: Part) -> Any:
    """Numbers as transformers has them, in the columns that it has them in."""
    if part.plus_one:
        numbers = numbers - 1
    if part.negated_exp:
        if not (numbers < 0).all():
            raise CheckpointError("holds a number that is not below 0, though it is minus an exponential")
        numbers = np.log(-numbers)
    if isinstance(part.heads, ValueHeads) and part.heads.size is None:
        return part.heads.columns(numbers)
    return numbers


def _in_order(rows: Any, head_rows: int | None) -> Any:
    """Undo llama.cpp's row order within each head, if it has one.

    llama.cpp's RoPE rotates the pairs (2i, 2i+1) of a head of size D, so its converter interleaved the rows; the
    returned rows are in transformers' order, for the pairs (i, i + D/2).
    """
    if head_rows is None:
        return rows
    return rows.reshape(-1, head_rows // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _parts(container: Container, architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Part]:
    """Every array that the file's tensors become, by transformers' name."""
    parts: dict[str, Part] = {}
    for entry in container.tensors.values():
        if entry.name in ROPE_TENSORS or IGNORED.fullmatch(entry.name) or ENCODER.fullmatch(entry.name):
            continue
        layer = _LAYER.fullmatch(entry.name)
        if architecture.predicts and layer is not None and int(layer[1]) >= config["num_hidden_layers"]:
            continue  # of multi-token prediction: the count of all layers was checked against what predicts
        pile = architecture.piled.get(entry.name.removesuffix(".weight"))
        if pile is not None and len(entry.shape) == 3 and entry.shape[0] <= _MOST_PILED:
            for place in range(entry.shape[0]):
                for suffix, (dtype, shape) in entry.format.parts(entry.shape[1:]).items():
                    parts[f"{pile}.{place}{suffix or '.weight'}"] = Part(entry, suffix, dtype, shape, place=place)
            continue
        name, block = _hub_name(container, architecture, entry.name)
        # Query and key rows of some architectures are reordered head by head, so they must divide into even heads.
        head_rows = None
        if block in architecture.interleaved:
            head_rows, rest = divmod(entry.shape[0], config[architecture.interleaved[block]])
            if rest or head_rows % 2:
                raise CheckpointError(f"{container.path}: {entry.name}: {list(entry.shape)} do not divide into heads")
        norm = entry.name.endswith("norm.weight") and block not in architecture.plain_norms
        plus_one = architecture.norms_plus_one and norm
        negated_exp = block in architecture.negated_exp
        heads: ValueHeads | GroupedHeads | None = None
        if block in architecture.grouped:
            start = f"{container.metadata['general.architecture']}.attention.head_count"
            count = container.metadata[start]
            heads = grouped_heads(entry.shape[0], count, container.metadata.get(f"{start}_kv", count))
        if block in architecture.value_heads:
            heads = value_heads(architecture.value_heads[block], config)
        # Only `.weight` tensors may be quantized, and norms with 1 added must be float32, as the converters write them.
        if entry.format.count > 1 and not name.endswith(".weight"):
            raise CheckpointError(
                f"{container.path}: {entry.name} has type {entry.format.name}, expected plain numbers"
            )
        if (plus_one or negated_exp) and entry.format.dtype != "F32":
            raise CheckpointError(f"{container.path}: {entry.name} has type {entry.format.name}, expected F32")
        stored = entry.shape
        if block in architecture.flattened and len(stored) == 1:
            stored = (1, *stored)
        if block in architecture.folded and entry.format.count == 1:
            stored = (math.prod(stored),)
        for suffix, (dtype, shape) in entry.format.parts(stored).items():
            full = name.removesuffix(".weight") + suffix if suffix else name
            parts[full] = Part(entry, suffix, dtype, shape, head_rows, plus_one, negated_exp, heads)
    return parts


def _hub_name(container: Container, architecture: Architecture, name: str) -> tuple[str, str]:
    """Transformers' name of a tensor, and its GGUF name within a layer ("attn_q"; "" for a tensor outside layers)."""
    layer = _LAYER.fullmatch(name)
    if layer is not None and layer[2] in architecture.whole:
        return f"{architecture.prefix}.{layer[1]}.{architecture.whole[layer[2]]}", layer[2].partition(".")[0]
    found = _BLOCK.fullmatch(name)
    if found is not None and found[2] in architecture.blocks:
        return f"{architecture.prefix}.{found[1]}.{architecture.blocks[found[2]]}.{found[3]}", found[2]
    top = _TOP.fullmatch(name)
    if top is not None and top[1] in architecture.top:
        return f"{architecture.top[top[1]]}.{top[2]}", ""
    raise CheckpointError(f"{container.path}: tensor {quoted(name)} is not part of a {architecture.model_type} model")


def _quantization(headers: Mapping[str, Part]) -> dict[str, Any]:
    """The `quantization` of config.json as mlx-lm writes it: the most common form, and the layers that differ."""
    forms = {
        name.removesuffix(".weight"): part.entry.format.quantized
        for name, part in headers.items()
        if part.suffix == ".weight"
    }
    counts = Counter(form for form in forms.values() if form is not None)
    if not counts:
        return {}
    common = counts.most_common(1)[0][0]
    others = {name: asdict(form) for name, form in forms.items() if form is not None and form != common}
    return {**asdict(common), **others}
