"""A model ready to compute: config, weights and device, without a tokenizer: what `load`, `bench` and tests share."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from runner.cache.kv import KVCache
from runner.cache.storage import Storage
from runner.checkpoint.model_files import open_files
from runner.config.base import Config
from runner.engine.generate import new_caches
from runner.errors import UsageError
from runner.families import Model, find
from runner.nn.batch import Batch
from runner.ops.device import Device, current
from runner.weights import loading
from runner.weights.loading import Progress
from runner.weights.plan import ModulePlan, plan
from runner.weights.tags import Source

if TYPE_CHECKING:
    from runner.adapters import AdapterFiles, Adapters

DTYPES: Mapping[str, mx.Dtype] = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class Engine:
    """A loaded model. `layout` says which tensor each field came from; `loading.tensors` writes it back with that.

    `storage` is how its caches keep their rows: exactly, where a dtype was asked for, else as the device likes it.
    `adapters` are those that were loaded with it.
    """

    config: Config
    model: Model
    layout: ModulePlan
    device: Device
    storage: Storage
    adapters: Adapters | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory."""
        return loading.nbytes(self.model)

    def new_caches(self) -> list[KVCache]:
        """An empty cache for each layer."""
        return new_caches(self.config, self.storage)

    def logits(self, ids: Sequence[int]) -> mx.array:
        """Logits at every position, `[T, V]` float32, in one pass and without a cache to keep.

        Raises:
            UsageError: no ids, or an id outside the vocabulary.
        """
        hidden = self.model(Batch(mx.array([self.checked(ids)], dtype=mx.int32)), self.new_caches())
        return self.model.logits(hidden)[0].astype(mx.float32)

    def checked(self, ids: Sequence[int]) -> list[int]:
        """`ids` (NumPy's integers too) as a list of ints.

        Raises:
            UsageError: there are none, one is no integer, or the vocabulary has it not.
        """
        try:
            ids = [operator.index(token) for token in ids]
        except TypeError as error:
            raise UsageError(f"a prompt is text or integer token ids: {error}") from error
        if not ids:
            raise UsageError("the prompt is empty: no tokens to run")
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.config.vocab_size:
            raise UsageError(f"token ids must be 0 to {self.config.vocab_size - 1}; got {low if low < 0 else high}")
        return ids


def assemble(
    raw: Mapping[str, Any],
    source: Source,
    *,
    dtype: str | None = None,
    adapters: Sequence[AdapterFiles] = (),
    progress: Progress | None = None,
) -> Engine:
    """The model of a `config.json` object with the tensors of `source`; see `runner.load` for `dtype` and errors."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    config_class, model_class = find(raw)
    adapted: Adapters | None = None
    if adapters:
        from runner.adapters import fit  # a tenth of the imports of a short answer

        adapted = fit(raw, (config_class, model_class), source, adapters)
        raw, source = adapted.base.raw, adapted.base.source
    config = config_class.from_dict(raw)
    device = current()
    provided = {"ops": device.ops, "activations": DTYPES[dtype] if dtype else device.activations}
    layout = plan(model_class, config, source.headers, provided)
    if adapted is not None:
        layout = adapted.applied(layout, device.ops, DTYPES[dtype] if dtype else None)
    model = loading.build(layout, source, dtype=DTYPES[dtype] if dtype else None, progress=progress)
    return Engine(config, model, layout, device, device.storage if dtype is None else device.ops.storage, adapted)


def open_engine(path: Path, *, dtype: str | None = None, adapters: Sequence[AdapterFiles] = ()) -> Engine:
    """The model in a directory or GGUF file, whether or not it has a tokenizer."""
    files = open_files(path)
    return assemble(files.config, files.source, dtype=dtype, adapters=adapters)
