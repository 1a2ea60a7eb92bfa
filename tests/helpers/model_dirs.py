"""Model directories of made-up files, true or not, and how they are refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoint.directory import Checkpoint
from runner.errors import CheckpointError


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a safetensors file with any header, right or wrong; `header` may be the JSON text itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor_file(names: list[str], value: int = 0) -> bytes:
    """A safetensors file in which each name is a U8 tensor of four bytes `value`."""
    header = {name: {"dtype": "U8", "shape": [4], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}
    return safetensors(header, bytes([value]) * 4 * len(names))


def model_dir(path: Path, files: dict[str, Any]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in {"config.json": {"model_type": "t"}, **files}.items():
        (path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def sharded(path: Path, weight_map: dict[str, Any], **shards: bytes) -> Path:
    files: dict[str, Any] = {f"{name}.safetensors": data for name, data in shards.items()}
    return model_dir(path, files | {"model.safetensors.index.json": {"weight_map": weight_map}})


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message
