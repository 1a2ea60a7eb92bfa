"""The bytes of a GGUF file, written by hand: container, metadata, small vocabularies. Source: ggml's docs/gguf.md."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

Metadata = Mapping[str, Any]
SIZES = {**{int(kind): size for kind, size in GGML_QUANT_SIZES.items()}, 42: (64, 18)}
"""Numbers and bytes of a block, by ggml's number of the type; 42 is Q2_0, which gguf 0.19 does not know."""
Tensors = Mapping[str, tuple[np.ndarray, Type]]  # bytes [rows, row_bytes] or plain numbers, with the type


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    """Encode a metadata value and its type: bool, int (u32, i64 if too large), float (f32), str, list or array."""
    if isinstance(item, bool):
        return struct.pack("<I?", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item) if 0 <= item < 1 << 32 else struct.pack("<Iq", 11, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, str):
        return struct.pack("<I", 8) + string(item)
    if isinstance(item, np.ndarray):
        kind = {"bool": 7, "uint8": 0, "int32": 5, "uint32": 4, "float32": 6}[str(item.dtype)]
        return struct.pack("<IIQ", 9, kind, item.size) + item.tobytes()
    if all(isinstance(part, str) for part in item):
        return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(string, item))
    return value(np.array(item, np.float32 if any(isinstance(part, float) for part in item) else np.int32))


def header(metadata: Metadata, tensors: Mapping[str, tuple[tuple[int, ...], int, int]], version: int = 3) -> bytes:
    """The bytes before the data; tensors are given as (shape row-major, type, offset) by name."""
    parts = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(metadata))]
    parts += [string(key) + value(item) for key, item in metadata.items()]
    for name, (shape, kind, offset) in tensors.items():
        parts += [string(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset)]
    data = b"".join(parts)
    alignment = metadata.get("general.alignment", 32)
    return data + bytes(-len(data) % alignment)


def file_bytes(metadata: Metadata, tensors: Tensors, version: int = 3) -> bytes:
    """The bytes of a whole file; the data follow in the order of the tensors, each aligned."""
    alignment = metadata.get("general.alignment", 32)
    places, chunks, offset = {}, [], 0
    for name, (array, kind) in tensors.items():
        count, size = SIZES[int(kind)]
        shape = array.shape if array.dtype != np.uint8 else (*array.shape[:-1], array.shape[-1] // size * count)
        places[name] = (shape, int(kind), offset)
        chunks.append(array.tobytes() + bytes(-array.nbytes % alignment))
        offset += len(chunks[-1])
    return header(metadata, places, version) + b"".join(chunks)


def vocabulary(count: int) -> dict[str, Any]:
    """A byte-level vocabulary without merges: 256 bytes, then filler tokens, of which the last is BOS."""
    bytes_ = sorted(byte_letters())
    tokens = [*[*bytes_, *(f"[{index}]" for index in range(count))][: count - 1], "<s>"]
    types = [1] * (count - 1) + [3]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": count - 1,
        "tokenizer.ggml.eos_token_id": count - 1,
    }


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte: a printable byte is its own letter, the others get letters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def substring_vocabulary(texts: Iterable[str]) -> dict[str, Any]:
    """A byte-level vocabulary that shows how text is cut into words, as keys below `tokenizer.ggml.`.

    Every substring of the texts is a token and every way to join two tokens is a merge, so each word becomes one token.
    """
    letters = byte_letters()
    spelled = ["".join(letters[byte] for byte in text.encode()) for text in texts]
    longer = {text[a:b] for text in spelled for a in range(len(text)) for b in range(a + 2, len(text) + 1)}
    ordered = sorted(longer, key=lambda token: (len(token), token))
    merges = [f"{token[:cut]} {token[cut:]}" for token in ordered for cut in range(1, len(token))]
    tokens = ["<s>", *sorted(letters), *ordered]
    return {"tokens": tokens, "token_type": np.int32([3] + [1] * (len(tokens) - 1)), "merges": merges}
