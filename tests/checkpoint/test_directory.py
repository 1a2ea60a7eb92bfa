"""Checkpoint directories: which open, which are refused and why, what reads return and cost, and writing them back."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from model_dirs import model_dir, refusal, safetensors, sharded, tensor_file
from places import ROOT

from runner.checkpoint.directory import RAW_DTYPES, Checkpoint, read_json, write_checkpoint
from runner.checkpoint.safetensors_header import BITS, read_header
from runner.checkpoint.writer import new_directory
from runner.errors import CheckpointError, UsageError

F32_PAIR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


# --- what opens -------------------------------------------------------------------------------------------------------


def test_headers_come_without_mlx(tmp_path: Path) -> None:
    data = safetensors({"__metadata__": {"format": "pt"}, "a": F32_PAIR}, struct.pack("<2f", 1.5, -2))
    model_dir(tmp_path, {"model.safetensors": data, "generation_config.json": {"eos_token_id": [1, 2]}})
    code = (
        "import sys; from pathlib import Path; from runner.checkpoint.directory import Checkpoint\n"
        f"c = Checkpoint.open(Path({str(tmp_path)!r}))\n"
        "i = c.headers['a']; assert (i.name, i.dtype, i.shape, i.nbytes) == ('a', 'F32', (2,), 8), i\n"
        "assert c.config == {'model_type': 't'} and c.generation_config == {'eos_token_id': [1, 2]}\n"
        "assert c.metadata == {'format': 'pt'}\n"
        "assert 'mlx.core' not in sys.modules and 'huggingface_hub' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert Checkpoint.open(tmp_path).read("a").tolist() == [1.5, -2.0]


def test_single_file_without_generation_config(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(model_dir(tmp_path, {"model.safetensors": tensor_file(["a"], 7)}))
    assert checkpoint.generation_config == {} and checkpoint.metadata == {}
    assert checkpoint.read("a").tolist() == [7] * 4
    with pytest.raises(CheckpointError, match="no tensor 'b'"):
        checkpoint.read("b")
    with pytest.raises(TypeError):
        cast(dict[str, Any], checkpoint.headers)["b"] = checkpoint.headers["a"]


def test_the_index_decides_and_strays_are_not_loaded(tmp_path: Path) -> None:
    """A shard that the index does not name may hold anything; a tensor in two shards comes from the indexed one."""
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    sharded(tmp_path, weight_map, one=tensor_file(["a"], 1), two=tensor_file(["a", "b"], 2), stray=b"not safetensors")
    (tmp_path / "model.safetensors").write_bytes(tensor_file(["a", "x"], 9))
    checkpoint = Checkpoint.open(tmp_path)
    assert sorted(checkpoint.headers) == ["a", "b"]
    assert checkpoint.read("a").tolist() == [1] * 4 and checkpoint.read("b").tolist() == [2] * 4


def test_unlisted_tensors_of_named_shards_are_taken(tmp_path: Path) -> None:
    """Transformers takes them too: dropping them could silently drop an optional bias."""
    sharded(tmp_path / "m", {"a": "one.safetensors"}, one=tensor_file(["a", "b"], 1))
    assert sorted(Checkpoint.open(tmp_path / "m").headers) == ["a", "b"]
    weight_map = {"a": "one.safetensors", "c": "two.safetensors"}
    sharded(tmp_path / "n", weight_map, one=tensor_file(["a", "b"]), two=tensor_file(["b", "c"]))
    assert "does not list 'b'" in refusal(tmp_path / "n")


def test_links_inside_the_directory_and_the_hub_cache(tmp_path: Path) -> None:
    model_dir(tmp_path / "plain", {"real": tensor_file(["a"], 3)})
    (tmp_path / "plain/model.safetensors").symlink_to("real")
    assert Checkpoint.open(tmp_path / "plain").read("a").tolist() == [3] * 4

    repo = tmp_path / "hub/models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for name, content in (("config.json", b'{"x": 1}'), ("model.safetensors", tensor_file(["a"], 4))):
        (repo / "blobs" / f"hash-{name[:2]}").write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/hash-{name[:2]}")
    (tmp_path / "shortcut").symlink_to(snapshot)  # a user's own link to the directory
    for path in (snapshot, tmp_path / "shortcut"):
        checkpoint = Checkpoint.open(path)
        assert checkpoint.config == {"x": 1} and checkpoint.read("a").tolist() == [4] * 4


# --- what is refused --------------------------------------------------------------------------------------------------

BAD_NAMES = ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "a\0.safetensors"]
BAD_NAMES += ["..", ".", "", "C:x.safetensors", "a\n.safetensors", "x.bin", "\u202ex.safetensors"]


@pytest.mark.parametrize("name", [*BAD_NAMES, 3, None, ["one.safetensors"]])
def test_index_entries_that_are_not_plain_names(tmp_path: Path, name: Any) -> None:
    sharded(tmp_path / "m", {"a": name}, one=tensor_file(["a"]))
    (tmp_path / "x.safetensors").write_bytes(tensor_file(["a"]))
    message = refusal(tmp_path / "m")
    assert "model.safetensors.index.json" in message and "'a'" in message and "plain name" in message


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}, "'b' is not in one.safetensors"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors: no such file"),
        ({"weight_map": {}}, "weight_map must be"),
        ({"weight_map": ["a"]}, "weight_map must be"),
        ({}, "weight_map must be"),
        ([1], "expected a JSON object, found a list"),
        (b'{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "'a' appears twice"),
        (b'{"weight_map": ', "not valid JSON"),
    ],
)
def test_wrong_indexes(tmp_path: Path, index: Any, expected: str) -> None:
    files = {"one.safetensors": tensor_file(["a"]), "two.safetensors": tensor_file(["a"])}
    model_dir(tmp_path, files | {"model.safetensors.index.json": index})
    assert expected in refusal(tmp_path)


def test_links_out_loops_and_things_that_are_not_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(tensor_file(["a"]))
    for number, target in enumerate([str(secret), "../secret.safetensors"]):
        model = model_dir(tmp_path / f"link{number}", {})
        (model / "model.safetensors").symlink_to(target)
        assert "outside the model's directory" in refusal(model)
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        model = model_dir(tmp_path / f"json-{name}", {"model.safetensors": tensor_file(["a"])})
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to("../secret.safetensors")
        assert f"{name}: links to" in refusal(model)
    for kind, expected in {"fifo": "not a regular", "dir": "not a regular", "loop": "", "dangling": "link to"}.items():
        model = model_dir(tmp_path / kind, {})
        path = model / "model.safetensors"
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "dir":
            path.mkdir()
        else:
            path.symlink_to("model.safetensors" if kind == "loop" else "gone")
        assert expected in refusal(model)
    model = model_dir(tmp_path / "socket", {})
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(model)  # pytest's absolute paths are too long for a socket
        server.bind("model.safetensors")
        assert "not a regular file" in refusal(model)


def test_cache_lookalikes_cannot_reach_outside(tmp_path: Path) -> None:
    """An unpacked archive may bring its own `models--*` tree: neither `blobs` nor `snapshots` may be a way out."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "w").write_bytes(tensor_file(["a"]))
    snapshot = model_dir(tmp_path / "models--a--b/snapshots/c", {})
    (tmp_path / "models--a--b/blobs").symlink_to(outside)
    (snapshot / "model.safetensors").symlink_to("../../blobs/w")
    assert "outside" in refusal(snapshot)
    (snapshot / "model.safetensors").unlink()
    (tmp_path / "models--a--other/blobs").mkdir(parents=True)
    (tmp_path / "models--a--other/blobs/w").write_bytes(tensor_file(["a"]))
    (snapshot / "model.safetensors").symlink_to("../../../models--a--other/blobs/w")
    assert "outside" in refusal(snapshot)


def entry(dtype: str, shape: Any, offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


A = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
BAD_FILES = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "length beyond the file": safetensors({"a": F32_PAIR}, bytes(8), length=1 << 20),
    "length 2**63": safetensors({"a": F32_PAIR}, bytes(8), length=1 << 63),
    "length -1": safetensors({"a": F32_PAIR}, bytes(8), length=(1 << 64) - 1),
    "length into the data": safetensors({"a": F32_PAIR}, bytes(8), length=len(A) + 6),
    "length 0": safetensors(b"", bytes(8)),
    "not JSON": safetensors(b"{nonsense}", bytes(8)),
    "a list": safetensors([], b""),
    "not UTF-8": safetensors(b'{"a\xff":' + A[4:] + b"}", bytes(8)),
    "half a character": safetensors(b'{"a\\ud800":' + A[4:] + b"}", bytes(8)),
    "repeated tensor": safetensors(b"{" + A + b"," + A + b"}", bytes(8)),
    "repeated, escaped": safetensors(b"{" + A + b',"\\u0061":' + A[4:] + b"}", bytes(8)),
    "repeated dtype": safetensors(b"{" + A.replace(b'"F32"', b'"F32","dtype":"F32"') + b"}", bytes(8)),
    "repeated metadata": safetensors(b'{"__metadata__":{"f":"1","f":"2"},' + A + b"}", bytes(8)),
    "metadata of numbers": safetensors({"__metadata__": {"f": 1}, "a": F32_PAIR}, bytes(8)),
    "entry as a list": safetensors({"a": ["F32", [2], [0, 8]]}, bytes(8)),
    "unknown key": safetensors({"a": {**F32_PAIR, "strides": [4]}}, bytes(8)),
    "missing key": safetensors({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "nested": safetensors(b'{"a":' + b"[" * 100_000 + b"}", bytes(8)),
    "unknown dtype": safetensors({"a": entry("F31", [2], [0, 8])}, bytes(8)),
    "dtype in lower case": safetensors({"a": entry("f32", [2], [0, 8])}, bytes(8)),
    "gap": safetensors({"a": entry("F32", [1], [0, 4]), "b": entry("F32", [1], [8, 12])}, bytes(12)),
    "gap at the start": safetensors({"a": entry("F32", [1], [4, 8])}, bytes(8)),
    "overlap": safetensors({"a": entry("F32", [2], [0, 8]), "b": entry("F32", [1], [4, 8])}, bytes(8)),
    "same bytes twice": safetensors({"a": F32_PAIR, "b": F32_PAIR}, bytes(8)),
    "short": safetensors({"a": F32_PAIR}, bytes(4)),
    "left over": safetensors({"a": F32_PAIR}, bytes(12)),
    "negative offset": safetensors({"a": entry("F32", [2], [-8, 0])}, bytes(8)),
    "reversed": safetensors({"a": entry("F32", [2], [8, 0])}, bytes(8)),
    "three offsets": safetensors({"a": entry("F32", [2], [0, 4, 8])}, bytes(8)),
    "offset beyond 64 bits": safetensors({"a": entry("F32", [2], [2**64, 2**64 + 8])}, bytes(8)),
    "negative size": safetensors({"a": entry("F32", [-2], [0, 8])}, bytes(8)),
    "fractional size": safetensors({"a": entry("F32", [2.0], [0, 8])}, bytes(8)),
    "boolean size": safetensors({"a": entry("F32", [2, True], [0, 8])}, bytes(8)),
    "shape is a number": safetensors({"a": entry("F32", 2, [0, 8])}, bytes(8)),
    "product wraps to 0": safetensors({"a": entry("F32", [2**63, 8], [0, 0])}, b""),
    "product wraps to 8": safetensors({"a": entry("U8", [2**32 + 1, 2**32 + 1, 8], [0, 8])}, bytes(8)),
    "size beyond 32 bits": safetensors({"a": entry("F32", [0, 2**31], [0, 0])}, b""),
    "rank 33": safetensors({"a": entry("U8", [1] * 33, [0, 1])}, b"\0"),
    "half a byte": safetensors({"a": entry("F4", [3], [0, 2])}, bytes(2)),
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 8\n",
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_headers_that_lie(tmp_path: Path, case: str) -> None:
    """Our own checks refuse all of them: the safetensors library is asked once, when a file arrives."""
    model_dir(tmp_path, {"model.safetensors": BAD_FILES[case]})
    assert "model.safetensors" in refusal(tmp_path)


def test_a_header_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    model_dir(tmp_path, {})
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 150_000_000))
        file.truncate(200_000_000)  # sparse
    assert "header of 150000000 bytes" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "no model.safetensors"),
        ({"pytorch_model.bin": b"x"}, "pickle"),
        ({"consolidated.00.pth": b"x"}, "pickle"),
        ({"m.gguf": b"GGUF"}, "name that file"),
        ({"model-00001-of-00002.safetensors": b"x"}, "incomplete copy"),
    ],
)
def test_directories_without_weights_to_read(tmp_path: Path, files: dict[str, bytes], expected: str) -> None:
    assert expected in refusal(model_dir(tmp_path / "m", files))


def test_no_directory_no_config(tmp_path: Path) -> None:
    assert "no such directory" in refusal(tmp_path / "gone")
    assert "no such directory" in refusal(tmp_path / ("x" * 5000))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert "is a file; a checkpoint is a directory" in refusal(tmp_path / "m.gguf")
    (tmp_path / "model.safetensors").write_bytes(tensor_file(["a"]))
    assert "no config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"[]", "expected a JSON object, found a list"),
        (b"null", "found null"),
        (b'"x"', "found a string"),
        (b"", "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' appears twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": "\\ud800"}', "unpaired surrogate"),
        (b'{"\\udfff": 1}', "unpaired surrogate"),
        (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "nested deeper"),
        (b'{"a":' * 100_000, "nested deeper"),
        (b'{"a": ' + b"1" * 5000 + b"}", "5000 digits"),
        (b'{"a": "' + b"x" * 1000 + b'"}', "larger than 900 bytes"),
    ],
)
def test_strict_json(tmp_path: Path, text: bytes, expected: str) -> None:
    limit = 900 if b"xxxx" in text else 1 << 20
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError) as caught:
        read_json(tmp_path / "config.json", limit)
    assert expected in str(caught.value) and "config.json" in str(caught.value)


def test_json_is_not_read_from_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    for name in ("config.json", "gone.json"):
        with pytest.raises(CheckpointError, match=name):
            read_json(tmp_path / name)


def test_json_that_is_fine(tmp_path: Path) -> None:
    text = '{"a": [1, -2.5e3, true, null, "\\ud83d\\ude00é"], "b": {"c": {}}, "d": [0.0, Infinity, -Infinity]}'
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    expected = {"a": [1, -2500.0, True, None, "😀é"], "b": {"c": {}}, "d": [0.0, float("inf"), float("-inf")]}
    assert read_json(tmp_path / "x.json", 1000) == expected
    (tmp_path / "deep.json").write_text('{"a": ' + "[" * 63 + "]" * 63 + "}")
    assert list(read_json(tmp_path / "deep.json")) == ["a"]


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [False, True], ids=["mapped", "raw"])
@pytest.mark.parametrize("dtype", sorted(RAW_DTYPES))
def test_every_dtype_reads_its_own_bytes(tmp_path: Path, dtype: str, others: bool) -> None:
    """Both through MLX, and tensor by tensor where the file has another tensor of a dtype that MLX refuses (F64)."""
    size = BITS[dtype] // 8
    data = bytes(range(1, 1 + 6 * size)) if dtype != "BOOL" else bytes([0, 1, 1, 0, 1, 0])
    last = 6 * size
    header = {"a": entry(dtype, [2, 3], [0, last]), "s": entry(dtype, [], [last, last + size])}
    header["z"] = entry(dtype, [0, 5], [last + size, last + size])
    if others:
        header["f64"] = entry("F64", [1], [last + size, last + size + 8])
    model_dir(tmp_path, {"model.safetensors": safetensors(header, data + data[:size] + bytes(8 * others))})
    checkpoint = Checkpoint.open(tmp_path)
    for name, shape, expected in (("a", (2, 3), data), ("s", (), data[:size]), ("z", (0, 5), b"")):
        array = checkpoint.read(name)
        assert array.shape == shape and array.dtype == getattr(mx, RAW_DTYPES[dtype])
        assert (np.array(array.flatten().view(mx.uint8)).tobytes() if expected else b"") == expected
    if others:
        with pytest.raises(CheckpointError, match="'f64' has dtype F64"):
            checkpoint.read("f64")


@pytest.mark.parametrize("dtype", sorted(set(BITS) - set(RAW_DTYPES)))
def test_dtypes_without_an_mlx_form(tmp_path: Path, dtype: str) -> None:
    model_dir(
        tmp_path,
        {"model.safetensors": safetensors({"a": entry(dtype, [8], [0, BITS[dtype]])}, bytes(64)[: BITS[dtype]])},
    )
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.headers["a"].nbytes == BITS[dtype]
    with pytest.raises(CheckpointError, match=f"'a' has dtype {dtype}"):
        checkpoint.read("a")


def test_names_are_data_and_unaligned_offsets_read(tmp_path: Path) -> None:
    names = ["", "a\0b", "..", "é\u202e", "__metadata", "x" * 1000]
    header = {"u": entry("U8", [1], [0, 1])}
    header |= {name: entry("F32", [1], [1 + 4 * i, 5 + 4 * i]) for i, name in enumerate(names)}
    values = np.arange(len(names), dtype=np.float32)
    model_dir(tmp_path, {"model.safetensors": safetensors(header, b"\x07" + values.tobytes())})
    checkpoint = Checkpoint.open(tmp_path)
    assert [checkpoint.read(name).item() for name in names] == values.tolist()


def test_nothing_handed_out_is_kept_and_a_second_read_works(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(model_dir(tmp_path, {"model.safetensors": tensor_file(["a", "b"], 5)}))
    first = checkpoint.read("a")
    assert [list(arrays) for arrays in checkpoint._lazy.values()] == [["b"]]
    again = checkpoint.read("a")
    assert again is not first and mx.array_equal(first, again)
    assert checkpoint.read("b").tolist() == [5] * 4
    assert checkpoint._lazy == {}


def test_one_thread_may_look_into_a_file_that_another_reads(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(model_dir(tmp_path, {"model.safetensors": tensor_file(["a", "b"], 5)}))
    assert checkpoint.read("a").tolist() == [5] * 4  # "b" is loaded with it, and waits
    with ThreadPoolExecutor(1) as other:
        assert other.submit(lambda: checkpoint.read("b").tolist()).result() == [5] * 4
    assert checkpoint.read("b").tolist() == [5] * 4


@pytest.mark.parametrize("dtype", ["U8", "F8_E5M2"], ids=["mapped", "raw"])
def test_a_file_changed_after_its_check_is_refused(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "model.safetensors"
    data = safetensors({"a": entry(dtype, [4], [0, 4])}, bytes(4))
    checkpoint = Checkpoint.open(model_dir(tmp_path, {"model.safetensors": data}))
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        checkpoint.read("a")
    path.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match="changed since"):
        checkpoint.read("a")


MEMORY = """
import sys
from pathlib import Path
import mlx.core as mx
from runner.checkpoint.directory import Checkpoint

def high_water():  # of this process image alone: ru_maxrss would include what the parent had when it forked
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))

checkpoint = Checkpoint.open(Path(sys.argv[1]))
mx.eval(mx.zeros(1))
base, kept = high_water(), []
if sys.argv[2] == "together":
    kept = [checkpoint.read(name) for name in checkpoint.headers]
    mx.eval(kept)
else:
    for name in checkpoint.headers:
        array = checkpoint.read(name)
        mx.eval(array)
        kept.append(array) if sys.argv[2] == "keep" else None
print(high_water() - base, mx.get_peak_memory())
"""


def test_peak_memory(tmp_path: Path) -> None:
    """Reading 200 MB takes at most 1.15 times that, one by one or all at once; freeing each tensor, 0.35 times."""
    count, each = 20, 10_000_000
    header = {f"t{i}": entry("BF16", [1000, 5000], [i * each, (i + 1) * each]) for i in range(count)}
    model_dir(tmp_path, {})
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(safetensors(header))
        for i in range(count):
            file.write(bytes([i]) * each)
    limits = {"keep": 1.15, "together": 1.15, "free": 0.35}
    for mode, limit in limits.items():
        command = [sys.executable, "-c", MEMORY, str(tmp_path), mode]
        out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
        for figure in map(int, out):
            assert figure <= limit * count * each, (mode, out)
        assert mode == "free" or int(out[1]) >= count * each


# --- writing ----------------------------------------------------------------------------------------------------------


def sample() -> dict[str, mx.array]:
    key = mx.random.key(0)
    return {
        "a.weight": mx.random.normal((4, 8), key=key),
        "b": mx.random.normal((3, 3), key=key).astype(mx.bfloat16).T,
        "c.scales": mx.arange(5, dtype=mx.uint32),
        "d.q": mx.arange(6, dtype=mx.uint8).reshape(1, 2, 3),
        "e": mx.array(True),
        "é": mx.zeros((0, 4), dtype=mx.float16),
    }


@pytest.mark.parametrize("max_shard_bytes", [1, 40, 128, 1 << 30])
def test_round_trip(tmp_path: Path, max_shard_bytes: int) -> None:
    config = {"model_type": "t", "n": [1, 2.5, None], "limit": float("inf"), "name": "é😀"}
    extra: dict[str, bytes | str] = {"tokenizer.json": b"\x00\x01", "additional_chat_templates/rag.jinja": "{{ é }}"}
    out = tmp_path / "deep/er/out"
    write_checkpoint(out, iter(sample().items()), config, extra, max_shard_bytes)
    checkpoint = Checkpoint.open(out)
    assert checkpoint.config == config and checkpoint.metadata == {"format": "mlx"}
    assert sorted(checkpoint.headers) == sorted(sample())
    for name, expected in sample().items():
        array = checkpoint.read(name)
        assert array.dtype == expected.dtype and array.shape == expected.shape and mx.array_equal(array, expected)
    assert (out / "tokenizer.json").read_bytes() == b"\x00\x01"
    assert (out / "additional_chat_templates/rag.jinja").read_text(encoding="utf-8") == "{{ é }}"
    assert os.listdir(out.parent) == ["out"]

    write_checkpoint(tmp_path / "again", ((n, checkpoint.read(n)) for n in checkpoint.headers), config, extra, 1 << 30)
    again = Checkpoint.open(tmp_path / "again")
    assert all(mx.array_equal(again.read(name), checkpoint.read(name)) for name in sample())


def test_shards_respect_the_limit_and_the_index_names_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", ((f"t{i}", mx.zeros(8, mx.uint8)) for i in range(5)), {}, {}, 16)
    shards = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [len(read_header(tmp_path / "m" / shard).tensors) for shard in shards] == [2, 2, 1]
    index = read_json(tmp_path / "m/model.safetensors.index.json")
    assert index["metadata"] == {"total_size": 40}
    assert index["weight_map"]["t4"] == shards[2] and sorted(set(index["weight_map"].values())) == shards
    write_checkpoint(tmp_path / "one", [("a", mx.zeros(8))], {})
    assert sorted(os.listdir(tmp_path / "one")) == ["config.json", "model.safetensors"]


def test_the_writer_streams(tmp_path: Path) -> None:
    """When a tensor is asked for, all earlier shards are on disk and their tensors have been released."""
    on_disk: list[int] = []
    alive: list[int] = []

    def tensors() -> Iterator[tuple[str, mx.array]]:
        mx.clear_cache()
        base = mx.get_active_memory()
        for i in range(8):
            on_disk.append(len(list(tmp_path.glob(".m.*.tmp/*.safetensors"))))
            alive.append(mx.get_active_memory() - base)
            yield f"t{i}", mx.full((1 << 20,), i, mx.uint8) + 0

    write_checkpoint(tmp_path / "m", tensors(), {}, {}, 2 << 20)
    assert on_disk == [0, 0, 0, 1, 1, 2, 2, 3]
    assert max(alive) <= 4 << 20


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, mx.array]]:
        yield "a", mx.zeros(4)
        raise KeyError("the caller's own")

    one = [("a", mx.zeros(1))]
    attempts: list[tuple[Any, Any, Any, str]] = [
        (one * 2, {}, {}, "comes twice"),
        ([("__metadata__", mx.zeros(1))], {}, {}, "reserves"),
        ([], {}, {}, "no tensors"),
        (one, {"x": float("nan")}, {}, "NaN"),
        (one, {"x": object()}, {}, "JSON"),
        (one, {"x": "\ud800"}, {}, "config"),
        (one, {}, {"../x": b""}, "'../x'"),
        (one, {}, {"/x": b""}, "'/x'"),
        (one, {}, {"a\\x": b""}, "plain"),
        (one, {}, {"config.json": b""}, "itself"),
        (one, {}, {"model.safetensors": b""}, "itself"),
        (one, {}, {"a": b"", "a/b": b""}, "folder"),
    ]
    for tensors, config, extra, expected in attempts:
        with pytest.raises(CheckpointError) as caught:
            write_checkpoint(tmp_path / "m", tensors, config, extra)
        assert expected in str(caught.value)
    with pytest.raises(KeyError, match="the caller's own"):
        write_checkpoint(tmp_path / "m", broken(), {})
    with pytest.raises(UsageError, match="max_shard_bytes is 0"):
        write_checkpoint(tmp_path / "m", one, {}, {}, 0)
    assert os.listdir(tmp_path) == []


def test_only_an_empty_directory_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_checkpoint(tmp_path / "empty", [("a", mx.zeros(1))], {})
    before = {path.name: path.read_bytes() for path in (tmp_path / "empty").iterdir()}
    (tmp_path / "file").write_text("x")
    for name in ("empty", "file"):
        with pytest.raises(CheckpointError, match="already exists"):
            write_checkpoint(tmp_path / name, iter([("b", mx.ones(1))]), {})
    assert {path.name: path.read_bytes() for path in (tmp_path / "empty").iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["empty", "file"]


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path: Path) -> None:
    stale, other, user = (tmp_path / name for name in (f".m.{'0' * 12}.tmp", f".m-2.{'0' * 12}.tmp", ".m.mine.tmp"))
    for path in (stale, other, user):
        path.mkdir()
        (path / "model.safetensors").write_text("x")
    with new_directory(tmp_path / "m", {}, {}) as first:
        write_checkpoint(tmp_path / "m", [("a", mx.zeros(1))], {})
        assert first.exists() and not stale.exists()
        shutil.rmtree(tmp_path / "m")
    assert sorted(os.listdir(tmp_path)) == sorted([other.name, user.name, "m"])


def test_a_directory_filled_meanwhile_is_left_alone(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, mx.array]]:
        yield "a", mx.zeros(1)
        (tmp_path / "m").mkdir()
        (tmp_path / "m/theirs").write_text("x")

    with pytest.raises(CheckpointError, match="cannot be put in place"):
        write_checkpoint(tmp_path / "m", tensors(), {})
    assert os.listdir(tmp_path) == ["m"] and os.listdir(tmp_path / "m") == ["theirs"]
