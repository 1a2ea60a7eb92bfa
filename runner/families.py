"""The families of models: which config and model class read each `model_type`; other packages can add theirs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from runner.cache.several import Memories
from runner.config.base import Config
from runner.errors import ConfigError
from runner.nn.batch import Batch

ENTRY_POINTS = "runner.families"
"""Group of entry points that add to the table below: each is named after a model_type and points to a `Family`."""


class Model(Protocol):
    """The interface of a model, as the engine uses it."""

    def __call__(self, batch: Batch, caches: Memories) -> mx.array:
        """Ids to hidden states `[B, L, hidden_size]`; keys and values are appended to `caches`, one for each layer."""
        ...

    def logits(self, hidden: mx.array) -> mx.array:
        """Hidden states `[..., hidden_size]` to logits `[..., vocab_size]`."""
        ...


@dataclass(frozen=True)
class Family:
    """Where a family's code is: its module (below `runner.models`, or a dotted path), config class and model class.

    Attributes:
        float16: whether its activations are known to stay below float16's largest number, 65504. Where they are not,
            they are computed in bfloat16 by default even if config.json says float16.
    """

    module: str
    config: str
    model: str
    float16: bool = False

    def load(self) -> tuple[type[Config], type]:
        """Import the module and return the config class and the model class."""
        module = importlib.import_module(self.module if "." in self.module else f"runner.models.{self.module}")
        return vars(module)[self.config], vars(module)[self.model]


FAMILIES: Mapping[str, Family] = {
    # float16: published in it, or run in it for years; the massive activations measured in such models are in the
    # thousands (arXiv:2402.17762).
    "llama": Family("llama", "LlamaConfig", "Llama", float16=True),
    "mistral": Family("llama", "MistralConfig", "Llama", float16=True),
    "qwen2": Family("qwen2", "Qwen2Config", "Qwen2"),
    "qwen3": Family("qwen3", "Qwen3Config", "Qwen3"),
    "granite": Family("granite", "GraniteConfig", "Granite"),
    "smollm3": Family("smollm3", "SmolLM3Config", "Llama"),
    "glm": Family("glm", "GlmConfig", "Glm"),
    "glm4": Family("glm4", "GlmConfig", "Glm4"),
    "seed_oss": Family("seed_oss", "SeedOssConfig", "SeedOss"),
    "ernie4_5": Family("ernie4_5", "Ernie45Config", "Llama"),
    "helium": Family("helium", "HeliumConfig", "Helium"),
    "phi3": Family("phi3", "Phi3Config", "Phi3"),
    "olmo2": Family("olmo2", "Olmo2Config", "Olmo2"),
    "olmo": Family("olmo", "OlmoConfig", "Olmo"),
    "stablelm": Family("stablelm", "StableLmConfig", "StableLm"),
    "starcoder2": Family("starcoder2", "Starcoder2Config", "Starcoder2"),
    "nemotron": Family("nemotron", "NemotronConfig", "Nemotron"),
    "cohere": Family("cohere", "CohereConfig", "Cohere"),
    "cohere2": Family("cohere2", "Cohere2Config", "Cohere"),
    "phi": Family("phi", "PhiConfig", "Phi"),
    "gpt_neox": Family("gpt_neox", "GPTNeoXConfig", "GPTNeoX", float16=True),
    "gpt2": Family("gpt2", "GPT2Config", "GPT2", float16=True),
    "bloom": Family("bloom", "BloomConfig", "Bloom"),
    "falcon": Family("falcon", "FalconConfig", "Falcon"),
    "opt": Family("opt", "OPTConfig", "OPT", float16=True),
    "apertus": Family("apertus", "ApertusConfig", "Apertus"),
    "deepseek_v2": Family("deepseek_v2", "DeepseekV2Config", "DeepseekV2"),
    "deepseek_v3": Family("deepseek_v3", "DeepseekV3Config", "DeepseekV2"),
    "glm4_moe": Family("glm4_moe", "Glm4MoeConfig", "Glm4Moe"),
    "glm4_moe_lite": Family("glm4_moe_lite", "Glm4MoeLiteConfig", "DeepseekV2"),
    "kimi_k2": Family("deepseek_v3", "DeepseekV3Config", "DeepseekV2"),
    "internlm3": Family("internlm3", "InternLM3Config", "Llama"),
    "minicpm3": Family("minicpm3", "MiniCPM3Config", "MiniCPM3"),
    "persimmon": Family("persimmon", "PersimmonConfig", "Persimmon"),
    "minimax_m2": Family("minimax_m2", "MiniMaxM2Config", "MiniMaxM2"),
    "ernie4_5_moe": Family("ernie4_5_moe", "Ernie45MoeConfig", "ConfiguredDecoder"),
    "hunyuan_v1_moe": Family("hunyuan_v1_moe", "HunyuanMoeConfig", "HunyuanMoe"),
    "dots1": Family("dots1", "Dots1Config", "ConfiguredDecoder"),
    "exaone_moe": Family("exaone_moe", "ExaoneMoeConfig", "ConfiguredDecoder"),
    "phimoe": Family("phimoe", "PhimoeConfig", "Phimoe"),
    "mimo": Family("mimo", "MiMoConfig", "Qwen2"),
    "arcee": Family("arcee", "ArceeConfig", "Arcee"),
    "youtu": Family("youtu", "YoutuConfig", "Youtu"),
    "youtu_llm": Family("youtu", "YoutuConfig", "Youtu"),
    "cwm": Family("cwm", "CwmConfig", "Llama"),
    "nanochat": Family("nanochat", "NanoChatConfig", "NanoChat"),
    "granite_swa": Family("granite_swa", "GraniteSWAConfig", "GraniteSWA"),
    "hyperclovax": Family("hyperclovax", "HyperCLOVAXConfig", "HyperCLOVAX"),
    "vaultgemma": Family("vaultgemma", "VaultGemmaConfig", "VaultGemma"),
    "flex_olmo": Family("flex_olmo", "FlexOlmoConfig", "FlexOlmo"),
    "solar_open": Family("solar_open", "SolarOpenConfig", "Glm4Moe"),
    "iquestcoder": Family("iquestcoder", "IQuestCoderConfig", "Llama"),
    "jais2": Family("jais2", "Jais2Config", "Jais2"),
    "gpt_bigcode": Family("gpt_bigcode", "GPTBigCodeConfig", "GPTBigCode"),
    "gptj": Family("gptj", "GPTJConfig", "GPTJ"),
    "codegen": Family("codegen", "CodeGenConfig", "CodeGen"),
    "gpt_neo": Family("gpt_neo", "GPTNeoConfig", "GPTNeo"),
    "mpt": Family("mpt", "MptConfig", "Mpt"),
    "llama4_text": Family("llama4_text", "Llama4Config", "Llama4"),
    "ministral3": Family("ministral3", "Ministral3Config", "Ministral3"),
    "mistral4": Family("mistral4", "Mistral4Config", "ConfiguredDecoder"),
    "deepseek_v32": Family("deepseek_v32", "DeepseekV32Config", "ConfiguredDecoder"),
    "glm_moe_dsa": Family("glm_moe_dsa", "GlmMoeDsaConfig", "ConfiguredDecoder"),
    "gpt_oss": Family("gpt_oss", "GptOssConfig", "GptOss"),
    "gemma": Family("gemma", "GemmaConfig", "Gemma"),
    "gemma2": Family("gemma2", "Gemma2Config", "Gemma2"),
    "gemma3_text": Family("gemma3_text", "Gemma3Config", "Gemma3"),
    "gemma3n_text": Family("gemma3n_text", "Gemma3nConfig", "Gemma3n"),
    "gemma4_text": Family("gemma4_text", "Gemma4Config", "Gemma4"),
    "afmoe": Family("afmoe", "AfmoeConfig", "Afmoe"),
    "laguna": Family("laguna", "LagunaConfig", "ConfiguredDecoder"),
    "mimo_v2_flash": Family("mimo_v2_flash", "MiMoConfig", "ConfiguredDecoder"),
    "cohere2_moe": Family("cohere2_moe", "Cohere2MoeConfig", "Cohere2Moe"),
    "muse_glimmer_text": Family("muse_glimmer_text", "MuseGlimmerConfig", "MuseGlimmer"),
    "lfm3": Family("lfm3", "Lfm3Config", "Lfm3"),
    "mellum": Family("mellum", "MellumConfig", "Qwen3Moe"),
    "exaone4": Family("exaone4", "Exaone4Config", "Exaone4"),
    "hunyuan_v1_dense": Family("hunyuan_v1_dense", "HunyuanConfig", "Hunyuan"),
    "mixtral": Family("mixtral", "MixtralConfig", "Mixtral", float16=True),
    "qwen2_moe": Family("qwen2_moe", "Qwen2MoeConfig", "Qwen2Moe"),
    "qwen3_moe": Family("qwen3_moe", "Qwen3MoeConfig", "Qwen3Moe"),
    "qwen3_next": Family("qwen3_next", "Qwen3NextConfig", "Qwen35"),
    "qwen3_5_text": Family("qwen3_5", "Qwen35Config", "Qwen35"),
    "qwen3_5_moe_text": Family("qwen3_5_moe", "Qwen35MoeConfig", "Qwen35"),
    "granitemoe": Family("granitemoe", "GraniteMoeConfig", "GraniteMoe"),
    "olmoe": Family("olmoe", "OlmoeConfig", "Olmoe"),
    "falcon_h1": Family("falcon_h1", "FalconH1Config", "FalconH1"),
    "granitemoehybrid": Family("granitemoehybrid", "GraniteMoeHybridConfig", "GraniteMoeHybrid"),
    "bamba": Family("bamba", "BambaConfig", "Bamba"),
    "jamba": Family("jamba", "JambaConfig", "Bamba"),
    "mamba": Family("mamba", "MambaConfig", "SingleDecoder"),
    "falcon_mamba": Family("mamba", "FalconMambaConfig", "SingleDecoder"),
    "mamba2": Family("mamba2", "StackedMamba2Config", "SingleDecoder"),
    "nemotron_h": Family("nemotron_h", "NemotronHConfig", "NemotronH"),
    "lfm2": Family("lfm2", "Lfm2Config", "Lfm2"),
    "lfm2_moe": Family("lfm2_moe", "Lfm2MoeConfig", "Lfm2"),
    "olmo3": Family("olmo2", "Olmo3Config", "Olmo2"),
}


def find(raw: Mapping[str, Any]) -> tuple[type[Config], type]:
    """The config and model classes for the contents of a `config.json`; errors as of `family_of`."""
    return family_of(raw).load()


def family_of(raw: Mapping[str, Any]) -> Family:
    """The family of the model with this `config.json`, of this package or another.

    Raises:
        ConfigError: `model_type` is missing or belongs to no family; the message lists the supported ones.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(f"config.json: model_type must be a string, not {model_type!r}")
    # Families of this package come first: an entry point cannot replace one.
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    from importlib.metadata import entry_points  # late, as in `runner.ops.backend`

    outside = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if model_type in outside:
        family = outside[model_type].load()
        if not isinstance(family, Family):
            raise ConfigError(f"entry point {ENTRY_POINTS}:{model_type} is not a runner.families.Family")
        return family
    known = ", ".join(sorted({*FAMILIES, *outside}))
    raise ConfigError(f"config.json: model_type {model_type!r} is not supported; supported are: {known}")
