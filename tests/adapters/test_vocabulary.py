"""Adapters of a base whose vocabulary was resized: which rows, which tokenizer, and what is refused.

`test_adapters.py` compares the fixtures `llama-grown*` and `llama-cut` with PEFT.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf_writer
import mlx.core as mx
import pytest
from places import TESTS

import runner
from runner.adapters import AdapterFiles, fit
from runner.checkpoint.directory import Checkpoint
from runner.checkpoint.model_files import open_files
from runner.convert.convert import convert, merged
from runner.engine.loaded import open_loaded
from runner.errors import CheckpointError, UsageError, WeightsError
from runner.families import find
from runner.text.tokenizer import Tokenizer

FIXTURES = TESTS / "fixtures" / "adapters"
GROWN, TIED, CUT = FIXTURES / "llama-grown", FIXTURES / "llama-grown-tied", FIXTURES / "llama-cut"
EMBED, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"


def base(case: Path) -> Path:
    return TESTS / str(json.loads((case / "expected.json").read_text())["base"])


def damaged(tmp_path: Path, case: Path, damage: Any = None, **config: Any) -> Path:
    path = tmp_path / "adapter"
    shutil.copytree(case / "adapter", path)
    raw = json.loads((path / "adapter_config.json").read_text()) | config
    (path / "adapter_config.json").write_text(json.dumps(raw))
    if damage is not None:
        arrays = dict(mx.load(str(path / "adapter_model.safetensors")))
        damage(arrays)
        mx.save_safetensors(str(path / "adapter_model.safetensors"), arrays)
    return path


def with_tokens(path: Path, case: Path, *tokens: str, template: str | None = None) -> Path:
    """Put the base's tokenizer beside the adapter at `path`, with tokens added as `save_pretrained` writes them.

    The base's rows beyond its tokens are filled first: the added ones are for the rows after them.
    """
    raw = json.loads((base(case) / "tokenizer.json").read_text())
    size = len(raw["model"]["vocab"])
    size = max(size, *(item["id"] + 1 for item in raw["added_tokens"]))
    rows = json.loads((base(case) / "config.json").read_text())["vocab_size"]
    fill = [f"<fill{index}>" for index in range(size, rows)] if tokens else []
    for index, text in enumerate([*fill, *tokens]):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        raw["added_tokens"].append({"id": size + index, "content": text, **flags, "special": True})
    (path / "tokenizer.json").write_text(json.dumps(raw))
    config = json.loads((base(case) / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (path / "tokenizer_config.json").write_text(
        json.dumps(config if template is None else config | {"chat_template": template})
    )
    return path


# --- rows -------------------------------------------------------------------------------------------------------------


def test_the_config_and_the_logits_have_the_new_length() -> None:
    for case, rows in ((GROWN, 132), (TIED, 131), (CUT, 120)):
        engine = open_loaded(base(case), adapters=[AdapterFiles.open(case / "adapter", "a")])
        assert engine.config.vocab_size == rows and engine.logits([1, 2]).shape == (2, rows)
        assert engine.checked([rows - 1]) == [rows - 1]
        with pytest.raises(UsageError):
            engine.checked([rows])


def test_one_table_stays_one() -> None:
    """PEFT saves a tied model's table under both names; in memory there is one."""
    engine = open_loaded(base(TIED), adapters=[AdapterFiles.open(TIED / "adapter", "a")])
    assert engine.adapters is not None and engine.adapters.base.tied == "model.embed_tokens"
    assert engine.adapters.base.raw.get("tie_word_embeddings") is True


def test_on_a_gguf_file(tmp_path: Path) -> None:
    raw = json.loads((base(GROWN) / "config.json").read_text())
    path = gguf_writer.write_model(
        tmp_path / "m.gguf", raw, gguf_writer.weights_of(base(GROWN)), lambda name: gguf_writer.Type.F32
    )
    adapter = AdapterFiles.open(GROWN / "adapter", "a")
    found = open_loaded(path, dtype="float32", adapters=[adapter]).logits([1, 131, 5, 130])
    wanted = open_loaded(base(GROWN), dtype="float32", adapters=[adapter]).logits([1, 131, 5, 130])
    assert mx.max(mx.abs(found - wanted)) / mx.std(wanted) < 2e-4


def test_an_adapter_that_is_off_does_not_resize() -> None:
    off = AdapterFiles.open(GROWN / "adapter", "off", 0.0)
    engine = open_loaded(base(GROWN), adapters=[off])
    assert engine.config.vocab_size == 128
    assert mx.array_equal(engine.logits([1, 2]), open_loaded(base(GROWN)).logits([1, 2]))
    assert engine.adapters is not None
    with pytest.raises(UsageError, match="whole tensors"):
        engine.adapters.set_weights({"off": 1})


def test_a_second_adapter_fits_the_grown_model(tmp_path: Path) -> None:
    """One of the layers alone does not ask for a length."""
    plain = tmp_path / "plain"
    shutil.copytree(GROWN / "adapter", plain)
    arrays = {
        name: array for name, array in mx.load(str(plain / "adapter_model.safetensors")).items() if "lora" in name
    }
    mx.save_safetensors(str(plain / "adapter_model.safetensors"), arrays)
    both = [AdapterFiles.open(plain, "plain", 0.5), AdapterFiles.open(GROWN / "adapter", "grown")]
    assert open_loaded(base(GROWN), adapters=both).logits([1, 131]).shape == (2, 132)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda arrays: arrays.pop(HEAD),
         r"wrong shape: .*embed_tokens.weight: expected \[128, 32\], found \[132, 32\]; .* lacks lm_head.weight"),
        (lambda arrays: arrays.pop(EMBED), r"found \[132, 32\]; for .* 132 tokens .* lacks model.embed_tokens"),
        (lambda arrays: arrays.update({HEAD: arrays[HEAD][:130]}), "one vocabulary, but .* 13. rows, .* 13. rows"),
        (lambda arrays: arrays.update({HEAD: arrays[HEAD][:, :31]}), r"lacks lm_head.weight"),
    ],
)  # fmt: skip
def test_a_vocabulary_in_part_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    path = damaged(tmp_path, GROWN, damage)
    with pytest.raises(WeightsError, match=message) as caught:
        open_loaded(base(GROWN), adapters=[AdapterFiles.open(path, "a")])
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) <= 2


def test_factors_for_other_rows_than_the_tables_are_refused(tmp_path: Path) -> None:
    case = FIXTURES / "llama-grown-embeddings"

    def damage(arrays: dict[str, mx.array]) -> None:
        name = next(name for name in arrays if "embedding_A" in name)
        arrays[name] = arrays[name][:, :128]

    path = damaged(tmp_path, case, damage)
    with pytest.raises(WeightsError, match=r"wrong shape: .*lora_embedding_A: expected \[4, 132\], found \[4, 128\]"):
        open_loaded(base(case), adapters=[AdapterFiles.open(path, "a")])


def test_two_vocabularies_at_once_are_refused() -> None:
    first = AdapterFiles.open(GROWN / "adapter", "first")
    second = AdapterFiles("second", 1.0, *_parts(AdapterFiles.open(CUT / "adapter", "x")))
    with pytest.raises(WeightsError, match=r"wrong shape: .*expected \[132, 32\], found \[120, 32\]"):
        open_loaded(base(GROWN), adapters=[first, second])


def _parts(item: AdapterFiles) -> tuple[Any, Checkpoint]:
    return item.config, item.source


# --- the tokenizer ----------------------------------------------------------------------------------------------------


NEW = ("<new0>", "<new1>", "<new2>", "<new3>")


def test_the_tokenizer_beside_the_adapter_is_used_where_it_has_added_tokens(tmp_path: Path) -> None:
    path = with_tokens(damaged(tmp_path, GROWN), GROWN, *NEW)
    lm = runner.load(base(GROWN), adapters=[str(path)])
    plain = Tokenizer.from_directory(base(GROWN))
    assert plain.vocab_size < 128 and lm.tokenizer.vocab_size == 132
    assert lm.tokenizer.encode("<new3>", parse_special=True)[-1] == 131
    # Without a chat template beside the adapter, the base's stays.
    assert lm.tokenizer.chat_templates == plain.chat_templates
    assert lm.tokenizer.template_sources == plain.template_sources
    assert runner.load(base(GROWN), adapters={str(path): 0}).tokenizer.vocab_size == plain.vocab_size


def test_its_chat_template_comes_with_it(tmp_path: Path) -> None:
    path = with_tokens(damaged(tmp_path, GROWN), GROWN, *NEW, template="{{ messages[0].content }}<new0>")
    lm = runner.load(base(GROWN), adapters=[str(path)])
    text = lm.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert text == "a<new0>"


@pytest.mark.parametrize("tokens", [(), (*NEW, "<one too many>")])
def test_a_tokenizer_without_added_tokens_or_with_too_many_is_not_used(tmp_path: Path, tokens: tuple[str, ...]) -> None:
    path = with_tokens(damaged(tmp_path, GROWN), GROWN, *tokens)
    plain = Tokenizer.from_directory(base(GROWN))
    assert runner.load(base(GROWN), adapters=[str(path)]).tokenizer.vocab_size == plain.vocab_size


def test_an_adapter_of_the_layers_alone_keeps_the_tokenizer(tmp_path: Path) -> None:
    path = with_tokens(damaged(tmp_path, FIXTURES / "llama-qv"), FIXTURES / "llama-qv", *NEW)
    lm = runner.load(base(FIXTURES / "llama-qv"), adapters=[str(path)])
    assert lm.tokenizer.vocab_size == Tokenizer.from_directory(base(FIXTURES / "llama-qv")).vocab_size


def test_convert_writes_rows_config_and_tokenizer(tmp_path: Path) -> None:
    path = with_tokens(damaged(tmp_path, GROWN), GROWN, *NEW)
    files = merged(open_files(base(GROWN)), [AdapterFiles.open(path, "a")])
    convert(files, tmp_path / "out")
    lm = runner.load(tmp_path / "out", dtype="float32")
    assert lm.config.vocab_size == 132 == lm.tokenizer.vocab_size
    assert lm.tokenizer.template_sources == Tokenizer.from_directory(base(GROWN)).template_sources
    with_adapter = runner.load(base(GROWN), dtype="float32", adapters=[str(path)])
    ids = lm.tokenizer.encode("<new3>ab<new0>", parse_special=True)
    wanted = with_adapter.logits(ids)
    assert ids == with_adapter.tokenizer.encode("<new3>ab<new0>", parse_special=True)
    assert mx.max(mx.abs(lm.logits(ids) - wanted)) / mx.std(wanted) < 0.1  # rounded to the base's bfloat16


def test_quantized_tables_are_replaced_whole() -> None:
    case = FIXTURES / "llama-mlx-4bit-grown"
    files = open_files(base(case))
    found = fit(files.config, find(files.config), files.source, [AdapterFiles.open(case / "adapter", "a")]).base.source
    assert found.headers["model.embed_tokens.weight"].shape == (130, 64)
    assert not {"model.embed_tokens.scales", "lm_head.scales"} & found.headers.keys()
    assert "model.layers.0.self_attn.q_proj.scales" in found.headers


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_no_file_beside_an_adapter_is_read_through_a_link_out(tmp_path: Path, name: str) -> None:
    path = with_tokens(damaged(tmp_path, GROWN), GROWN, *NEW)
    shutil.move(path / name, tmp_path / "outside")
    (path / name).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match=rf"{name}: links to .*outside, outside the model's directory"):
        runner.load(base(GROWN), adapters=[str(path)])
