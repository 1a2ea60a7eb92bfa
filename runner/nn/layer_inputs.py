"""Inputs for each layer beside the residual stream, made of a table of their own (Gemma 3n's per-layer embeddings).

Source: `transformers.models.gemma3n`; no paper describes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from runner.nn.fast import RMSNorm
from runner.nn.linear import HIDDEN, VOCAB, Embedding, Linear
from runner.nn.mlp import Activation
from runner.weights.module import Module
from runner.weights.tags import setting, weight

WIDTH = "hidden_size_per_layer_input"
WIDTHS = f"num_hidden_layers*{WIDTH}"


@dataclass
class LayerInputs(Module):
    """The inputs of all layers: what a table has for each token, and a projection of the token's embedding."""

    table: Embedding = weight("embed_tokens_per_layer", "vocab_size_per_layer_input", WIDTHS)
    projection: Linear = weight("per_layer_model_projection", WIDTHS, HIDDEN)
    norm: RMSNorm = weight("per_layer_projection_norm", WIDTH)
    width: int = setting(WIDTH)
    rows: int = setting("vocab_size_per_layer_input")
    vocab_size: int = setting(VOCAB)
    norm_eps: float = setting()

    def __call__(self, ids: mx.array, x: mx.array) -> mx.array:
        """Ids `[B, L]` and their embeddings `[B, L, hidden_size]` to `[B, L, layers, width]`.

        An id past the end of the table has the row of id 0.
        """
        if self.rows < self.vocab_size:
            ids = mx.where(ids < self.rows, ids, 0)
        found = self.table(ids)
        found = found * mx.array(self.width**0.5, dtype=found.dtype)
        projected = self.projection(x) * x.shape[-1] ** -0.5
        normed = self.norm(projected.reshape(*ids.shape, -1, self.width), self.norm_eps)
        return (normed + found.reshape(normed.shape)) * 2**-0.5


@dataclass
class LayerInput(Module):
    """What a layer adds for its input: `norm(projection(act(gate(x)) * input))`."""

    act: Activation
    gate: Linear = weight("per_layer_input_gate", WIDTH, HIDDEN)
    projection: Linear = weight("per_layer_projection", HIDDEN, WIDTH)
    norm: RMSNorm = weight("post_per_layer_input_norm", HIDDEN)
    norm_eps: float = setting()

    def __call__(self, x: mx.array, given: mx.array) -> mx.array:
        """`x` `[B, L, hidden_size]` and the layer's input `[B, L, width]` to the shape of `x`."""
        return self.norm(self.projection(self.act(self.gate(x)) * given), self.norm_eps)
