"""GGUF files through the public entry points (load, inspect, convert): results, shards, refusals, and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gguf
import gguf_writer as writer
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_bytes import header, vocabulary
from gguf_cases import config_of, config_of_llama, write
from places import ROOT, TESTS

import runner
from runner.checkpoint.gguf import GGUF
from runner.checkpoint.gguf.architecture import Reader
from runner.checkpoint.gguf.architectures import ARCHITECTURES
from runner.checkpoint.gguf.container import open_container
from runner.checkpoint.gguf.gemmas import rotations
from runner.checkpoint.model_files import open_files
from runner.convert.convert import convert
from runner.engine.loaded import open_loaded
from runner.errors import CheckpointError, ConfigError, RunnerWarning, UsageError
from runner.families import FAMILIES, find
from runner.inspect_model import inspect
from runner.weights.loading import nbytes


def small(tmp_path: Path, **metadata: Any) -> Path:
    path = TESTS / "fixtures/llama/llama-mha"
    config, weights = config_of(path), writer.weights_of(path)
    parts = {**writer.metadata_of(config), **vocabulary(config["vocab_size"]), **metadata}
    return write(tmp_path / "small.gguf", writer.tensors_of(config, weights, lambda name: Type.Q8_0), **parts)


def test_load_inspect_and_convert_take_the_file(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    path = small(tmp_path, **{"tokenizer.chat_template": template, "tokenizer.chat_template.tool_use": "t",
                              "general.sampling.temp": 0.5})  # fmt: skip
    lm = runner.load(path)
    assert lm.tokenizer.kind == "gguf gpt2" and lm.tokenizer.chat_templates == ("default", "tool_use")
    assert lm.sampling.temperature == 0.5
    report = inspect(path)
    assert report.path == path and report.model_type == "llama"
    if lm.engine.device.activations is not None:  # elsewhere norms are cast
        assert report.nbytes == nbytes(lm.model)
    assert 8.9 < report.bits_per_weight < 9.6  # 8 bits and two float16 for 32 numbers, and a few norms
    convert(open_files(path), tmp_path / "out")
    again = runner.load(tmp_path / "out")
    prompt = [5, 6, 7]
    assert mx.array_equal(again.logits(prompt), lm.logits(prompt))
    assert (again.eos_token_ids, again.sampling, again.tokenizer.chat_templates) == (
        lm.eos_token_ids,
        lm.sampling,
        lm.tokenizer.chat_templates,
    )
    assert again.tokenizer.encode("ab c") == lm.tokenizer.encode("ab c")
    with pytest.raises(UsageError, match="is a file"):
        runner.load(path, revision="main")


def test_a_guessed_pre_tokenizer_is_a_note_at_every_front_door(tmp_path: Path) -> None:
    """Files from before May 2024 name none; refusing them was too strict, silence would be too lax."""
    path = small(tmp_path, **{"tokenizer.ggml.pre": "default"})
    with pytest.warns(RunnerWarning, match="names the pre-tokenizer 'default'.*llama.cpp's default") as caught:
        lm = runner.load(path)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert lm.notes == inspect(path).notes == open_files(path).notes == (str(caught[0].message),)
    for command in (["inspect", str(path)], ["convert", str(path), str(tmp_path / "out")],
                    ["generate", str(path), "a", "--raw", "--max-tokens", "1"]):  # fmt: skip
        done = subprocess.run([sys.executable, "-m", "runner", *command], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stderr.count(f"{lm.notes[0]}\n")) == (0, 1), done.stderr
    # What was guessed is written out as it was read: the copy names its own words, and there is nothing left to say.
    again = runner.load(tmp_path / "out")
    assert again.notes == () and again.tokenizer.encode("a1b22 c!") == lm.tokenizer.encode("a1b22 c!")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "rwkv6"}, "'rwkv6' is not supported.*llama, .*qwen2"),
        ({"general.type": "adapter"}, "adapter"),
        ({"llama.expert_count": 8}, "ffn_up.weight' is not part of a mixtral model"),
        ({"llama.expert_shared_count": 1}, r"expert_shared_count' = 1"),
        ({"llama.attention.temperature_scale": 0.5}, "temperature_scale"),
        ({"llama.attention.causal": False}, "causal"),
        ({"llama.rope.scaling.type": "su"}, "'su'"),
        ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor = 1.5"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor"),
        ({"llama.attention.value_length": 4}, "different sizes"),
        ({"llama.block_count": "two"}, "block_count is 'two'"),
        ({"llama.attention.head_count_kv": [4, 2]}, "differs from layer to layer"),
        ({"llama.attention.head_count": 3}, "divide into heads"),
        ({"llama.attention.head_count": 0}, "head_count is 0, expected an integer"),
        ({"general.alignment": 12}, "alignment is 12"),
        ({"split.count": 2}, "must end in -00001-of-00002.gguf"),
        ({"split.count": 2, "split.no": 1}, "name the first one"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        GGUF.open(small(tmp_path, **metadata))


@pytest.mark.parametrize(
    ("fixture", "key"),
    [
        ("llama/llama-mha", "llama.rope.freq_base"),
        ("families/gemma3_text-base", "gemma3.rope.freq_base"),
        ("families/gemma3_text-base", "gemma3.rope.freq_base_swa"),
    ],
)
def test_a_base_of_zero_is_none_that_is_missing(fixture: str, key: str, tmp_path: Path) -> None:
    """llama.cpp computes with it; a missing one is 10000 for it as well."""
    path = TESTS / "fixtures" / fixture
    config = config_of(path)
    metadata = {**writer.metadata_of(config), **vocabulary(config["vocab_size"]), key: 0.0}
    file = write(tmp_path / "m.gguf", writer.tensors_of(config, writer.weights_of(path)), **metadata)
    with pytest.raises(ConfigError, match=r"(rope_theta|rope_local_base_freq).* must be above 1"):
        raw = GGUF.open(file).config
        find(raw)[0].from_dict(raw)


def test_so_is_one_of_gemma_4() -> None:
    values = {"rope.freq_base": 0.0, "rope.freq_base_swa": 1e4}
    reader = SimpleNamespace(tensors={}, first=lambda key, default: values.get(key, default))
    assert rotations(cast(Reader, reader))["full_attention"]["rope_theta"] == 0  # its config refuses that


@pytest.mark.parametrize("name", ["bos", "eos", "padding"])
def test_named_tokens_without_rows_are_refused(name: str, tmp_path: Path) -> None:
    """The first prompt was refused with its user's "token ids must be from 0 to ...", which they had not given."""
    rows = config_of(TESTS / "fixtures/llama/llama-mha")["vocab_size"]
    named = {f"tokenizer.ggml.{each}_token_id": 3 for each in ("bos", "eos", "padding")}
    longer = {**vocabulary(rows + 8), **named}
    GGUF.open(small(tmp_path, **longer))  # those without a name may be more than the rows
    with pytest.raises(CheckpointError, match=rf"the \w+ token is '.*', number {rows + 7}, but .* has {rows} rows"):
        GGUF.open(small(tmp_path, **{**longer, f"tokenizer.ggml.{name}_token_id": rows + 7}))


def test_foreign_tensors_and_types_are_refused_by_name(tmp_path: Path) -> None:
    config = config_of_llama(hidden=8, layers=1)
    keys = {**writer.metadata_of(config), **vocabulary(300)}
    table = {"token_embd.weight": (np.zeros((300, 8), np.float32), Type.F32)}
    odd = {**table, "blk.0.attn_sinks.weight": (np.zeros(4, np.float32), Type.F32)}
    with pytest.raises(CheckpointError, match=r"'blk.0.attn_sinks.weight' is not part of a llama"):
        GGUF.open(write(tmp_path / "m.gguf", odd, **keys))
    for number, name in ((26, "I32"), (31, "Q4_0_4_4"), (99, "99")):
        data = header(keys, {"token_embd.weight": ((300, 256), number, 0)}) + bytes(300 * 256 * 4)
        (tmp_path / "n.gguf").write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"has type {name}, which is not supported; supported .* F32.*Q2_0"):
            GGUF.open(tmp_path / "n.gguf")


def test_shards_are_one_model(tmp_path: Path) -> None:
    whole = open_container(small(tmp_path))
    names = sorted(whole.tensors)
    path = TESTS / "fixtures/llama/llama-mha"
    tensors = writer.tensors_of(config_of(path), writer.weights_of(path), lambda name: Type.Q8_0)
    for number in range(3):
        keys: dict[str, Any] = {"split.no": number, "split.count": 3, "split.tensors.count": len(names)}
        if number == 0:
            keys |= {**writer.metadata_of(config_of(path)), **vocabulary(config_of(path)["vocab_size"])}
        mine = {name: tensors[name] for name in names[number::3]}
        write(tmp_path / f"m-0000{number + 1}-of-00003.gguf", mine, **keys)
    first = tmp_path / "m-00001-of-00003.gguf"
    assert mx.array_equal(open_loaded(first).logits([1, 2]), open_loaded(tmp_path / "small.gguf").logits([1, 2]))
    with pytest.raises(CheckpointError, match="name the first one"):
        GGUF.open(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "m-00003-of-00003.gguf").write_bytes((tmp_path / "m-00002-of-00003.gguf").read_bytes())
    with pytest.raises(CheckpointError, match="does not say that it is shard 3"):
        GGUF.open(first)
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003\.gguf: no such file"):
        GGUF.open(first)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = small(tmp_path)
    found = GGUF.open(path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        found.read("model.norm.weight")
    with pytest.raises(CheckpointError, match="no tensor 'x'"):
        found.read("x")


@pytest.mark.parametrize("kind", [Type.F32, Type.Q4_0, Type.IQ1_S], ids=lambda kind: kind.name)
def test_chunks_are_bounded_in_bytes_and_in_numbers(tmp_path: Path, kind: Type) -> None:
    """IQ1_S has five numbers to a byte: chunks of 4 MiB of it would become 40 MB of float16."""
    count, size = gguf.GGML_QUANT_SIZES[kind]
    rows = np.arange(2100, dtype=np.uint8).repeat(4096 // count * size).reshape(2100, -1)
    raw = rows if kind != Type.F32 else rows.view(np.float32)
    path = write(tmp_path / "m.gguf", {"token_embd.weight": (raw, kind)}, **writer.metadata_of(config_of_llama(4096)))
    found = open_container(path)
    starts, chunks = zip(*found.rows(found.tensors["token_embd.weight"], multiple=4), strict=True)
    assert list(starts) == [0, *np.cumsum([len(chunk) for chunk in chunks])[:-1]]
    assert len(chunks) > 2 and all(len(chunk) % 4 == 0 for chunk in chunks)
    assert max(chunk.size for chunk in chunks) <= 4 << 20 and max(map(len, chunks)) * 4096 <= 4 << 20
    assert np.array_equal(np.concatenate(chunks), rows)
    spans = [(4, 12), (2000, 2100)]
    parts = [chunk for _, chunk in found.rows(found.tensors["token_embd.weight"], 4, spans)]
    assert np.array_equal(np.concatenate(parts), np.concatenate([rows[first:last] for first, last in spans]))


LOADER = """
import json, resource, sys
from pathlib import Path
import mlx.core as mx
from runner.engine.loaded import open_loaded
from runner.weights import loading
open_loaded(Path(sys.argv[1])).logits([1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model = open_loaded(Path(sys.argv[2]))
print(json.dumps([before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, loading.nbytes(model.model)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_K], ids=lambda kind: kind.name)
def test_loading_holds_little_more_than_the_model(tmp_path: Path, kind: Type) -> None:
    config = {**config_of_llama(hidden=1024, layers=16, vocab=8000), "intermediate_size": 4096}
    count, size = gguf.GGML_QUANT_SIZES[kind]
    shapes = {"attn_q": (1024, 1024), "attn_k": (512, 1024), "attn_v": (512, 1024), "attn_output": (1024, 1024),
              "ffn_gate": (4096, 1024), "ffn_up": (4096, 1024), "ffn_down": (1024, 4096)}  # fmt: skip
    tensors: dict[str, Any] = {"output_norm.weight": (np.ones(1024, np.float32), Type.F32)}
    for name in ("token_embd", "output"):
        tensors[f"{name}.weight"] = (np.zeros((8000, 1024 // count * size), np.uint8), kind)
    for layer in range(16):
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = (np.ones(1024, np.float32), Type.F32)
        for name, (rows, columns) in shapes.items():
            tensors[f"blk.{layer}.{name}.weight"] = (np.zeros((rows, columns // count * size), np.uint8), kind)
    path = write(tmp_path / "large.gguf", tensors, **writer.metadata_of(config), **vocabulary(8000))
    command = [sys.executable, "-c", LOADER, str(small(tmp_path)), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, cwd=ROOT)
    before, after, held = json.loads(done.stdout)
    assert held > 150e6
    assert after - before < 1.15 * held


def test_the_page_has_every_architecture_and_family() -> None:
    """docs/formats.md says of each family under which name llama.cpp writes it, and whether that is read."""
    page = (ROOT / "docs" / "formats.md").read_text().split("## GGUF architectures")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    read = {name for name, _, said in rows if said == "yes"}
    assert read == set(ARCHITECTURES) and {said for *_, said in rows} == {"yes", "no"}
    types = {name: set(listed.split(", ")) for name, listed, _ in rows}
    for name, table in ARCHITECTURES.items():
        others = [table.with_experts.model_type] if table.with_experts else []
        others += [table.windowed[0]] if table.windowed else []
        assert {table.model_type, *others} <= types[name], name
    converted_not = page.split("llama.cpp converts none of ")[1].split(".")[0].replace("\n", " ").split(", ")
    converted = {each for row in types.values() for each in row}
    assert not converted & set(converted_not)
    listed = {*converted, *converted_not}
    missing = {name for name in FAMILIES if name not in listed}
    assert not missing, f"docs/formats.md, GGUF architectures: {missing} are in no row, nor among what none is of"
