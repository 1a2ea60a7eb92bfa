"""Damaged GGUF files (seeded): each is refused in one line, or loads arrays of the stated shapes, in little memory."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf_writer as writer
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_bytes import file_bytes, header, string, vocabulary
from gguf_cases import blocks

from runner.checkpoint.gguf import GGUF
from runner.errors import RunnerError

FLIPS, FIELDS, CUTS, VALUES = 3000, 4000, 600, 1500
LIMIT, TRACED = 32 << 20, 4
"""Bytes of memory that opening a file may take, measured for one file in four, since measuring is four times slower."""
NUMBERS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62,
           2**63 - 1, 2**63, 2**64 - 1]  # fmt: skip


def metadata() -> dict[str, Any]:
    config = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "vocab_size": 260,
    }  # fmt: skip
    return {**writer.metadata_of(config), **vocabulary(260), "tokenizer.chat_template": "{{ messages }}"}


def tensors() -> dict[str, Any]:
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "ffn_up": (32, 32), "ffn_down": (32, 32), "ffn_gate": (32, 32),
              "attn_output": (32, 32)}  # fmt: skip
    kinds = [Type.Q4_0, Type.Q5_1, Type.Q8_0, Type.Q4_1, Type.IQ4_NL, Type.MXFP4]
    found: dict[str, Any] = {"token_embd.weight": (blocks(Type.Q5_0, 260, 32), Type.Q5_0)}
    for (name, shape), kind in zip(shapes.items(), kinds, strict=True):
        found[f"blk.0.{name}.weight"] = (blocks(kind, *shape), kind)
    found["blk.0.attn_norm.weight"] = (np.ones(32, np.float32), Type.F32)
    found["output.weight"] = (np.ones((260, 32), np.float16), Type.F16)
    return found


@pytest.fixture(scope="module")
def whole() -> bytes:
    return file_bytes(metadata(), tensors())


def fields(data: bytes) -> Iterator[tuple[int, str]]:
    """Positions and formats of the header's counts, lengths, types, dimensions and offsets; found independently."""
    count, pairs = struct.unpack_from("<QQ", data, 8)
    yield from ((4, "<I"), (8, "<Q"), (16, "<Q"))
    place = 24

    def text() -> Iterator[tuple[int, str]]:
        nonlocal place
        yield place, "<Q"
        place += 8 + struct.unpack_from("<Q", data, place)[0]

    sizes = {0: 1, 4: 4, 5: 4, 6: 4, 7: 1}
    for _ in range(pairs):
        yield from text()
        yield place, "<I"
        kind = struct.unpack_from("<I", data, place)[0]
        place += 4
        if kind == 8:
            yield from text()
        elif kind == 9:
            yield from ((place, "<I"), (place + 4, "<Q"))
            inner, items = struct.unpack_from("<IQ", data, place)
            place += 12
            if inner == 8:
                for _ in range(items):
                    yield from text()
            else:
                place += items * sizes[inner]
        else:
            if sizes[kind] == 4:
                yield place, "<I"
            place += sizes[kind]
    for _ in range(count):
        yield from text()
        rank = struct.unpack_from("<I", data, place)[0]
        yield place, "<I"
        yield from ((place + 4 + 8 * index, "<Q") for index in range(rank))
        yield place + 4 + 8 * rank, "<I"
        yield place + 8 + 8 * rank, "<Q"
        place += 16 + 8 * rank


def outcome(path: Path, data: bytes) -> str:
    """Open a file and read all its arrays and its tokenizer: "loaded" or "refused"; anything else fails the test."""
    path.unlink(missing_ok=True)  # overwritten in place it would be flushed to the disk at each close
    path.write_bytes(data)
    try:
        found = GGUF.open(path)
        for name, part in found.headers.items():
            array = found.read(name)
            assert tuple(array.shape) == part.shape and array.nbytes == part.nbytes
        found.tokenizer().encode("ab c")
        result = "loaded"
    except RunnerError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 2000
        result = "refused"
    return result


def traced(path: Path, data: bytes) -> str:
    """`outcome`, and a check that it took less memory than `LIMIT`."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        result = outcome(path, data)
        assert tracemalloc.get_traced_memory()[1] - before < LIMIT
    finally:
        tracemalloc.stop()
    return result


def run(path: Path, cases: Iterator[bytes], every: int = TRACED) -> Counter[str]:
    """Count the outcomes of the cases; for each `every`-th case, memory is measured too."""
    return Counter((outcome if number % every else traced)(path, case) for number, case in enumerate(cases))


def test_the_undamaged_file_loads(whole: bytes, tmp_path: Path) -> None:
    assert run(tmp_path / "m.gguf", iter([whole])) == {"loaded": 1}


def test_flipped_bits(whole: bytes, tmp_path: Path) -> None:
    rng, size = random.Random(1), len(header(metadata(), {})) + 600

    def cases() -> Iterator[bytes]:
        for _ in range(FLIPS):
            data = bytearray(whole)
            for _ in range(rng.choice((1, 1, 2, 8))):
                data[rng.randrange(size)] = rng.randrange(256)
            yield bytes(data)

    found = run(tmp_path / "m.gguf", cases())
    assert found["refused"] > FLIPS // 4 and found["loaded"] > FLIPS // 20


def test_counts_lengths_types_dimensions_and_offsets(whole: bytes, tmp_path: Path) -> None:
    rng = random.Random(2)
    places = list(fields(whole))
    strings = [place for place in places if place[1] == "<Q"]

    def cases() -> Iterator[bytes]:
        for _ in range(FIELDS):
            data = bytearray(whole)
            place, form = rng.choice(rng.choice((places, places[:3], places[-60:], strings)))
            old = struct.unpack_from(form, data, place)[0]
            number = rng.choice([*NUMBERS, old + 1, old - 1, old * 2, old + 32]) % (1 << 8 * struct.calcsize(form))
            struct.pack_into(form, data, place, number)
            yield bytes(data)

    found = run(tmp_path / "m.gguf", cases())
    assert found["refused"] > FIELDS // 2


def test_files_cut_short(whole: bytes, tmp_path: Path) -> None:
    rng = random.Random(3)
    found = run(tmp_path / "m.gguf", (whole[: rng.randrange(len(whole) - 32)] for _ in range(CUTS)))
    assert found == {"refused": CUTS}


def test_metadata_of_other_kinds(tmp_path: Path) -> None:
    """Well-formed files with metadata values of unexpected types and sizes."""
    rng = random.Random(4)
    usual, parts = metadata(), tensors()
    odd: list[Callable[[], Any]] = [
        lambda: rng.choice(
            [True, False, "", "x", -1, 0, 1, 3, 2**31, 2**40, 0.0, -1.5, 1e30, float("inf"), float("nan")]
        ),
        lambda: np.arange(rng.randrange(5), dtype=np.int32),
        lambda: [rng.choice(["", "a", "a b", "Ġ", "<s>", "\u0000"]) for _ in range(rng.randrange(4))],
        lambda: np.full(260, rng.choice([np.nan, np.inf, -1.0]), np.float32),
        lambda: rng.sample(usual["tokenizer.ggml.tokens"], 260),
    ]

    def cases() -> Iterator[bytes]:
        for _ in range(VALUES):
            changed = dict(usual)
            for key in rng.sample(sorted(usual), rng.choice((1, 1, 2))):
                changed[key] = rng.choice(odd)()
            if rng.random() < 0.2:
                changed["tokenizer.ggml.model"] = "llama"
                changed["tokenizer.ggml.scores"] = np.arange(260, dtype=np.float32)
            yield file_bytes({**changed, "general.alignment": 32}, parts)

    found = run(tmp_path / "m.gguf", cases())
    assert found["refused"] > VALUES // 4 and found["loaded"] > VALUES // 20


def test_hostile_sizes_are_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    def array(kind: int, count: int) -> bytes:
        return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<IIQ", 9, kind, count) + bytes(64)

    huge = [array(kind, count) for kind in (0, 4, 7, 8, 10) for count in (2**20, 2**40, 2**63)]
    nested = [array(9, 1)]
    claims = [b"GGUF" + struct.pack("<IQQ", 3, a, b) + bytes(64) for a in (0, 2**20, 2**63) for b in (2**20, 2**63)]
    name = [b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62) + bytes(64)]
    found = run(tmp_path / "m.gguf", iter([*huge, *nested, *claims, *name, b"", b"GG", b"GGUF", bytes(24)]), every=1)
    assert set(found) == {"refused"}


def test_overlaps_and_repeats_are_refused(tmp_path: Path) -> None:
    one = (np.ones((4, 32), np.float32), Type.F32)
    data = file_bytes(metadata(), {"token_embd.weight": one, "output.weight": one})
    places = {"token_embd.weight": ((4, 32), 0, 0), "output.weight": ((4, 32), 0, 32)}
    assert "'token_embd.weight' and 'output.weight' overlap" in refusal(tmp_path, header(metadata(), places) + data)
    twice = data.replace(b"output.weight", b"token_embd.we", 1).replace(struct.pack("<Q", 13) + b"token", b"")
    assert refusal(tmp_path, twice)
    same = file_bytes({"a": 1, "b": 1}, {}).replace(b"b\x04", b"a\x04")
    assert "metadata key 'a' comes twice" in refusal(tmp_path, same)
    swapped = b"GGUF" + struct.pack(">IQQ", 3, 0, 0)
    assert "big-endian" in refusal(tmp_path, swapped)


def refusal(tmp_path: Path, data: bytes) -> str:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(RunnerError) as caught:
        GGUF.open(tmp_path / "m.gguf")
    return str(caught.value)
