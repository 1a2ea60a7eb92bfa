"""VaultGemma: a Gemma 2 without the norms after its sublayers.

Source: arXiv:2510.15001, and `transformers.models.vaultgemma`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.models import gemma
from runner.models.gemma2 import Gemma2Config
from runner.nn.fast import RMSNorm
from runner.nn.linear import HIDDEN
from runner.weights.tags import weight
from runner.weights.transforms import PLUS_ONE


@dataclass(frozen=True, kw_only=True)
class VaultGemmaConfig(Gemma2Config):
    """`config.json` of a VaultGemma: Gemma 2's keys."""


@dataclass
class Block(gemma.Block):
    """Gemma's block; the norm before the MLP has Gemma 2's name."""

    post_attention_layernorm: RMSNorm = weight("pre_feedforward_layernorm", HIDDEN, transform=PLUS_ONE)


@dataclass
class VaultGemma(gemma.Decoder):
    """Gemma's decoder made of VaultGemma blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
