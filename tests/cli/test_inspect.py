"""What `runner inspect` prints of tensors that nothing uses: one name for all layers, and not too many."""

from __future__ import annotations

from runner.cli.inspect import MOST_UNUSED, unused


def test_unused_tensors_of_layers_are_one_name() -> None:
    names = [f"model.layers.{i}.q_proj.input_scale" for i in range(32)]
    assert unused(names) == "model.layers.*.q_proj.input_scale (32 tensors)"
    experts = [f"layers.{i}.experts.{j}.k_scale" for i in range(2) for j in range(4)]
    assert unused([*experts, "a.2.b", "c"]) == "layers.*.experts.*.k_scale (8 tensors), a.*.b, c"


def test_of_many_unused_tensors_a_few_are_named() -> None:
    text = unused([f"x{i}" for i in range(1000)])
    assert text.count("x") == MOST_UNUSED and text.endswith(f"and {1000 - MOST_UNUSED} more")
