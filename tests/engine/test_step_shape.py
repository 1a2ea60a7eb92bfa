"""Which models one kernel takes, as read off their modules; nothing of it needs a GPU."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest
from places import TESTS

from runner.engine.loaded import open_loaded
from runner.engine.step_shape import read, rows_of
from runner.families import FAMILIES
from runner.ops.cuda.shape import Form, Unfit, divide

FITS = {
    "families/qwen3-base": {"head_norms": True, "rope_dims": 16},
    "families/qwen2-base": {"biased": (True, False, False, False, False)},
    "families/granite-bias": {
        "attention_scale": 0.5,
        "residual_scale": 0.6,
        "logit_scale": 0.5,
        "embedding_scale": 3.0,
    },
    "families/smollm3-base": {"ropes": 1},
    "families/arcee-base": {"gated": False},
    "families/glm-base": {"traditional": True},
    "families/gemma-base": {"activation": "gelu_tanh"},
    "llama/llama-mlx-4bit": {"forms": (Form(4, 32),) * 5, "embedding": Form(4, 32)},
    "llama/llama-mlx-tied": {"embedding": Form(8, 64)},
    "llama/llama-float16": {"weights": "float16"},
    "llama/llama-rope-yarn": {"ropes": 1},
}
REFUSED = {
    "families/gpt_oss-base": "attention of its own",
    "families/deepseek_v3-base": "LatentAttention",
    "families/phi3-longrope": "depend on the length",
    "families/lfm2-base": "GatedConv",
    "llama/llama-mlx-mixed": "JoinedLinear",
}

KINDS = {
    "one kernel; several sequences by a graph of kernels": "one kernel",
    "a graph of kernels: mixtures by softmax": "a graph",
    "operations: layers of another form (norms behind sublayers, LayerNorm, attention beside the MLP)": (
        r"[a-z]Block|\bBlock\."
    ),
    "operations: a pass of its own (ALiBi, inputs of each layer, keys of other layers)": r"\.run$",
    "operations: heads or attention of its own (norms over all heads, gates, sinks, temperatures, indexers)": (
        r" Attention\.|SinkAttend"
    ),
    "operations: latent attention": "LatentAttention",
    "operations: recurrences and convolutions": r"SingleBlock|Mamba|GatedConv|GatedDeltaNet",
    "operations: mixtures of another kind (sigmoid scores, shared experts, biases)": r"MoE\.",
    "operations: an activation of its own": r"\(MLP\)$",
}
"""Rows of the table in docs/cuda.md, and what `way` says of their families; of several that match, the last."""
FAMILY = {"internlm3": "internlm3-v5", "llama": "../llama/llama-gqa", "mistral": "../llama/mistral-window"}
"""Fixtures that stand for families whose first one would not."""


def table() -> dict[str, str]:
    """Each family's row."""
    page = (TESTS.parent / "docs" / "cuda.md").read_text()
    rows = [
        row.split("|")
        for row in page.splitlines()
        if row.startswith(("| one kernel;", "| a graph of", "| operations: "))
    ]
    assert [row[1].strip() for row in rows] == list(KINDS)
    named = [(family.strip(), row[1].strip()) for row in rows for family in row[2].split(",")]
    assert len(named) == len(dict(named)), "a family has one row"
    return dict(named)


def way(family: str) -> str:
    """How steps of a family's fixture are computed, or the reason why by operations."""
    folder = TESTS / "fixtures" / "families"
    first = sorted(path for path in folder.iterdir() if path.name.startswith(f"{family}-"))
    loaded = open_loaded(folder / FAMILY[family] if family in FAMILY else first[0], dtype="bfloat16")
    assert loaded.config.model_type == family
    try:
        shape, _ = read(loaded.model, loaded.dtype)
    except Unfit as error:
        return str(error)
    if shape.experts:
        return "a graph"
    return "one kernel" if divide(shape, 132, 232448).blocks else ""


def test_the_page_has_a_row_for_each_family() -> None:
    assert set(table()) == set(FAMILIES)


SOME = ("qwen3", "mixtral", "olmo2", "bloom", "olmoe", "kimi_k2", "mamba2", "glm4_moe", "apertus")


@pytest.mark.parametrize(
    "family", [name if name in SOME else pytest.param(name, marks=pytest.mark.long) for name in sorted(FAMILIES)]
)
def test_the_page_says_how_a_familys_steps_are_computed(family: str) -> None:
    said = way(family)
    (*_, kind) = [kind for kind, pattern in KINDS.items() if re.search(pattern, said)]
    assert table()[family] == kind, said


@pytest.mark.parametrize("path", FITS)
def test_models_that_fit(path: str) -> None:
    loaded = open_loaded(TESTS / "fixtures" / path)
    shape, tensors = read(loaded.model, loaded.dtype)
    for name, value in FITS[path].items():
        assert getattr(shape, name) == value
    assert divide(shape, 132, 232448).blocks > 0
    assert len(tensors.layers) == shape.layers == loaded.config.num_hidden_layers
    for layer in tensors.layers:
        for matrix, rows, columns in zip(layer.products, shape.rows, shape.columns, strict=False):
            packed = shape.forms[0].bits or 32
            assert matrix.weight.shape == (rows, columns * packed // 32)


def test_what_is_read_in_one_thread_can_be_used_in_another() -> None:
    """`runner bench` prepares a model's kernels in the thread that owns the device, and decodes in its own."""
    loaded = open_loaded(TESTS / "fixtures" / "families" / "qwen3_moe-base")
    _, tensors = loaded.run(lambda: read(loaded.model, loaded.dtype))
    assert all(layer.router is not None for layer in tensors.layers)
    mx.eval([layer.router for layer in tensors.layers])


@pytest.mark.parametrize("path", REFUSED)
def test_models_that_do_not_fit(path: str) -> None:
    loaded = open_loaded(TESTS / "fixtures" / path)
    with pytest.raises(Unfit, match=REFUSED[path]):
        read(loaded.model, loaded.dtype)


def test_frequencies_are_those_of_the_layer() -> None:
    loaded = open_loaded(TESTS / "fixtures/llama/llama-rope-llama3")
    _, tensors = read(loaded.model, loaded.dtype)
    ((turns, factor),) = tensors.frequencies
    rope = loaded.model.layers[0].self_attn.rope  # type: ignore[attr-defined]
    assert factor == rope.factor
    np.testing.assert_allclose(turns, 1 / np.array(rope.freqs), rtol=1e-6)


def test_a_subclass_that_computes_otherwise_is_refused() -> None:
    loaded = open_loaded(TESTS / "fixtures/families/qwen3-base")
    layer = loaded.model.layers[0]  # type: ignore[attr-defined]

    class Twice(type(layer)):  # type: ignore[misc]
        def __call__(self, x: mx.array, *rest: object) -> mx.array:
            result: mx.array = super().__call__(x, *rest) * 2
            return result

    layer.__class__ = Twice
    with pytest.raises(Unfit, match=r"Twice\.__call__"):
        read(loaded.model, loaded.dtype)


def test_where_the_rows_of_a_window_lie() -> None:
    loaded = open_loaded(TESTS / "fixtures/llama/mistral-window", dtype="float32")
    caches = loaded.new_caches()
    if caches[0].storage is not loaded.device.ops.storage or loaded.device.ops.storage.joins is False:
        pytest.skip("rows are stored in a form of this device's own")
    keys = mx.zeros((1, 2, 600, 8))
    for cache in caches:
        cache.append(keys, keys)
        cache.append(keys[:, :, :1], keys[:, :, :1])
    first = rows_of(caches)[0]
    assert first.window == caches[0].window and first.shift == caches[0].start
    with pytest.raises(Unfit, match="several sequences"):
        two = loaded.new_caches()
        for cache in two:
            cache.append(mx.zeros((2, 2, 1, 8)), mx.zeros((2, 2, 1, 8)))
        rows_of(two)


def test_a_mixture_is_read_and_left_to_the_kernels_for_several_sequences() -> None:
    loaded = open_loaded(TESTS / "fixtures/families/qwen3_moe-base")
    shape, tensors = read(loaded.model, loaded.dtype)
    layer = tensors.layers[0]
    assert shape.experts and 0 < shape.chosen <= shape.experts
    assert layer.router is not None and layer.router.shape == (shape.experts, shape.hidden)
    assert layer.products[2].weight.shape == (shape.experts, 2 * shape.intermediate, shape.hidden)
    with pytest.raises(Unfit, match="mixture"):
        divide(shape, 132, 232448)
