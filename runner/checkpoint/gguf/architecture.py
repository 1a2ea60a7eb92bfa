"""How a GGUF architecture is described: what llama.cpp's converters renamed, reordered or left out; what all share.

Source: llama.cpp's conversion scripts and model loaders (0.3.36 of llama-cpp-python) and transformers' config classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from runner.errors import CheckpointError

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class Reader(Protocol):
    """The metadata below a file's architecture and the names of its tensors, for settings that take more than a table.

    A key that is asked for counts as understood. All but `error` raise `CheckpointError` for values of another kind.
    """

    @property
    def layers(self) -> int:
        """How many layers the model has, without those for multi-token prediction."""
        ...

    @property
    def tensors(self) -> Mapping[str, Any]:
        """The file's tensors, by GGUF's names."""
        ...

    def get(self, key: str) -> Any:
        """The value of a key, None where it is missing; a list of one value for all layers counts as that value."""
        ...

    def number(self, key: str) -> int | float | None:
        """A finite number, None where the key is missing."""
        ...

    def first(self, *keys: str, default: float) -> float:
        """The number under the first of the keys that is there."""
        ...

    def needs(self, key: str) -> int:
        """A size that must be there."""
        ...

    def each(self, key: str) -> Sequence[int] | None:
        """An integer from 0 on, or a flag as 0 or 1, for each layer, from a list or from one for all; None: no key."""
        ...

    def floats(self, key: str) -> Sequence[float] | None:
        """A number for each layer, which may be infinite; None where there is no such list."""
        ...

    def truth(self, key: str) -> bool:
        """A boolean, false where the key is missing."""
        ...

    def table(self, name: str) -> list[float]:
        """A small tensor: a vector of positive numbers."""
        ...

    def error(self, what: str) -> CheckpointError:
        """An error that names the file and the problem, for the caller to raise."""
        ...


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How GGUF files with one value of `general.architecture` differ from transformers' checkpoints.

    Attributes:
        model_type, class_name: transformers' names for the family.
        blocks: a layer's tensors: GGUF's name -> transformers' name below `model.layers.N`.
        keys: metadata key below `<architecture>.` -> key of config.json, in addition to `COMMON_KEYS`.
        fixed: keys of config.json whose values the files do not carry.
        flags: boolean key of config.json -> the tensor whose presence makes it true.
        interleaved: tensors whose rows llama.cpp reordered for the RoPE pairs (2i, 2i+1) -> the config key that gives
            their number of heads.
        norms_plus_one: norm weights are stored with 1 added, which transformers' model adds when it runs.
        top: tensors outside layers: GGUF's name -> transformers' name.
        head_dim: config.json has the key `head_dim`; other families derive the head size.
        windowed: model_type and class of files that have a sliding window, where they differ from the others'.
        window_period: each `window_period`-th layer has full attention and the others a sliding window, unless the file
            says otherwise.
        period_key: config key that holds another period; None where the family's config has no such key.
        query_scalar: not None where config.json has query_pre_attn_scalar, which the files leave out. Its value is the
            head size, but hidden_size / num_attention_heads in models with `query_scalar` layers (the 27B).
        whole: a layer's tensors whose names have another end in transformers than in GGUF, by their whole names there.
        plain_norms: norms to which nothing is added all the same.
        negated_exp: tensors that are stored as minus their exponential.
        recurrent: some layers are Gated DeltaNets.
        value_heads: tensors whose value heads llama.cpp sorted -> how (`runner.checkpoint.gguf.value_heads`).
        truths: boolean metadata key -> key of config.json.
        only: metadata keys that do not affect the results if they have this value, the family's own.
        needed: metadata keys that llama.cpp may do without, but whose absence means another value to transformers.
        yarn: keys of a YaRN's `rope_scaling` whose values the files do not carry.
        layer_kinds: layer_types of layers without and with key-value heads, a number per layer in the files.
        log_multiplier: what files multiply YaRN's `mscale_all_dim` by; None: they do not have it.
        tempered: files may have the scale of the queries' temperature, which config.json has below its RoPE settings.
        latent: attention has DeepSeek's latents, of which the files give other sizes than config.json.
        with_experts: the architecture of files that have experts, under the same name.
        flattened: matrices of one row that are stored as vectors.
        folded: vectors that are stored as matrices.
        piled: tensors outside layers that hold several matrices -> what these are called, before a dot and a number.
        grouped: matrices of all heads' queries, then keys, then values, which transformers has head by head.
        prefix: where transformers has the layers.
        renames: keys of config.json that this family calls otherwise, or (None) does not have.
        attends: some layers attend, so that there are heads.
        sized: the sizes of heads are read as most architectures have them; otherwise, `own` reads them.
        rotates: RoPE is read as most architectures have it; otherwise, `own` reads it, or there is none.
        rope_by_type: layers with a window have a base of their own, and RoPE that nothing stretches.
        own: settings that are worked out of several keys, or of the tensors; they are read before all others.
        predicts: files may have layers for multi-token prediction behind the others, which are left unread.
        rstrip: where not None, control tokens take the white space after them, except these tokens (as in the family's
            tokenizer.json).
    """

    model_type: str
    class_name: str
    blocks: Mapping[str, str]
    keys: Mapping[str, str]
    fixed: Mapping[str, Any]
    flags: Mapping[str, str] = field(default_factory=dict)
    interleaved: Mapping[str, str] = field(default_factory=dict)
    norms_plus_one: bool = False
    top: Mapping[str, str] = field(default_factory=lambda: TOP)
    head_dim: bool = True
    windowed: tuple[str, str] | None = None
    window_period: int | None = None
    period_key: str | None = None
    query_scalar: int | None = None
    whole: Mapping[str, str] = field(default_factory=dict)
    plain_norms: frozenset[str] = frozenset()
    negated_exp: frozenset[str] = frozenset()
    recurrent: bool = False
    value_heads: Mapping[str, str] = field(default_factory=dict)
    truths: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    needed: frozenset[str] = frozenset()
    yarn: Mapping[str, Any] = field(default_factory=dict)
    layer_kinds: tuple[str, str] | None = None
    log_multiplier: float | None = None
    tempered: bool = False
    latent: bool = False
    with_experts: Architecture | None = None
    flattened: frozenset[str] = frozenset()
    folded: frozenset[str] = frozenset()
    piled: Mapping[str, str] = field(default_factory=dict)
    grouped: frozenset[str] = frozenset()
    prefix: str = "model.layers"
    renames: Mapping[str, str | None] = field(default_factory=dict)
    attends: bool = True
    sized: bool = True
    rotates: bool = True
    rope_by_type: bool = False
    own: Callable[[Reader], dict[str, Any]] | None = None
    predicts: bool = False
    rstrip: tuple[str, ...] | None = None


ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
IGNORED = re.compile(r"blk\.\d+\.(attn_rot_embd|rope_freqs)(\.weight)?")
"""Names of the RoPE frequency tables per layer that old converters wrote and nothing reads."""

ENCODER = re.compile(r"(v|mm)\..+")
"""Names of the tensors of an encoder for images, which text does not need."""

ENCODER_KEYS = ("vision.", "mm.")
"""What metadata keys about it begin with, below the architecture's name."""

ZERO_MEANS_NONE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")

COMMON_KEYS: Mapping[str, str] = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
}

STACK_KEYS = {key: COMMON_KEYS[key] for key in ("embedding_length", "block_count")}
"""Those of a model that does not attend: of the others, files have the numbers that old loaders asked for."""

HARMLESS: Mapping[str, tuple[Any, ...] | None] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_feed_forward_length": None,  # the tensors' own width, which is checked against the other sizes
    "rope.scaling.finetuned": None,
    "tensor_data_layout": None,
    "vocab_size": None,
}
"""Metadata keys that do not affect the results if they have one of these values (None: any value)."""
