"""AltUp: several streams of which a layer computes one; the others are predicted from it and corrected by it.

Source: arXiv:2301.13310, and `transformers.models.gemma3n`.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from runner.nn.fast import RMSNorm
from runner.nn.linear import HIDDEN, Linear
from runner.weights.module import Module
from runner.weights.tags import setting, weight

STREAMS = "altup_num_inputs"


@dataclass
class AltUp(Module):
    """Mixes the streams `[B, L, S, hidden_size]` by coefficients that one of them chooses."""

    router: Linear = weight("modality_router", STREAMS, HIDDEN)
    router_norm: RMSNorm = weight("router_norm", HIDDEN)
    prediction: Linear = weight("prediction_coefs", f"{STREAMS}*{STREAMS}", STREAMS)
    correction: Linear = weight("correction_coefs", STREAMS, STREAMS)
    output_scale: mx.array = weight("correct_output_scale", HIDDEN)
    active: int = setting("altup_active_idx")
    scales: bool = setting("altup_correct_scale")
    norm_eps: float = setting()

    def modalities(self, x: mx.array) -> mx.array:
        """`[B, L, hidden_size] -> [B, L, S]`, from -1 to 1."""
        routed = self.router(self.router_norm(x, self.norm_eps) * (1 / x.shape[-1]))
        return mx.tanh(routed.astype(mx.float32)).astype(x.dtype)

    def predict(self, streams: mx.array) -> mx.array:
        """The streams plus a mixture of them."""
        mixture = self.prediction(self.modalities(streams[:, :, self.active]))
        return streams + mixture.reshape(*streams.shape[:3], -1) @ streams

    def correct(self, predicted: mx.array, x: mx.array) -> mx.array:
        """The predicted streams, moved by what the layer made of the active one, `x`."""
        shares = self.correction(self.modalities(x)) + 1
        return predicted + shares[..., None] * (x - predicted[:, :, self.active])[:, :, None]

    def output(self, streams: mx.array) -> mx.array:
        """The active stream, scaled if the config says so: what the layer's input is gated by."""
        x = streams[:, :, self.active]
        return x * self.output_scale.astype(x.dtype) if self.scales else x


def sized(x: mx.array, like: mx.array) -> mx.array:
    """`x` scaled to the root mean square of `like`, along the last axis; `x` so small as to be noise is not raised."""
    own, wanted = (mx.mean(mx.square(array), axis=-1, keepdims=True) for array in (x, like))
    return x * mx.sqrt(wanted / mx.maximum(own, 1e-5))
