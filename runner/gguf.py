"""GGUF files of the Llama architecture, converted to a hub-style directory that `load` (and mlx-lm) read.

Source: the GGUF specification of ggml (docs/gguf.md) and its block formats. The file is untrusted: every count, length
and offset is checked before it is used.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from runner.checkpoint import write_checkpoint
from runner.errors import CheckpointError
from runner.gguf_tokenizer import tokenizer_files

Array = npt.NDArray[Any]

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_ITEMS = 4_000_000


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: `shape` row-major as NumPy has it (GGUF lists it reversed)."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Block:
    """A block format: `size` bytes hold `count` numbers; `unpack` gives the arrays that are stored for a weight."""

    name: str
    count: int
    size: int
    bits: int | None


BLOCKS: Mapping[int, Block] = {
    0: Block("F32", 1, 4, None),
    1: Block("F16", 1, 2, None),
    2: Block("Q4_0", 32, 18, 4),
    3: Block("Q4_1", 32, 20, 4),
    8: Block("Q8_0", 32, 34, 8),
    30: Block("BF16", 1, 2, None),
}


class Reader:
    """The container: metadata and tensors of a mapped file."""

    def __init__(self, path: Path) -> None:
        """Raises `CheckpointError` for anything that is not a whole, well-formed GGUF file."""
        self.path = path
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise self.error("it is too short")
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.position = 0
        magic, version = self.take("<4s")[0], self.take("<I")[0]
        if magic != b"GGUF" or version not in (2, 3):
            raise self.error(f"magic {magic!r}, version {version}: not GGUF 2 or 3")
        tensors, pairs = self.take("<Q")[0], self.take("<Q")[0]
        if tensors > 100_000 or pairs > 100_000:
            raise self.error(f"it claims {tensors} tensors and {pairs} metadata entries")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.string()
            if key in self.metadata:
                raise self.error(f"metadata key {key!r} comes twice")
            self.metadata[key] = self.value(self.take("<I")[0])
        entries = [self.entry() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 65536 or alignment % 8:
            raise self.error(f"alignment {alignment!r}")
        self.start = -(-self.position // alignment) * alignment
        self.tensors = {entry.name: entry for entry in entries}
        if len(self.tensors) != len(entries):
            raise self.error("a tensor name comes twice")
        for entry in entries:
            self.check(entry)

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path.name} is not a readable GGUF file: {what}")

    def take(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize(form)
        if self.position + size > len(self.data):
            raise self.error(f"it ends at byte {len(self.data)}, in the middle of its header")
        values = struct.unpack_from(form, self.data, self.position)
        self.position += size
        return values

    def string(self) -> str:
        size = self.take("<Q")[0]
        if size > len(self.data) - self.position:
            raise self.error(f"a string of {size} bytes at byte {self.position}")
        raw = self.data[self.position : self.position + size]
        self.position += size
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"a string that is not UTF-8 at byte {self.position - size}") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise self.error(f"metadata type {kind}")
            return self.take(_SCALARS[kind])[0]
        inner, count = self.take("<I")[0], self.take("<Q")[0]
        if count > _MAX_ITEMS or inner == _ARRAY or (inner not in _SCALARS and inner != _STRING):
            raise self.error(f"an array of {count} items of type {inner}")
        if inner == _STRING:
            return [self.string() for _ in range(count)]
        return list(self.take(f"<{count}{_SCALARS[inner][1]}"))

    def entry(self) -> TensorEntry:
        name = self.string()
        (rank,) = self.take("<I")
        if not 1 <= rank <= 4:
            raise self.error(f"tensor {name!r} has {rank} dimensions")
        shape = tuple(reversed(self.take(f"<{rank}Q")))
        kind, offset = self.take("<IQ")
        return TensorEntry(name, shape, kind, offset)

    def check(self, entry: TensorEntry) -> None:
        if entry.kind not in BLOCKS:
            known = ", ".join(block.name for block in BLOCKS.values())
            raise CheckpointError(
                f"{self.path.name}: tensor {entry.name!r} has type {entry.kind}; supported are {known}"
            )
        block = BLOCKS[entry.kind]
        count = 1
        for size in entry.shape:
            count *= size
        if not 0 < count < 1 << 40 or entry.shape[-1] % block.count or entry.offset % 8:
            raise self.error(f"tensor {entry.name!r}: shape {entry.shape}, type {block.name}, offset {entry.offset}")
        if self.start + entry.offset + count // block.count * block.size > len(self.data):
            raise self.error(f"tensor {entry.name!r} ends beyond the file")

    def raw(self, entry: TensorEntry) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, one row of blocks for each row of the tensor."""
        block = BLOCKS[entry.kind]
        rows = int(np.prod(entry.shape[:-1], dtype=np.int64))
        width = entry.shape[-1] // block.count * block.size
        return np.frombuffer(self.data, np.uint8, rows * width, self.start + entry.offset).reshape(rows, width)


def unpack(entry: TensorEntry, raw: npt.NDArray[np.uint8]) -> dict[str, mx.array]:
    """`{"": array}`, or MLX's affine form: `.weight` uint32, `.scales` and `.biases` float16, groups of 32.

    Exact: Q4_1 is `d q + m`; Q4_0 is `d (q - 8)`; Q8_0 is `d (q + 128) - 128 d` with q as an unsigned byte. The products
    with a power of two are exact in float16 wherever they do not overflow, which is checked.
    """
    block = BLOCKS[entry.kind]
    if block.name == "F32":
        return {"": mx.array(raw.view(np.float32).reshape(entry.shape))}
    if block.name == "F16":
        return {"": mx.array(raw.view(np.float16).reshape(entry.shape))}
    if block.name == "BF16":
        return {"": mx.array(raw.view(np.uint16).reshape(entry.shape)).view(mx.bfloat16)}
    blocks = raw.reshape(raw.shape[0], -1, block.size)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    if block.name == "Q8_0":
        codes = (blocks[..., 2:] ^ 0x80).reshape(raw.shape[0], -1)
        biases = scales * np.float16(-128)
        packed = np.ascontiguousarray(codes).view("<u4")
    else:
        start = 2
        if block.name == "Q4_1":
            biases = np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)[..., 0]
            start = 4
        else:
            biases = scales * np.float16(-8)
        nibbles = blocks[..., start:]
        codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).reshape(raw.shape[0], -1)
        packed = np.ascontiguousarray(codes[:, ::2] | (codes[:, 1::2] << 4)).view("<u4")
    if not np.isfinite(biases).all():
        raise CheckpointError(f"tensor {entry.name!r}: a {block.name} scale is too large for float16")
    return {".weight": mx.array(packed), ".scales": mx.array(scales), ".biases": mx.array(biases)}


_NAMES = {
    "token_embd.weight": "model.embed_tokens",
    "output_norm.weight": "model.norm",
    "output.weight": "lm_head",
}
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hub_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    parts = name.split(".")
    if (
        len(parts) == 4
        and parts[0] == "blk"
        and parts[1].isdigit()
        and parts[2] in _LAYER_NAMES
        and parts[3] == "weight"
    ):
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}"
    raise CheckpointError(f"tensor {name!r} is not part of a Llama that this converter knows")


_KEYS = frozenset(
    [
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "vocab_size",
    ]
)


def config_of(reader: Reader) -> dict[str, Any]:
    """`config.json` of the file.

    Raises:
        CheckpointError: another architecture, a missing key, or a key that would change numbers and is not understood.
    """
    metadata = reader.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{reader.path.name}: architecture {architecture!r} is not supported; llama is")
    values = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    unknown = sorted(set(values) - _KEYS)
    if unknown:
        raise CheckpointError(f"{reader.path.name}: not understood: " + ", ".join(f"llama.{key}" for key in unknown))
    try:
        heads, hidden = int(values["attention.head_count"]), int(values["embedding_length"])
        head_dim = int(values.get("attention.key_length", hidden // max(heads, 1)))
        if int(values.get("rope.dimension_count", head_dim)) != head_dim:
            raise CheckpointError(f"{reader.path.name}: partial rotary embedding is not supported in GGUF Llamas")
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": int(values["feed_forward_length"]),
            "num_hidden_layers": int(values["block_count"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(values.get("attention.head_count_kv", heads)),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": int(values["context_length"]),
            # float32 prints as 9.999999747378752e-06: the shortest decimal of the same float32 is what was meant.
            "rms_norm_eps": float(str(np.float32(values["attention.layer_norm_rms_epsilon"]))),
            "rope_theta": float(values.get("rope.freq_base", 10000.0)),
            "tie_word_embeddings": "output.weight" not in reader.tensors,
            "vocab_size": reader.tensors["token_embd.weight"].shape[0],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{reader.path.name}: metadata is missing or malformed: {error}") from error
    return config


def _unpermute(array: mx.array, heads: int) -> mx.array:
    """Undo llama.cpp's row order for interleaved rotary: pairs (2i, 2i+1) of a head go back to (i, i + D/2)."""
    rows = array.shape[0]
    return array.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(array.shape)


def convert(src: Path, out: Path, *, progress: Callable[[int, int], None] | None = None) -> Path:
    """Convert the GGUF file `src` into the new directory `out`: config, tokenizer, chat template, packed weights.

    Raises:
        CheckpointError: `src` is malformed or holds what is not supported, or `out` exists and is not empty.
    """
    reader = Reader(src)
    config = config_of(reader)
    heads = {"self_attn.q_proj": config["num_attention_heads"], "self_attn.k_proj": config["num_key_value_heads"]}
    packed = {_hub_name(entry.name): BLOCKS[entry.kind].bits for entry in reader.tensors.values()}
    bits = [value for value in packed.values() if value is not None]
    if bits:
        common = max(set(bits), key=bits.count)
        quantization: dict[str, Any] = {"group_size": 32, "bits": common}
        for name, value in packed.items():
            if value not in (common, None):
                quantization[name] = {"group_size": 32, "bits": value}
        config["quantization"] = quantization

    def tensors() -> Iterator[tuple[str, mx.array]]:
        for index, entry in enumerate(reader.tensors.values()):
            name = _hub_name(entry.name)
            count = next((heads[part] for part in heads if name.endswith(part)), None)
            for suffix, array in unpack(entry, reader.raw(entry)).items():
                if count is not None:
                    if array.shape[0] % (2 * count):
                        raise CheckpointError(f"{name}: {array.shape[0]} rows do not divide into {count} heads")
                    array = _unpermute(array, count)
                yield name + (suffix or ".weight"), array
            if progress is not None:
                progress(index + 1, len(reader.tensors))

    files, special = tokenizer_files(reader.metadata)
    config.update(special)
    generation = {**special, "do_sample": False}
    files["generation_config.json"] = json.dumps(generation, indent=2)
    write_checkpoint(out, tensors(), config, files)
    return out
