"""What a fixture is: one checkpoint as data. `fixtures_llama.py` and `fixtures_families.py` are tables of these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Config = dict[str, Any]
REMOVED = object()  # value in `Case.change`: the key is taken out of the base config


@dataclass(frozen=True, kw_only=True)
class Case:
    """One tiny checkpoint directory and how to make it.

    `base | change` is `config.json` in the spelling of hub repositories (`rope_theta`, `rope_scaling`, `torch_dtype`).
    Every key of `change` is tested to matter: the same weights under the base's value must give other logits, unless
    the key is in `inert` (documented reason: it changes no logit of these prompts) or changes the tensors' shapes.
    """

    name: str
    base: Mapping[str, Any]
    change: Mapping[str, Any] = field(default_factory=dict)
    inert: tuple[str, ...] = ()
    spelling: Literal["v5", "hub"] = "v5"  # v5: as save_pretrained writes it; hub: `base | change` as it stands
    storage: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    tokenizer: str | None = None  # a name of fixtures_tokenizers.KINDS
    expect_text: bool = True  # write expected_text.json beside the tokenizer
    generation_config: Mapping[str, Any] | None = None  # written instead of save_pretrained's, where given
    shard_bytes: int | None = None  # sharded by index, plus one stray shard that the index does not name
    extra_tensors: tuple[str, ...] = ()  # names of fixtures_files.EXTRA_TENSORS
    keep_float32: tuple[str, ...] = ()  # tensors whose names contain one of these stay float32 in the file
    quantization: Mapping[str, Any] | None = None  # an MLX checkpoint's entry, or gpt_oss's
    rope_by_length: bool = False  # frequencies depend on the length seen: cached and uncached decoding differ
    blind_vectors: tuple[str, ...] = ()  # 1-D tensors that cannot change a logit (a key bias without rotary)
    seed: int = 0  # first seed tried; cases with the same base shapes and seed have the same weights
    gain: float = 1.3  # of the projections, times 1/sqrt(inputs)
    embedding_std: float = 0.5  # smaller where embeddings are multiplied: the layers must matter beside them
    eos_at: int | None = None  # generation_config gets the greedy token at this step of the short prompt as an end
    note: str = ""

    @property
    def config(self) -> Config:
        """`config.json` in hub spelling."""
        merged = {**self.base, **self.change}
        return {key: value for key, value in merged.items() if value is not REMOVED}

    def without(self, key: str) -> Config:
        """The config with the base's value for `key` (absent where the base has none)."""
        merged = {k: v for k, v in {**self.base, **self.change}.items() if v is not REMOVED}
        merged.pop(key, None)
        if key in self.base:
            merged[key] = self.base[key]
        return merged
