"""A model directory: its config, the headers of its safetensors files, and its tensors, read on demand.

Everything in the directory is untrusted. Opening reads only JSON and headers and checks them in full; after that, a
tensor read can touch no bytes but the tensor's own. The files must not change between the check and a read: each read
compares device, inode, size and modification time with those recorded by the check and refuses a file that changed.
One gap remains, a writer who changes a file *while* MLX maps it: do not load from a directory that others can write to.
`check_unchanged` notices it afterwards, where there is time to.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from runner.checkpoint.safetensors_header import ShardHeader, Stamp, read_header
from runner.checkpoint.safetensors_header import TensorInfo as TensorInfo
from runner.checkpoint.weight_files import read_weights
from runner.checkpoint.writer import write_checkpoint as write_checkpoint
from runner.errors import CheckpointError
from runner.local_files import find_file, path_in, quoted
from runner.local_files import read_json as read_json

if TYPE_CHECKING:
    import mlx.core as mx

    from runner.weights.cuts import Cut

MLX_DTYPES = {
    "BOOL": "bool_",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "C64": "complex64",
    "F8_E4M3": "uint8",
    "F8_E8M0": "uint8",
}
"""The MLX dtype in which `mx.load` returns each safetensors dtype. A tensor of any other makes it refuse the file."""

RAW_DTYPES = {**MLX_DTYPES, "F8_E5M2": "uint8", "F8_E4M3FNUZ": "uint8", "F8_E5M2FNUZ": "uint8"}
"""The MLX dtype in which `Checkpoint.read` returns each safetensors dtype.

MLX has no 8-bit floats: they come as raw bytes, to be decoded by the caller, who knows their scales.
"""


class _Lazy(threading.local):
    """Arrays by file and name that are loaded and not asked for yet, each thread's own: no other can compute them.

    A quantised checkpoint is looked into by the thread that opens it, and read by the one that owns the device.
    """

    def __init__(self) -> None:
        self.files: dict[Path, dict[str, mx.array]] = {}


@dataclass(frozen=True, repr=False, eq=False)
class Checkpoint:
    """A checked model directory. Build it with `open`.

    Attributes:
        directory: path of the model directory.
        config: contents of `config.json`.
        generation_config: contents of `generation_config.json`, `{}` when the file is absent.
        headers: dtype, shape and position of every tensor, by name. Reading them does not import MLX.
        metadata: `__metadata__` of the weight files (`{"format": "mlx"}`); the first shard wins where shards differ.
    """

    directory: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    headers: Mapping[str, TensorInfo]
    metadata: dict[str, str]
    _shards: Mapping[Path, ShardHeader]
    _raw_files: frozenset[Path]
    _own: _Lazy = field(default_factory=lambda: _Lazy())

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.directory)!r}, {len(self.headers)} tensors)"

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Read and check the JSON files and the safetensors headers of a model directory.

        The weights are in `model.safetensors` or, where `model.safetensors.index.json` exists, in the shards that the
        index names and no other file; a stale index yields to files that are whole (`weight_files.choose`). A tensor
        comes from the shard that the index gives for it. One that the index does not list, or that is in another shard
        than it says, is taken too, as transformers does, unless two shards hold it.

        Raises:
            CheckpointError: naming the file and the problem.
        """
        directory = Path(directory)
        if not os.path.isdir(directory):
            what = "is a file; a checkpoint is a directory" if os.path.exists(directory) else "no such directory"
            raise CheckpointError(f"{directory}: {what}")
        shards, headers = read_weights(directory)
        config, generation = (find_file(directory, name) for name in ("config.json", "generation_config.json"))
        if config is None:
            raise CheckpointError(f"{directory}: no config.json; is this a model's directory?")
        defaults = {} if generation is None else read_json(generation)
        return cls._of(directory, read_json(config), defaults, shards, headers)

    @classmethod
    def open_file(cls, directory: Path, weights: str, config: str) -> Checkpoint:
        """Open a directory (an adapter's) whose weights and config have the given file names; no generation config.

        Raises:
            CheckpointError: naming the file and the problem.
        """
        header = read_header(path_in(directory, weights))
        return cls._of(directory, read_json(path_in(directory, config)), {}, {weights: header}, header.tensors)

    @classmethod
    def _of(
        cls,
        directory: Path,
        config: dict[str, Any],
        generation: dict[str, Any],
        shards: Mapping[str, ShardHeader],
        headers: Mapping[str, TensorInfo],
    ) -> Checkpoint:
        metadata: dict[str, str] = {}
        for shard in shards.values():
            metadata = shard.metadata | metadata  # earlier shards win
        files = {directory / name: shard for name, shard in shards.items()}
        # One tensor of a dtype that MLX does not know makes `mx.load` refuse the file, so such a file is read by hand.
        raw = frozenset(
            file
            for file, shard in files.items()
            if any(info.dtype not in MLX_DTYPES for info in shard.tensors.values())
        )
        return cls(
            directory, config, generation, MappingProxyType(dict(headers)), metadata, MappingProxyType(files), raw
        )

    def read(self, name: str) -> mx.array:
        """Return the tensor `name`, lazily: MLX reads its bytes when the array is evaluated, on the same thread.

        The checkpoint keeps no reference to an array it has returned, so a caller that drops the array frees it;
        reading the same name again opens the file again. Tensors of a shard that has a dtype MLX cannot load are read
        eagerly, one by one. 8-bit floats come as uint8 of the same shape; `headers[name].dtype` names the format.

        Raises:
            CheckpointError: no tensor has this name, MLX has no type for its dtype, or its file has changed.
        """
        info = self._known(name)
        if info.file in self._raw_files:
            return self._read_raw(info)
        # `mx.load` gives all tensors of a file at once. Those not asked for yet wait, unread, in `_lazy`; the one
        # returned is removed, so that only the caller keeps its memory.
        loaded = self._lazy.get(info.file, {})
        if name not in loaded:
            loaded = self._lazy[info.file] = self._load(info.file)
        array = loaded.pop(name)
        if not loaded:
            del self._lazy[info.file]
        return array

    def check_unchanged(self) -> None:
        """Check, after all is read, that no weight file changed: of a read itself, only its beginning is safe.

        Raises:
            CheckpointError: one changed since it was opened, or is gone.
        """
        for file, shard in self._shards.items():
            try:
                _check_stamp(file, shard, file.stat())
            except OSError as error:
                raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error

    def _known(self, name: str) -> TensorInfo:
        info = self.headers.get(name)
        if info is None:
            raise CheckpointError(f"{self.directory}: no tensor {quoted(name)}")
        if info.dtype not in RAW_DTYPES:
            raise CheckpointError(
                f"{info.file}: tensor {quoted(name)} has dtype {info.dtype}, for which MLX has no type; "
                f"convert it to one of {', '.join(RAW_DTYPES)}"
            )
        return info

    @property
    def _lazy(self) -> dict[Path, dict[str, mx.array]]:
        """This thread's arrays that wait to be asked for, by file and name."""
        return self._own.files

    def _load(self, file: Path) -> dict[str, mx.array]:
        """Load all tensors of a shard lazily, and compare what MLX's own parser saw with the checked header."""
        import mlx.core as mx

        shard = self._shards[file]
        try:
            _check_stamp(file, shard, file.stat())
            arrays = mx.load(str(file), format="safetensors")
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{file}: MLX cannot load it: {error}") from error
        assert isinstance(arrays, dict), "a safetensors file loads as a dict"
        for name, info in shard.tensors.items():
            array = arrays.get(name)
            if array is None or array.shape != info.shape or array.dtype != getattr(mx, MLX_DTYPES[info.dtype]):
                raise CheckpointError(
                    f"{file}: MLX reads tensor {quoted(name)} with another shape or dtype than its checked header has; "
                    "did the file change?"
                )
        return arrays

    def _read_raw(self, info: TensorInfo) -> mx.array:
        """Read one tensor's bytes now, as an array of the dtype that `RAW_DTYPES` gives."""
        import mlx.core as mx
        import numpy as np

        try:
            with info.file.open("rb") as file:
                _check_stamp(info.file, self._shards[info.file], os.fstat(file.fileno()))
                file.seek(info.offset)
                data = file.read(info.nbytes)
        except OSError as error:
            raise CheckpointError(f"{info.file}: cannot be read: {error.strerror or error}") from error
        if len(data) != info.nbytes:
            raise CheckpointError(f"{info.file}: ends inside tensor {quoted(info.name)}")
        dtype = mlx_dtype(info)
        if not data:
            return mx.zeros(info.shape, dtype)
        return mx.array(np.frombuffer(data, dtype=np.uint8)).view(dtype).reshape(info.shape)

    def read_part(self, name: str, cut: Cut) -> mx.array:
        """Read the kept places of tensor `name` now, and of its other bytes only those that lie between short runs.

        Raises:
            CheckpointError: as `read`.
        """
        from runner.checkpoint.cut_reader import read_cut

        info = self._known(name)
        try:
            with info.file.open("rb") as file:
                _check_stamp(info.file, self._shards[info.file], os.fstat(file.fileno()))
                return read_cut(file.fileno(), info.offset, info.shape, mlx_dtype(info), cut)
        except OSError as error:
            raise CheckpointError(f"{info.file}: cannot be read: {error.strerror or error}") from error
        except EOFError:
            raise CheckpointError(f"{info.file}: ends inside tensor {quoted(info.name)}") from None


def mlx_dtype(info: TensorInfo) -> mx.Dtype:
    """The dtype that `RAW_DTYPES` gives."""
    import mlx.core as mx

    dtype: mx.Dtype = getattr(mx, RAW_DTYPES[info.dtype])
    return dtype


def _check_stamp(file: Path, shard: ShardHeader, status: os.stat_result) -> None:
    if Stamp.of(status) != shard.stamp:
        raise CheckpointError(f"{file}: changed since the checkpoint was opened; open it again")
