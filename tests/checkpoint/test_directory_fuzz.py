"""Mutated headers, indexes and configs (seeded): each is refused with a `CheckpointError` or loads its own bytes."""

from __future__ import annotations

import json
import random
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from runner.checkpoint import safetensors_header
from runner.checkpoint.directory import Checkpoint, read_json
from runner.errors import CheckpointError

HEADERS, INDEXES, CONFIGS = 7_000, 3_000, 2_000

NUMBERS = [-1, 0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**53, 2**63, 2**64]
VALUES: list[Any] = [
    *NUMBERS,
    -(2**63),
    2**200,
    1.5,
    1e308,
    True,
    None,
    "",
    "F32",
    "x" * 300,
    [],
    [1],
    [[]],
    {},
    {"a": 1},
]
DTYPES = [
    "BOOL",
    "U8",
    "I8",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "F64",
    "I64",
    "F8_E4M3",
    "F8_E5M2",
    "F4",
    "f32",
]
SHAPES: list[tuple[str, list[int], int]] = [("F32", [2, 1], 8), ("U8", [3], 3), ("BF16", [], 2), ("U32", [0, 4], 0)]

Header = dict[str, Any]


def base_header() -> tuple[Header, bytes]:
    header: Header = {"__metadata__": {"format": "pt"}}
    position = 0
    for number, (dtype, shape, size) in enumerate(SHAPES):
        offsets = [position, position + size]
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        position += size
    return json.loads(json.dumps(header)), bytes(range(1, position + 1))


def mutate_tree(rng: random.Random, value: Any) -> Any:
    """Make one random change somewhere in a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        action = rng.random()
        if action < 0.08:
            return {k: v for k, v in value.items() if k != key}
        if action < 0.14:
            return {**value, rng.choice(["dtype", "x", "__metadata__", "t1", "../x", "\0"]): rng.choice(VALUES)}
        if action < 0.2:
            return {k if k != key else k + "'": v for k, v in value.items()}
        return {**value, key: mutate_tree(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        index = rng.randrange(len(value))
        if rng.random() < 0.15:
            return [value[index], *value] if rng.random() < 0.5 else value[:index] + value[index + 1 :]
        return [mutate_tree(rng, item) if i == index else item for i, item in enumerate(value)]
    if isinstance(value, str) and value in DTYPES and rng.random() < 0.8:
        return rng.choice(DTYPES)
    if type(value) is int and rng.random() < 0.8:
        return value + rng.choice([-4, -1, 1, 4]) if rng.random() < 0.5 else rng.choice(NUMBERS)
    return rng.choice(VALUES)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out)) if out else 0
        action = rng.random()
        if action < 0.5 and out:
            out[at] = rng.choice(b'0123456789{}[]",:\\ .-eFUB\x00\xff') if rng.random() < 0.7 else rng.randrange(256)
        elif action < 0.7:
            out[at : at + rng.randint(1, 4)] = b""
        elif action < 0.9:
            out[at:at] = rng.choice([b"0", b"[", b'"', b"{}", b"9" * 20, b"\\ud800", b"\xf0\x9f", b"NaN", b"-"])
        else:
            end = at + rng.randint(1, 40)
            out[end:end] = out[at:end]  # repeats an entry or a part of one
    return bytes(out)


def swap(rng: random.Random, header: Header) -> Header:
    """Exchange the offsets of two tensors, or their names; the file with exchanged names is still right."""
    one, two = rng.sample([name for name in header if name != "__metadata__"], 2)
    if rng.random() < 0.5:
        header[one]["data_offsets"], header[two]["data_offsets"] = (
            header[two]["data_offsets"],
            header[one]["data_offsets"],
        )
        return header
    return {{one: two, two: one}.get(name, name): value for name, value in header.items()}


def header_case(rng: random.Random) -> bytes:
    header, data = base_header()
    kind = rng.random()
    length: Callable[[int], int] = lambda true: true  # noqa: E731
    if kind < 0.15:
        header = swap(rng, header)
    elif kind < 0.65:
        for _ in range(rng.choice([1, 1, 2])):
            header = mutate_tree(rng, header)
    text = json.dumps(header).encode()
    if kind >= 0.65:
        text = mutate_bytes(rng, text)
    elif rng.random() < 0.08 and isinstance(header, dict) and header:  # an entry that comes twice
        again = rng.choice(list(header))
        other = mutate_tree(rng, header[again]) if rng.random() < 0.5 else header[again]
        text = text[:-1] + f", {json.dumps(again)}: {json.dumps(other)}".encode() + b"}"
    if rng.random() < 0.1:
        delta = rng.choice([-(1 << 63), -8, -1, 1, 8, 1 << 20, (1 << 63) - 1])
        length = lambda true: (true + delta) % (1 << 64)  # noqa: E731
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data) + 1)] + bytes(rng.randrange(3))
    whole = struct.pack("<Q", length(len(text))) + text + data
    return whole[: rng.randrange(len(whole))] if rng.random() < 0.02 else whole


def check_load(checkpoint: Checkpoint, files: dict[str, bytes]) -> str:
    """Check that every tensor lies within its file's data and holds exactly the bytes that the header gives it."""
    outcome = "loaded"
    for name, info in checkpoint.headers.items():
        whole = files[info.file.name]
        (length,) = struct.unpack_from("<Q", whole)
        stated = json.loads(whole[8 : 8 + length])[name]
        begin, end = (8 + length + offset for offset in stated["data_offsets"])
        assert 8 + length <= begin <= end <= len(whole)
        assert (info.offset, info.nbytes) == (begin, end - begin)
        assert (info.dtype, list(info.shape)) == (stated["dtype"], stated["shape"])
        try:
            array = checkpoint.read(name)
        except CheckpointError as error:
            assert info.dtype in ("F64", "F4") and info.dtype in str(error)
            outcome = "dtype refused"
            continue
        assert array.shape == info.shape
        found = np.array(array.flatten().view(mx.uint8)).tobytes() if array.size else b""
        assert found == whole[begin:end]
    return outcome


def write_anew(path: Path, content: bytes) -> None:
    """Write a file after deleting the old one; ext4 flushes a file that is overwritten in place at each close."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def run(directory: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        write_anew(directory / name, content)
    try:
        checkpoint = Checkpoint.open(directory)
    except CheckpointError as error:
        message = str(error)
        assert str(directory) in message and len(message) < 1500 and message.isprintable(), message
        return "refused"
    return check_load(checkpoint, files)


def test_mutated_headers(tmp_path: Path) -> None:
    rng = random.Random(20260)
    (tmp_path / "config.json").write_text("{}")
    outcomes = Counter(run(tmp_path, {"model.safetensors": header_case(rng)}) for _ in range(HEADERS))
    assert outcomes.total() == HEADERS
    assert outcomes["loaded"] > HEADERS // 20 and outcomes["refused"] > HEADERS // 2 and outcomes["dtype refused"] > 0


def test_own_checks_are_no_laxer_than_the_library(tmp_path: Path) -> None:
    """Whatever our own checks accept when run alone, the safetensors library accepts too."""
    rng = random.Random(20263)
    path = tmp_path / "model.safetensors"
    outcomes: Counter[str] = Counter()
    for _ in range(CONFIGS):
        write_anew(path, header_case(rng))
        try:
            safetensors_header.read_header(path)
        except CheckpointError:
            outcomes["refused"] += 1
            continue
        safetensors_header.judge(path)
        outcomes["accepted"] += 1
    assert outcomes["accepted"] > CONFIGS // 20 and outcomes["refused"] > CONFIGS // 2


def shard(names: list[str], value: int) -> bytes:
    header = {n: {"dtype": "U8", "shape": [2], "data_offsets": [2 * i, 2 * i + 2]} for i, n in enumerate(names)}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes([value]) * 2 * len(names)


def test_mutated_indexes(tmp_path: Path) -> None:
    """A checkpoint that loads may hold only tensors of the two shards; the other files around are bait."""
    rng = random.Random(20261)
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    bait = shard(["a", "b", "c"], 66)
    (tmp_path / "x.safetensors").write_bytes(bait)
    (directory / "link.safetensors").symlink_to("../x.safetensors")
    shards = {"1.safetensors": shard(["a", "b"], 1), "2.safetensors": shard(["b", "c"], 2)}
    names = [*shards, "../x.safetensors", str(tmp_path / "x.safetensors"), "link.safetensors", "3.safetensors", ".", ""]
    outcomes: Counter[str] = Counter()
    for _ in range(INDEXES):
        weight_map: Any = {"a": "1.safetensors", "b": rng.choice(list(shards)), "c": "2.safetensors"}
        kind = rng.random()
        if kind < 0.3:
            weight_map[rng.choice("abcd")] = rng.choice(names)
        index: Any = {"metadata": {"total_size": 6}, "weight_map": weight_map}
        if 0.3 <= kind < 0.6:
            index = mutate_tree(rng, index)
        text = json.dumps(index).encode()
        outcomes[
            run(directory, shards | {"model.safetensors.index.json": mutate_bytes(rng, text) if kind > 0.6 else text})
        ] += 1
    assert outcomes.total() == INDEXES
    assert outcomes["loaded"] > INDEXES // 20 and outcomes["refused"] > INDEXES // 3


def test_mutated_configs(tmp_path: Path) -> None:
    """An accepted config equals what Python's own parser reads; a refusal names the file."""
    rng = random.Random(20262)
    base = {"model_type": "llama", "hidden_size": 64, "rope_scaling": {"factor": 2.0, "type": "linear"}, "eos": [1, 2]}
    path = tmp_path / "config.json"
    outcomes: Counter[str] = Counter()
    for _ in range(CONFIGS):
        tree = rng.random() < 0.5
        text = json.dumps(mutate_tree(rng, base) if tree else base).encode()
        text = text if tree else mutate_bytes(rng, text)
        write_anew(path, text)
        try:
            value = read_json(path, 1 << 20)
        except CheckpointError as error:
            assert "config.json" in str(error)
            outcomes["refused"] += 1
            continue
        assert isinstance(value, dict) and value == json.loads(text)
        outcomes["loaded"] += 1
    assert outcomes["loaded"] > CONFIGS // 20 and outcomes["refused"] > CONFIGS // 20


@pytest.mark.parametrize("trick", ["header", "index"])
def test_unmutated_bases_load(tmp_path: Path, trick: str) -> None:
    """The files that are mutated load themselves; otherwise refusals would not be due to the mutations."""
    (tmp_path / "config.json").write_text("{}")
    if trick == "header":
        header, data = base_header()
        text = json.dumps(header).encode()
        assert run(tmp_path, {"model.safetensors": struct.pack("<Q", len(text)) + text + data}) == "loaded"
        return
    index = json.dumps({"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}).encode()
    assert run(tmp_path, {"1.safetensors": shard(["a", "b"], 1), "model.safetensors.index.json": index}) == "loaded"
