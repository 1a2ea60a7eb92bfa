"""Refused configs and their messages, that no config runs code, and families from other packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from places import ROOT, TESTS

from runner.engine.loaded import open_loaded
from runner.errors import ConfigError
from runner.families import FAMILIES, find

LLAMA = TESTS / "fixtures" / "llama" / "llama-gqa-hub"


def config(family: str) -> dict[str, Any]:
    """The parsed `config.json` of a fixture."""
    folder = "llama" if family.startswith(("llama-", "mistral-")) else "families"
    result: dict[str, Any] = json.loads((TESTS / "fixtures" / folder / family / "config.json").read_text())
    return result


def read(raw: dict[str, Any]) -> Any:
    return find(raw)[0].from_dict(raw)


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        read(raw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- refused by name --------------------------------------------------------------------------------------------------


def test_an_unknown_family_is_refused_and_all_known_ones_are_named() -> None:
    message = refusal({"model_type": "rwkv7"})
    assert "'rwkv7'" in message and all(name in message for name in FAMILIES)
    for value in (None, 3, ["llama"], {}):
        assert "model_type must be a string" in refusal({"model_type": value})


def test_several_problems_come_at_once_and_misspelt_keys_are_told() -> None:
    message = refusal({**config("llama-gqa-hub"), "rope_thetas": 3.0, "num_hidden_layers": "two", "cheese": 1})
    assert "did you mean 'rope_theta'?" in message and "'num_hidden_layers' must be int" in message
    assert "'cheese'" in message


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("deepseek_v3-base", {"head_dim": 4}, "head_dim = 4 and qk_rope_head_dim = 8"),
        ("deepseek_v3-base", {"n_group": 8}, "2 of 8 experts in 8 groups, of which 1 are kept"),
        ("deepseek_v3-base", {"topk_group": 3}, "of which 3 are kept"),
        ("deepseek_v2-grouped", {"n_group": 3}, "8 experts in 3 groups"),
        ("glm4_moe-base", {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ("glm4_moe_lite-base", {"mlp_layer_types": ["dense"]}, "mlp_layer_types must have dense or sparse"),
        ("mistral4-base", {"partial_rotary_factor": 0.25}, "factor 0.25 of 24 is not qk_rope_head_dim 8"),
        ("llama4_text-base", {"attention_chunk_size": None}, "attention_chunk_size is null"),
        ("granite_swa-base", {"layer_rope_theta": [500.0]}, "layer_rope_theta has 1 entries"),
        ("gptj-base", {"rotary_dim": 12}, "rotary_dim 12 is more than a head's 8"),
        ("codegen-base", {"n_head": 2}, "n_head = 2 must be a multiple of 4"),
        ("gpt_neo-base", {"attention_layers": None, "attention_types": [["global"], 2]}, "pairs of names and a count"),
        ("gpt_neo-base", {"attention_layers": ["global"]}, "attention_layers must have global or local"),
        ("mpt-base", {"attn_config": {"alibi": False}}, "'alibi' = False is not supported"),
        ("mpt-base", {"logit_scale": "inv_sqrt_d_model"}, "'logit_scale'"),
        ("deepseek_v32-base", {"q_lora_rank": None}, "the indexer reads the query latent"),
        ("deepseek_v32-base", {"index_head_dim": 8}, "index_head_dim = 8 and qk_rope_head_dim = 8"),
        ("deepseek_v32-base", {"layer_types": ["full_attention"] * 2}, "layer_types can only be indexed_attention"),
        ("glm_moe_dsa-base", {"indexer_types": ["shared", "full"]}, "the first of them full"),
        ("internlm3-base", {"bias": True}, "qkv_bias False and bias True differ"),
        ("minimax_m2-base", {"attn_type_list": [1, 0]}, "attn_type_list has layers without full attention"),
        ("minimax_m2-base", {"shared_intermediate_size": 8}, "'shared_intermediate_size' = 8 is not supported"),
        ("ernie4_5_moe-base", {"use_bias": True}, "use_bias True"),
        ("hunyuan_v1_moe-base", {"moe_topk": [2]}, "moe_topk needs a positive number for each of 2 layers"),
        ("hunyuan_v1_moe-base", {"moe_topk": [2, 9]}, "9 of 8 experts"),
        ("phimoe-base", {"num_experts_per_tok": 1}, "chooses two experts"),
        ("phimoe-base", {"tie_word_embeddings": True}, "a head with a bias"),
        ("llama4_text-base", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries"),
        ("llama4_text-base", {"layer_types": ["sliding_attention"] * 3}, "'sliding_attention' is not known"),
        ("qwen3_moe-base", {"num_experts_per_tok": 5}, "5 of 4 experts"),
        ("mixtral-base", {"num_experts_per_tok": 5}, "5 of 4 experts"),
        ("granitemoe-base", {"num_experts_per_tok": 5}, "5 of 4 experts"),
        ("gpt_oss-base", {"num_experts_per_tok": 5}, "5 of 4 experts"),
        ("olmoe-base", {"num_experts_per_tok": 5}, "5 of 4 experts"),
        ("deepseek_v3-base", {"topk_method": "greedy"}, "topk_method 'greedy'"),
        ("deepseek_v2-lite", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
        ("deepseek_v2-lite", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("gemma3_text-base", {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' = 50.0"),
        ("gemma3_text-base", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}}, "each type of layer"),
        ("gemma3_text-base", {"use_bidirectional_attention": True}, "'use_bidirectional_attention'"),
        ("llama-gqa-hub", {"rope_parameters": {"rope_theta": 5.0, "full_attention": {}}}, "one for each type of layer"),
        ("cohere2-base", {"use_qk_norm": True}, "use_qk_norm"),
        ("falcon-7b", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn = 2"),
        ("apertus-base", {"post_norm": True}, "'post_norm'"),
        ("gpt_oss-base", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("starcoder2-base", {"mlp_type": "gated"}, "mlp_type 'gated'"),
        ("hunyuan_v1_dense-base", {"use_qk_norm": False}, "'use_qk_norm'"),
        ("olmo3-base", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(family: str, changes: dict[str, Any], words: str) -> None:
    raw = {**config(family), **changes}
    with pytest.raises(ConfigError) as caught:
        read(raw).cache_window(0)
    assert words in str(caught.value)


def test_null_is_what_the_authors_code_makes_of_it() -> None:
    """In the authors' code a null flag is false, whatever its default; null sizes are computed from other keys."""
    assert read({**config("deepseek_v3-base"), "rope_interleave": None, "norm_topk_prob": None}).traditional is False
    assert read({**config("glm-base"), "partial_rotary_factor": None}).rotary_dim == 16
    assert read({**config("glm4_moe-base"), "partial_rotary_factor": None}).rotary_dim == 16
    assert read({**config("llama-gqa-hub"), "head_dim": None}).head_dim == 8


def test_a_switch_can_be_a_number() -> None:
    """Scout's `attn_temperature_tuning` is 4, which transformers 5.23 refuses: any number but 0 means on."""
    for value, scale in ((True, 0.4), (4, 0.4), (False, 0.0), (0, 0.0)):
        tuned = read({**config("llama4_text-base"), "attn_temperature_tuning": value})
        assert tuned.for_layer(2).temperature_scale == scale and tuned.for_layer(0).temperature_scale == 0


# --- no code of a repository runs -------------------------------------------------------------------------------------


def test_remote_code_runs_nothing(tmp_path: Path) -> None:
    """`auto_map` is ignored where the family is known; `model_file` (mlx-lm's) is refused."""
    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(LLAMA, model)
    code = f"open({str(ran)!r}, 'w')\n"
    for name in ("configuration_llama", "modeling_llama", "custom_model", "__init__", "sitecustomize"):
        (model / f"{name}.py").write_text(code)
    raw = config("llama-gqa-hub")
    auto = {"AutoConfig": "configuration_llama.C", "AutoModelForCausalLM": "modeling_llama.M"}
    (model / "config.json").write_text(json.dumps({**raw, "auto_map": auto}))
    prompt = [1, 9, 10, 11]
    assert mx.array_equal(open_loaded(model).logits(prompt), open_loaded(LLAMA).logits(prompt))
    (model / "config.json").write_text(json.dumps({**raw, "auto_map": auto, "model_file": "custom_model.py"}))
    with pytest.raises(ConfigError, match=r"'model_file' = 'custom_model\.py' is not supported: it names Python code"):
        open_loaded(model)
    (model / "config.json").write_text(json.dumps({**raw, "auto_map": auto, "model_type": "custom_llama"}))
    with pytest.raises(ConfigError, match="custom_llama"):
        open_loaded(model)
    assert not ran.exists()


# --- families of other packages ---------------------------------------------------------------------------------------

OUTSIDER = '''
from dataclasses import dataclass
from runner.families import Family
from runner.models.llama import Llama as Outsider, LlamaConfig

@dataclass(frozen=True, kw_only=True)
class OutsiderConfig(LlamaConfig):
    """Llama's, with a key of its own."""
    loudness: float = 1.0

family = Family("outsider_family.model", "OutsiderConfig", "Outsider")
not_a_family = "Outsider"
'''
LOADS = """
import sys
from pathlib import Path
from runner.engine.loaded import open_loaded
from runner.errors import ConfigError
try:
    print(open_loaded(Path(sys.argv[1])).logits([1, 9, 10])[-1, :4].tolist())
except ConfigError as error:
    print("refused:", error)
"""


def run_with(site: Path, model: Path) -> str:
    """Run a process that finds an installed distribution in `site`; return its output."""
    path = os.pathsep.join([str(site), str(ROOT)])
    command = [sys.executable, "-c", LOADS, str(model)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True, cwd=site
    )
    return done.stdout.strip()


def test_an_installed_package_adds_a_family(tmp_path: Path) -> None:
    site, model = tmp_path / "site", tmp_path / "model"
    package, metadata = site / "outsider_family", site / "outsider_family-1.0.dist-info"
    package.mkdir(parents=True)
    metadata.mkdir()
    (package / "__init__.py").write_text("")
    (package / "model.py").write_text(OUTSIDER)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: outsider-family\nVersion: 1.0\n")
    points = "outsider = outsider_family.model:family\nbroken = outsider_family.model:not_a_family\n"
    (metadata / "entry_points.txt").write_text(f"[runner.families]\n{points}llama = outsider_family.model:family\n")
    shutil.copytree(LLAMA, model)
    (model / "config.json").write_text(
        json.dumps({**config("llama-gqa-hub"), "model_type": "outsider", "loudness": 2.0})
    )
    wanted = str(open_loaded(LLAMA).logits([1, 9, 10])[-1, :4].tolist())
    assert run_with(site, model) == wanted
    (metadata / "entry_points.txt").rename(tmp_path / "points")  # uninstalled, it is unknown again
    assert run_with(site, model).startswith("refused: config.json: model_type 'outsider' is not supported")
    (tmp_path / "points").rename(metadata / "entry_points.txt")
    (model / "config.json").write_text(json.dumps({**config("llama-gqa-hub"), "model_type": "broken"}))
    assert "entry point runner.families:broken is not a runner.families.Family" in run_with(site, model)
    (model / "config.json").write_text(json.dumps({**config("llama-gqa-hub"), "loudness": 2.0}))
    assert run_with(site, model) == wanted  # a name of the table stays the table's, where nothing reads `loudness`
    (model / "config.json").write_text(json.dumps({**config("llama-gqa-hub"), "model_type": "other"}))
    assert "outsider" in run_with(site, model)
