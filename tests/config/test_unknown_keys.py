"""Keys that no family's config reads: refused where transformers reads them, ignored with a note where nothing does."""

from __future__ import annotations

import json
from typing import Any

import pytest
from places import TESTS

from runner import resources
from runner.adapters.config import AdapterConfig
from runner.checkpoint.quantized.options import Options
from runner.config.harmless_keys import HARMLESS
from runner.errors import ConfigError
from runner.families import FAMILIES, find

FIXTURES = sorted(path.parent for path in TESTS.glob("fixtures/*/*/config.json"))
SOME = ["llama-gqa-hub", "qwen2-base", "gemma2-base", "gpt2-base", "deepseek_v3-base"]
TABLE: dict[str, list[str]] = resources.read("keys", "transformers")["keys"]

REMARKS: dict[str, Any] = {
    "use_flash_attention_2": True,
    "_flash_attn_2_enabled": True,
    "neftune_noise_alpha": 5.0,
    "max_sequence_length": 4096,
    "trl_version": "0.9",
    "axolotl": {"adapter": "qlora"},
    "use_third_norm": True,
}
"""What trainers and other programs leave in a config.json: no class of transformers knows one of these."""


def config(name: str) -> dict[str, Any]:
    (path,) = (path for path in FIXTURES if path.name == name)
    result: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return result


def read(raw: dict[str, Any]) -> Any:
    return find(raw)[0].from_dict(raw)


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        read(raw)
    return str(caught.value)


# --- keys that nothing reads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_an_unknown_key_is_ignored_with_a_note_in_every_family(name: str) -> None:
    plain, remarked = read(config(name)), read({**config(name), **REMARKS})
    assert remarked == plain and plain.notes == ()
    (note,) = remarked.notes  # one sentence, however many keys
    assert all(repr(key) in note for key in REMARKS) and note.endswith("ignored")
    for nothing in (None, False):
        assert read({**config(name), "use_third_norm": nothing}).notes == ()


def test_what_is_said_of_unknown_keys_does_not_grow_with_the_file() -> None:
    """20,000 keys made a line of 818 kB, one name of 3 MB one as long; 700,000 keys took 35 seconds to be compared."""
    many = {f"remark_of_a_trainer_{index}": index for index in range(900)}
    (note,) = read({**config("llama-gqa"), **many, "k" * 3_000_000: 1}).notes
    assert "'remark_of_a_trainer_0' = 0" in note and note.endswith(", 871 more: ignored") and len(note) < 2000
    (note,) = read({**config("llama-gqa"), "k" * 3_000_000: 1}).notes
    assert len(note) < 300
    more = {f"remark_of_a_trainer_{index}": index for index in range(1001)}
    message = refusal({**config("llama-gqa"), **more})
    assert "1001 keys are not understood" in message and "'remark_of_a_trainer_0'" in message and len(message) < 300
    rope = {"rope_type": "linear", "factor": 2.0}
    (note,) = read({**config("llama-gqa"), "rope_parameters": {**rope, "rope_theta": 1e4, **many}}).notes
    assert note.endswith(", 870 more: ignored") and len(note) < 3000
    message = refusal({**config("llama-gqa"), "rope_parameters": {**rope, "rope_theta": 1e4, **more}})
    assert "rope_parameters has 1001 keys that are not understood" in message and len(message) < 300


def test_what_is_said_of_other_unknown_keys_is_as_short() -> None:
    many = {f"option_{index}": index + 1 for index in range(5000)}
    with pytest.raises(ConfigError, match="4970 more") as caught:
        AdapterConfig.from_dict({"peft_type": "LORA", **many})
    assert len(str(caught.value)) < 5000
    options = Options({**many, "k" * 1_000_000: 1}, "quantization_config")
    with pytest.raises(ConfigError, match="4971 more") as caught:
        options.finish()
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_published_forms_have_no_notes(path: Any) -> None:
    """The fixtures are spelled as the hub and as transformers write them: a note for one would be noise for all."""
    assert read(json.loads((path / "config.json").read_text(encoding="utf-8"))).notes == ()


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("scaling", "extra"),
    [
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, {"attn_factor": 1.0}),
        ({"rope_type": "linear", "factor": 2.0}, {"finetuned": True, "low_freq_factor": 1.0}),
        ({"rope_type": "dynamic", "factor": 2.0}, {"max_position_embeddings": 64}),
        ({"rope_type": "default"}, {"mrope_section": [1, 1, 2], "factor": 8.0}),
    ],
)
def test_rope_keys_that_its_type_does_not_read_are_ignored(
    place: str, scaling: dict[str, Any], extra: dict[str, Any]
) -> None:
    raw = {name: value for name, value in config("llama-gqa-hub").items() if not name.startswith("rope_")}
    found = read({**raw, place: {**scaling, **extra}})
    assert found == read({**raw, place: scaling})
    (note,) = found.notes
    assert all(f"{name!r} in {place}" in note for name in extra)


def test_rope_keys_of_single_layer_types_are_ignored_too() -> None:
    raw = {name: value for name, value in config("gemma3_text-base").items() if not name.startswith("rope_")}
    plain = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    remarked = {name: {**value, "attn_factor": 1.0} for name, value in plain.items()}
    found = read({**raw, "rope_parameters": remarked})
    assert found == read({**raw, "rope_parameters": plain})
    assert "'attn_factor' in rope_parameters of sliding_attention" in found.notes[0]


# --- keys that transformers reads -------------------------------------------------------------------------------------


def test_every_key_that_transformers_reads_is_read_refused_or_harmless() -> None:
    """The table is the principle: no key in it may pass with a note, in any family."""
    fixtures = {json.loads((path / "config.json").read_text())["model_type"]: path for path in FIXTURES}
    assert TABLE.keys() - {"*"} == FAMILIES.keys() == fixtures.keys()
    for model_type, path in fixtures.items():
        raw = json.loads((path / "config.json").read_text())
        for name in (*TABLE["*"], *TABLE[model_type]):
            if name in raw or name in HARMLESS:
                continue
            try:
                assert read({**raw, name: "a value that nothing means"}).notes == (), (model_type, name)
            except ConfigError as error:
                assert name in str(error), (model_type, name)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama-gqa-hub", {"sliding_window": 8}),
        ("llama-gqa-hub", {"attention_chunk_size": 8}),
        ("llama-gqa-hub", {"is_causal": 0}),
        ("llama-gqa-hub", {"partial_rotary_factor": 0.5}),
        ("llama-gqa-hub", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("qwen3-base", {"per_layer_config": {"0": {"intermediate_size": 8}}}),
        ("gemma2-base", {"use_bidirectional_attention": True}),
        ("llama-gqa-hub", {"model_file": "model.py"}),
        ("llama-gqa-hub", {"compression_config": {"format": "dense"}}),
    ],
)
def test_a_key_that_changes_numbers_is_refused_by_name(family: str, changes: dict[str, Any]) -> None:
    assert repr(next(iter(changes))) in refusal({**config(family), **changes})


def test_values_that_say_what_the_family_does_anyway_pass_in_silence() -> None:
    raw = config("llama-gqa-hub")
    layers = ["full_attention"] * raw["num_hidden_layers"]
    assert read({**raw, "partial_rotary_factor": 1.0, "is_causal": True, "layer_types": layers}) == read(raw)


@pytest.mark.parametrize(
    ("family", "key", "also"),
    [
        ("mixtral-base", "num_local_experts", "num_experts"),
        ("gpt_oss-base", "num_local_experts", "num_experts"),
        ("olmoe-base", "num_experts", "num_local_experts"),
        ("deepseek_v2-lite", "n_routed_experts", "num_experts"),
        ("deepseek_v3-base", "n_routed_experts", "num_local_experts"),
    ],
)
def test_the_other_name_of_a_key_is_read(family: str, key: str, also: str) -> None:
    """transformers' `attribute_map` of these families has both."""
    raw = config(family)
    assert read({also if name == key else name: value for name, value in raw.items()}) == read(raw)
    assert "disagree" in refusal({**raw, also: raw[key] + 4})


def test_an_original_length_beside_rope_scaling_takes_effect() -> None:
    """As in transformers, for the three types that start from it; for others it says nothing."""
    raw = {**config("llama-gqa-hub"), "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    found = read({**raw, "original_max_position_embeddings": 16})
    assert found.rope_scaling.original_max_position_embeddings == 16
    raw["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}
    assert read({**raw, "original_max_position_embeddings": 16}) == read(raw)
    raw["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert "twice: 16, and 32" in refusal({**raw, "original_max_position_embeddings": 16})


def test_a_base_within_rope_scaling_takes_effect() -> None:
    raw = {name: value for name, value in config("llama-gqa-hub").items() if name != "rope_theta"}
    scaling = {"rope_type": "linear", "factor": 2.0}
    assert read({**raw, "rope_scaling": {**scaling, "rope_theta": 500.0}}).rope_theta == 500.0
    assert "rope_theta twice" in refusal({**raw, "rope_theta": 7.0, "rope_scaling": {**scaling, "rope_theta": 500.0}})


# --- misspelt keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("rope_thetaa", "rope_theta"),
        ("rope_theat", "rope_theta"),
        ("num_key_value_head", "num_key_value_heads"),
        ("Rms_Norm_Eps", "rms_norm_eps"),
        ("tie-word-embeddings", "tie_word_embeddings"),
    ],
)
def test_a_misspelt_key_is_refused_where_the_right_one_is_missing(wrong: str, right: str) -> None:
    """Its author meant it; the default would be used instead. Beside the right key it changes nothing."""
    raw = config("llama-gqa-hub")
    value = raw.pop(right)
    message = refusal({**raw, wrong: value or 1})
    assert f"{wrong!r}" in message and f"did you mean {right!r}?" in message
    assert f"did you mean {right!r}?" in read({**raw, right: value, wrong: value or 1}).notes[0]


def test_a_misspelt_rope_key_is_refused() -> None:
    raw = {**config("llama-gqa-hub"), "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fst": 16.0}}
    assert "rope_scaling has 'beta_fst': did you mean 'beta_fast'?" in refusal(raw)


def test_a_proper_key_of_another_family_is_no_misspelling() -> None:
    assert "nothing reads 'v_head_dim' = 16: ignored" in read({**without_head_dim(), "v_head_dim": 16}).notes[0]


def without_head_dim() -> dict[str, Any]:
    return {name: value for name, value in config("llama-gqa-hub").items() if name != "head_dim"}
