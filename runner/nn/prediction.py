"""The layer that predicts the token after the next: multi-token prediction, as DeepSeek V3 has it.

Source: arXiv:2412.19437, section 2.2, and `transformers.modeling_layers.MtpLayer`. Embeddings and head are the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx

from runner.config.base import Config
from runner.nn.batch import Batch
from runner.nn.fast import RMSNorm
from runner.nn.linear import HIDDEN, Linear
from runner.weights.module import Module
from runner.weights.tags import Choice, Chooses, Header, setting, weight
from runner.weights.tree import Size, Tree


@dataclass
class Predicting(Module):
    """A block whose input is a token's embedding and the hidden state before it: a base beside a family's own block."""

    enorm: RMSNorm = weight("enorm", HIDDEN)
    hnorm: RMSNorm = weight("hnorm", HIDDEN)
    eh_proj: Linear = weight("eh_proj", HIDDEN, "2*hidden_size")
    shared_norm: RMSNorm = weight("shared_head.norm", HIDDEN)
    rms_norm_eps: float = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: Any) -> mx.array:
        raise NotImplementedError

    def predict(self, embedded: mx.array, hidden: mx.array, batch: Batch, cache: Any) -> mx.array:
        """Hidden states `[B, L, hidden_size]` for the head, from which the tokens behind `embedded` are predicted.

        Args:
            embedded: the tokens' embeddings `[B, L, hidden_size]`.
            hidden: the model's hidden states at the tokens before them, or this function's own.
        """
        eps = self.rms_norm_eps
        both = mx.concatenate([self.enorm(embedded, eps), self.hnorm(hidden, eps)], axis=-1)
        return self.shared_norm(self(self.eh_proj(both), batch, cache), eps)


@runtime_checkable
class HasPrediction(Protocol):
    """A config of a family whose files may have one such layer, behind the model's own.

    Attributes:
        prediction_class: its class, a `Predicting` block.
        prediction_layer: its number in the names of tensors.
    """

    num_nextn_predict_layers: int

    @property
    def prediction_class(self) -> type: ...
    @property
    def prediction_layer(self) -> str: ...


class ConfiguredPrediction(Chooses):
    """The block of the class that the config's `prediction_class` names."""

    def predict(self, embedded: mx.array, hidden: mx.array, batch: Batch, cache: Any) -> mx.array:
        raise NotImplementedError

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        assert isinstance(config, HasPrediction)
        return Choice(config.prediction_class, {})


@dataclass
class Prediction(Module):
    """All that a checkpoint has for multi-token prediction."""

    layer: ConfiguredPrediction = weight("model.layers.{prediction_layer}")
