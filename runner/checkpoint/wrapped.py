"""Text models inside multimodal ones: the text part of a wrapper's config, and its tensors under their plain names.

A wrapper (Gemma 3 from 4B up, Mistral Small 3, Qwen-VL, LLaVA) has its text model's config in `text_config`, its
tensors below a prefix, and an image or audio encoder beside them. What reads text alone needs the first two: here they
are given the form of a text-only repository, so that families know of no wrapper. The encoder's tensors are left unread
by name; any other tensor that nothing takes is still reported.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from runner.checkpoint.overlay import Change, Info
from runner.config.rope_keys import BESIDE, plain_positions
from runner.errors import CheckpointError, ConfigError
from runner.local_files import quoted
from runner.weights.cuts import Cut, read_part
from runner.weights.tags import Header, Source


@dataclass(frozen=True)
class TextModel:
    """A text model that a wrapper holds, and the family of the table that reads it.

    Attributes:
        family: its `model_type` in `runner.families`.
        defaults: what its config class in transformers 5.23 says where `config.json` is silent, as far as the family's
            own defaults differ.
        fused_experts: whether experts are stored as one tensor for all, gate and up side by side.
    """

    family: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fused_experts: bool = False


_QWEN2_VL = TextModel(
    "qwen2",
    {
        "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "vocab_size": 152064,
    },
)  # fmt: skip
TEXT_MODELS: Mapping[str, TextModel] = {
    "gemma4_unified_text": TextModel(
        "gemma4_text",
        {"hidden_size_per_layer_input": 0, "max_position_embeddings": 262144, "sliding_window": 1024},
    ),
    "glm4v_text": TextModel(
        "glm4",
        {
            "head_dim": None, "hidden_size": 4096, "intermediate_size": 13696, "max_position_embeddings": 32768,
            "num_attention_heads": 32, "num_hidden_layers": 40, "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-5,
            "vocab_size": 151552,
        },
    ),
    "glm4v_moe_text": TextModel(
        "glm4_moe",
        {
            "attention_bias": True, "hidden_size": 4096, "intermediate_size": 10944, "max_position_embeddings": 65536,
            "num_attention_heads": 96, "num_hidden_layers": 46, "vocab_size": 151424,
        },
    ),
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen3_5_text": TextModel("qwen3_5_text"),
    "qwen3_5_moe_text": TextModel("qwen3_5_moe_text"),
    "qwen3_vl_text": TextModel("qwen3", {"max_position_embeddings": 128000, "rope_theta": 500000.0}),
    "qwen3_vl_moe_text": TextModel(
        "qwen3_moe",
        {
            "head_dim": 128, "intermediate_size": 5632, "max_position_embeddings": 128000,
            "moe_intermediate_size": 1408, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 60,
            "num_experts_per_tok": 4, "num_key_value_heads": 16, "rope_theta": 500000.0,
        },
        fused_experts=True,
    ),
}  # fmt: skip
"""Text models under names that only wrappers give them; those with a family of their own need no entry."""

_MISTRAL_SMALL = {
    "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40, "rms_norm_eps": 1e-5, "rope_theta": 1e9,
    "sliding_window": None, "vocab_size": 131072,
}  # fmt: skip
WRAPPERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "aya_vision": ("cohere2", {}),
    "cohere2_vision": ("cohere2", {}),
    "exaone4_5": ("exaone4", {}),
    "gemma3": ("gemma3_text", {"vocab_size": 262208}),
    "gemma3n": ("gemma3n_text", {}),
    "gemma4": ("gemma4_text", {}),
    "gemma4_unified": ("gemma4_unified_text", {}),
    "glm46v": ("glm4v_text", {}),
    "glm4v": ("glm4v_text", {}),
    "glm4v_moe": ("glm4v_moe_text", {}),
    "idefics3": ("llama", {"rms_norm_eps": 1e-5}),
    "internvl": ("qwen2", {}),
    "kimi_k25": ("deepseek_v3", {}),
    "llama4": ("llama4_text", {}),
    "llava": ("llama", {}),
    "llava_next": ("llama", {}),
    "llava_onevision": ("qwen2", {}),
    "mistral3": ("mistral", _MISTRAL_SMALL),
    "muse_glimmer": ("muse_glimmer_text", {}),
    "qwen2_5_vl": ("qwen2_5_vl_text", {}),
    "qwen2_vl": ("qwen2_vl_text", {}),
    "qwen3_5": ("qwen3_5_text", {}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {}),
    "qwen3_vl": ("qwen3_vl_text", {}),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", {}),
    "smolvlm": ("llama", {"rms_norm_eps": 1e-5}),
    "voxtral": ("llama", {}),
}
"""Wrappers by `model_type`: the text model where `text_config` names none, and the defaults that it then has."""

PREFIXES = {
    "model.language_model.lm_head.": "lm_head.",
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "model.text_model.": "model.",
}
"""Where wrappers keep their text model, as published and as transformers 4 and 5 write it, and the plain name."""

ENCODERS = re.compile(
    r"(model\.)?(visual|vision_adapter|vision_projection|vision_tower|vision_model|vision_encoder|vision_embedder|multi_modal_projector|mm_projector"
    r"|multimodal_projector|embed_vision|embed_audio|audio_tower|audio_encoder|connector|image_newline|mtp"
    r"|patch_merger|vision_language_adapter|aligner)(\.|$)"
)
"""Tensors of encoders, of what joins them to the text model, and of multi-token prediction."""

_CARRIED = ("tie_word_embeddings", "torch_dtype", "dtype", "eos_token_id", "bos_token_id", "pad_token_id")
_QUANTIZED = ("quantization", "quantization_config", "compression_config")
_FLAT = re.compile(
    r"(vision|image|video|audio|mm|multimodal|projector|spatial|temporal|tokens_per_second)(_|$)|.*_config$"
)


def is_wrapper(config: Mapping[str, Any]) -> bool:
    """Whether this is the `config.json` of a multimodal model whose text part is known."""
    model_type = config.get("model_type")
    return isinstance(model_type, str) and (model_type in WRAPPERS or model_type in TEXT_MODELS)


def unwrap(config: Mapping[str, Any], source: Source) -> tuple[dict[str, Any], Source, tuple[str, ...]]:
    """Turn a wrapper into its text model.

    Returns:
        The text model's `config.json`, its tensors under plain names, and the names of those that are not its own.

    Raises:
        ConfigError: `text_config` is no object, or names a text model that is no string.
        CheckpointError: two tensors have the same plain name.
    """
    text, known = _text_config(config)
    unwrapped = Unwrapped(source, known, text.get("hidden_size"))
    if "tie_word_embeddings" not in text:
        # Wrappers seldom say; a head that is stored wins over the embeddings in any case.
        text["tie_word_embeddings"] = True
    for name in _QUANTIZED:
        if name in config:
            text[name] = _renamed(config[name])
    return text, unwrapped, tuple(unwrapped.unread)


def _text_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], TextModel]:
    wrapper = str(config["model_type"])
    default, defaults = WRAPPERS.get(wrapper, (wrapper, {}))
    given = config.get("text_config")
    if given is None:
        # Qwen2.5-VL's published files: one flat config, the encoder's keys among the text model's.
        text = {name: value for name, value in config.items() if not _FLAT.match(name) and name not in _QUANTIZED}
        text["model_type"] = default
    elif isinstance(given, Mapping):
        text = dict(given)
        text.update({name: config[name] for name in _CARRIED if config.get(name) is not None and name not in given})
        if config.get("tie_word_embeddings") is not None:
            text["tie_word_embeddings"] = config["tie_word_embeddings"]
    else:
        raise ConfigError(f"config.json: text_config must be an object, not {given!r}")
    named = text.get("model_type", default)
    if not isinstance(named, str):
        raise ConfigError(f"config.json: text_config.model_type must be a string, not {named!r}")
    known = TEXT_MODELS.get(named, TextModel(named))
    for name, value in {**known.defaults, **(defaults if named == default else {})}.items():
        # What describes RoPE stands inside `rope_parameters` in files of transformers 5.
        if name not in BESIDE or "rope_parameters" not in text:
            text.setdefault(name, value)
    text["model_type"] = known.family
    for name in ("rope_scaling", "rope_parameters"):
        if name in text:
            text[name] = plain_positions(text[name])
    return text, known


def _renamed(value: Any) -> Any:
    """Rename the layers of a quantization block, whose keys and lists name layers as the wrapper does."""
    if isinstance(value, Mapping):
        return {_plain(name) if isinstance(name, str) else name: _renamed(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item) for item in value]
    return _plain(value) if isinstance(value, str) else value


def _plain(name: str) -> str:
    """The name that a tensor, or a layer, has in a text-only repository."""
    for prefix, plain in PREFIXES.items():
        if f"{name}.".startswith(prefix):
            return f"{plain}{name[len(prefix) :]}" if len(name) >= len(prefix) else plain.removesuffix(".")
    return name


class Unwrapped:
    """A `Source`: the text model's tensors of another one, under their plain names."""

    def __init__(self, base: Source, known: TextModel, hidden_size: object) -> None:
        self._base = base
        self._stored: dict[str, str] = {}
        headers: dict[str, Header] = {}
        self.unread: list[str] = []
        self._fused: dict[str, functools.partial[mx.array]] = {}  # what reads the parts of fused experts
        for stored, header in base.headers.items():
            if ENCODERS.match(stored):
                self.unread.append(stored)
                continue
            plain = _plain(stored)
            if plain in headers:
                raise CheckpointError(f"tensors {quoted(self._stored[plain])} and {quoted(stored)} are both {plain}")
            self._stored[plain], headers[plain] = stored, header
        self._changes = self._unstacked(headers, hidden_size) if known.fused_experts else {}
        self.headers: Mapping[str, Header] = headers | {name: change.header for name, change in self._changes.items()}

    def _unstacked(self, headers: dict[str, Header], hidden_size: object) -> dict[str, Change]:
        """Take fused experts out of `headers`; their matrices `[E, out, in]` come in their place, gate and up apart.

        Repositories have them as `[E, in, out]`, transformers 5 saves `[E, out, in]`: the hidden size tells.
        """
        changes: dict[str, Change] = {}
        for name in [name for name in headers if re.search(r"\.mlp\.experts\.(gate_up|down)_proj$", name)]:
            header = headers[name]
            if len(header.shape) != 3:
                continue  # the plan reports its shape
            del headers[name]
            fused = name.endswith("gate_up_proj")
            experts, *size = header.shape
            turned = size[0 if fused else 1] == hidden_size
            outputs, inputs = reversed(size) if turned else size
            parts = ("gate_proj", "up_proj") if fused else ("down_proj",)
            rows = outputs // len(parts)
            for index, part in enumerate(parts):
                target = re.sub(r"experts\.\w+$", f"switch_mlp.{part}.weight", name)
                place = slice(index * rows, (index + 1) * rows)
                read = functools.partial(self._matrices, self._stored[name], turned, place)
                changes[target] = Change(Info(header.dtype, (experts, rows, inputs)), read)
                self._fused[target] = read
        return changes

    def _matrices(self, stored: str, turned: bool, rows: slice, cut: Cut = (None, None, None)) -> mx.array:
        """Some rows of each expert's matrix, `[E, rows, in]`, and of them the kept places."""
        experts, outputs, inputs = cut
        first = rows.start
        kept = ((0, rows.stop - first),) if outputs is None else outputs
        shifted = tuple((start + first, stop + first) for start, stop in kept)
        array = read_part(self._base, stored, (experts, inputs, shifted) if turned else (experts, shifted, inputs))
        return mx.contiguous(array.swapaxes(-1, -2)) if turned else array

    def read(self, name: str) -> mx.array:
        """Return the tensor of this plain name; raises `CheckpointError` where there is none."""
        if name in self._changes:
            return self._changes[name].read()
        if name not in self.headers:
            raise CheckpointError(f"no tensor {quoted(name)}")
        return self._base.read(self._stored[name])

    def read_part(self, name: str, cut: Cut) -> mx.array:
        """The kept places of a tensor; see `PartSource`."""
        if name in self._changes:
            return self._fused[name](cut)
        return read_part(self._base, self._stored[name], cut)
