"""Mixtures of experts: a router picks a few feed-forward layers (experts) per token; their matrices are stacked.

Sources: Mixtral arXiv:2401.04088, Qwen-MoE, and their code in transformers; `runner.ops.routing`: how they are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from runner.config.base import Config
from runner.errors import WeightsError
from runner.nn.fast import provided_ops
from runner.nn.linear import Linear, QuantizedFields, stored_quantization
from runner.nn.mlp import GLU
from runner.ops.exchange import Exchange
from runner.ops.routing import Routing
from runner.ops.table import Ops
from runner.weights.module import Module
from runner.weights.tags import Choice, Chooses, Header, setting, tensor
from runner.weights.tree import Size, Tree, leaf_shapes, leaves

EXPERT = "moe_intermediate_size"
SORTED_FROM = 64
"""Rows (tokens times experts per token) from which sorting by expert pays; mlx-lm's threshold."""


class ExpertLinear(Chooses):
    """A linear layer with one matrix per expert: x `[..., 1, in]` and chosen experts `[...]` -> `[..., 1, out]`.

    With `sorted_indices`, `experts` is `[rows]` and in ascending order.
    """

    DIVIDES = True

    def __call__(self, x: mx.array, experts: mx.array, *, sorted_indices: bool = False) -> mx.array:
        raise NotImplementedError

    def matrices(self) -> mx.array:
        """All matrices `[experts, out, in]` as floating-point numbers."""
        raise NotImplementedError

    @property
    def changeable(self) -> bool:
        """Whether `matrices()` may differ at the next call (with an adapter it may), so that no caller may keep it."""
        return False

    @property
    def runs(self) -> list[int]:
        """As `Linear.runs`; with more than one, tokens come in their own order, and not sorted by expert."""
        return []

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        forms = {stored_quantization(leaf, size[-1], headers, config) for leaf, size in leaf_shapes(tree, shape)}
        if len(forms) > 1:
            raise WeightsError(
                f"{next(leaves(tree)).name}: the experts of a layer are quantized differently, which is not supported"
            )
        form = forms.pop()
        width = shape[-1]
        assert isinstance(width, int)
        if form is None and all(leaf.name in headers for leaf in leaves(tree)):
            return Choice(BareExperts, {})
        return Choice(PlainExperts, {}) if form is None else Choice(QuantizedExperts, form.scope(width))


@dataclass
class PlainExperts(ExpertLinear):
    """Experts with floating-point weights `[experts, out, in]`."""

    weight: mx.array = tensor("weight", "$0", "$1")
    bias: mx.array | None = tensor("bias", "$0", when="bias")
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, experts: mx.array, *, sorted_indices: bool = False) -> mx.array:
        return self.ops.gather_linear(x, self.weight, experts, self.bias, sorted_indices=sorted_indices)

    def matrices(self) -> mx.array:
        return self.weight


@dataclass
class BareExperts(PlainExperts):
    """Experts stored as one parameter, without `.weight` behind its name: as transformers 5 holds them in memory."""

    weight: mx.array = tensor("", "$0", "$1")


@dataclass
class QuantizedExperts(QuantizedFields, ExpertLinear):
    """Experts with packed weights `[experts, out, in * bits / 32]`, and scales (and biases) of groups of inputs."""

    bias: mx.array | None = tensor("bias", "$0", when="bias")
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, experts: mx.array, *, sorted_indices: bool = False) -> mx.array:
        return self.ops.gather_quantized_linear(x, self.quantized, experts, self.bias, sorted_indices=sorted_indices)

    def matrices(self) -> mx.array:
        return self.quantized.dequantize()


@dataclass
class MoE(Module):
    """Router and experts; subclasses name the tensors, their configs say how experts are chosen and weighted.

    Routers are tagged `exact`: they are multiplied in float32, and a matrix of 16 bits would be cast for each token.
    `scoring_func` is softmax or sigmoid; `correction` affects which experts are chosen, but not their routing weights
    (DeepSeek V3).
    """

    glu: GLU
    router: Linear
    gate_up_proj: ExpertLinear
    down_proj: ExpertLinear
    correction: mx.array | None = field(default=None, kw_only=True)
    ops: Ops = provided_ops()
    exchange: Exchange | None = field(default=None, kw_only=True)
    num_experts_per_tok: int = setting()
    norm_topk_prob: bool = setting()
    scoring_func: str = setting(default="softmax")
    n_group: int = setting(default=1)
    topk_group: int = setting(default=1)
    group_members: int = setting(default=1)
    norm_topk_eps: float = setting(default=1e-20)
    routed_scaling_factor: float = setting(default=1.0)

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Experts `[B, L, K]` of each token and routing weights, in float32: close scores must keep their order.

        Where MLX multiplies in TF32 (NVIDIA, M5), numbers of 16 bits are multiplied exactly all the same: they have no
        more bits of mantissa than TF32's 10. Only a router that is stored in float32 is rounded there, for prompts.
        """
        return self.ops.route(self.logits(x), self.correction, self.routing)

    @property
    def routing(self) -> Routing:
        """How experts are chosen by the router's logits, as plain data."""
        return Routing(
            chosen=self.num_experts_per_tok,
            scoring=self.scoring_func,
            normalized=self.norm_topk_prob,
            eps=self.norm_topk_eps,
            factor=self.routed_scaling_factor,
            groups=self.n_group,
            kept=self.topk_group,
            members=self.group_members,
        )

    def logits(self, x: mx.array) -> mx.array:
        """What the router makes of `x`, `[B, L, E]` in float32, before it is turned into scores."""
        return self.router(x.astype(mx.float32)).astype(mx.float32)

    def __call__(self, x: mx.array) -> mx.array:
        """Weighted sum of the chosen experts' outputs, `[B, L, hidden_size]` to the same shape."""
        return self.mixed(x, *self.route(x))

    def mixed(self, x: mx.array, experts: mx.array, routing_weights: mx.array) -> mx.array:
        """The outputs of `experts` `[B, L, K]` for `x`, weighed and added."""
        return self.complete(self.ops.mixture(self.outputs(x, experts), routing_weights))

    def complete(self, y: mx.array) -> mx.array:
        """A sum over experts, of which each rank may have a part of the numbers: the sum over ranks as well."""
        return y if self.exchange is None else self.exchange.total(y)

    def outputs(self, x: mx.array, experts: mx.array) -> mx.array:
        """What each token's `experts` `[B, L, K]` make of it, `[B, L, K, hidden_size]`."""
        # With few rows each one gathers its experts' matrices; with many, sorting them reads each matrix once.
        sorts = experts.size >= SORTED_FROM and not self.ops.gathers_by_expert
        sorts = sorts and not self.gate_up_proj.runs and not self.down_proj.runs
        outputs = self.sorted(x, experts) if sorts else self.feed(mx.expand_dims(x, (2, 3)), experts)
        return mx.squeeze(outputs, -2)

    def feed(self, rows: mx.array, experts: mx.array, *, sorted_indices: bool = False) -> mx.array:
        """Outputs `[..., 1, hidden_size]` of `experts` `[...]` for `rows` `[..., 1, hidden_size]`."""
        hidden = self.glu(self.gate_up_proj(rows, experts, sorted_indices=sorted_indices))
        return self.down_proj(hidden, experts, sorted_indices=sorted_indices)

    def sorted(self, x: mx.array, experts: mx.array) -> mx.array:
        """Like `feed`, but expert by expert: each matrix is read once for all its rows; `[B, L, K, 1, hidden_size]`."""
        chosen = experts.flatten()
        # Row i of the flattened choices belongs to token i // K.
        order = mx.argsort(chosen)
        rows = self.ops.take_rows(x.reshape(-1, 1, x.shape[-1]), order // experts.shape[-1])
        outputs = self.feed(rows, chosen[order], sorted_indices=True)
        # Back to the order of the tokens.
        return self.ops.put_rows(outputs, order).reshape(*experts.shape, 1, -1)


@dataclass
class SwitchMoE(MoE):
    """Experts of width `moe_intermediate_size` under the names most families use.

    Or stacked, by mlx-lm or by transformers 5 (which puts gate and up side by side).
    """

    router: Linear = tensor("gate", "num_experts", "hidden_size", exact=True)
    gate_up_proj: ExpertLinear = tensor(
        "experts.{num_experts}.{gate,up}_proj|switch_mlp.{gate,up}_proj[num_experts]|experts.gate_up_proj[num_experts]"
        "|experts.{gate,up}_proj[num_experts]",
        (EXPERT, EXPERT),
        "hidden_size",
    )
    down_proj: ExpertLinear = tensor(
        "experts.{num_experts}.down_proj|switch_mlp.down_proj[num_experts]|experts.down_proj[num_experts]",
        "hidden_size",
        EXPERT,
    )
