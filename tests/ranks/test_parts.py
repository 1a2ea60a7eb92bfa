"""What a rank reads of a model's files: the bytes of its part."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy  # noqa: F401 (loaded before anything is read: its own files would count)
import pytest
from cuda_shapes import HOPPER
from cuts import read_so_far
from places import TESTS

from runner.bench.models import random_weights
from runner.checkpoint.model_files import open_files
from runner.engine.dtypes import choose
from runner.engine.part import Whole
from runner.engine.step_shape import ReadModel, read
from runner.families import find
from runner.ops.cuda.shape import DOWN, HEAD, OUTPUT, Unfit, divide
from runner.ops.device import current
from runner.ops.exchange import Exchange
from runner.ranks.part import Held, held
from runner.ranks.settings import PIPELINE, TENSOR, Settings
from runner.weights import loading
from runner.weights.plan import plan

CONFIG = {
    "model_type": "qwen3_moe", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "head_dim": 2048,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 8192, "moe_intermediate_size": 8192,
    "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 2, "norm_topk_prob": True,
    "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
"""A dense layer and one of experts, whose rows are long: columns of a part lie together by pages."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    source = random_weights(CONFIG)
    mx.save_safetensors(str(folder / "model.safetensors"), {name: source.read(name) for name in source.headers})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def part_of(model: Path, mode: str, rank: int, size: int) -> tuple[Held, mx.Dtype | None]:
    files = open_files(model)
    config_class, model_class = find(files.config)
    config, device = config_class.from_dict(files.config), current()
    dtypes = choose(None, device, files.config, files.source.headers)
    provided = {"ops": device.ops, "activations": dtypes.activations}
    layout = plan(model_class, config, files.source.headers, provided)
    whole = Whole(model_class, layout, config, files.source, provided, dtypes.weights)
    return held(whole, Settings(size, mode, (), "", 0, "", 0.0), Exchange(rank, size)), dtypes.weights


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="what was read, /proc tells")
@pytest.mark.parametrize("mode", [PIPELINE, TENSOR])
def test_a_rank_reads_the_bytes_of_its_part_and_no_others(model: Path, mode: str) -> None:
    whole = (model / "model.safetensors").stat().st_size
    shares = []
    for rank in range(2):
        part, dtype = part_of(model, mode, rank, 2)
        before = read_so_far()
        built = loading.build(part.own.layout, part.own.source, dtype=dtype)
        read = read_so_far() - before
        assert loading.nbytes(built) >= part.nbytes
        assert part.nbytes <= read < part.nbytes + 32_768, (rank, read, part.nbytes)  # headers, once more, by MLX
        shares.append(part.nbytes / whole)
    # By tensors each has half; in a pipeline the experts are three quarters.
    assert max(shares) < 0.55 if mode == TENSOR else 0.95 < sum(shares) < 1.05


@pytest.mark.parametrize("rank", [0, 1])
def test_kernels_are_told_what_is_a_part_of_a_sum(rank: int) -> None:
    """A bias of a sum is one rank's to add; a head that is the table is rank 0's alone, else each has a part of it."""

    def found(path: str) -> ReadModel:
        part, _ = part_of(TESTS / "fixtures" / path, TENSOR, rank, 2)
        model = loading.build(part.own.layout, part.own.source, dtype=mx.bfloat16)
        return read(model, mx.bfloat16, 2)

    tied, mixture, whole = map(found, ("llama/llama-both-biases-tied", "families/qwen3_moe-base", "llama/llama-v1"))
    for one in (tied, mixture, whole):
        shape = one.shape
        assert (shape.ranks, shape.summed, shape.heads) == (2, (True, True), 2)
        assert shape.rows[OUTPUT] == shape.rows[DOWN] == shape.hidden == 32
        assert [m.weight.shape[-1] for m in one.tensors.layers[0].products] == list(shape.columns[:4])
    assert tied.shape.biased == (True, True, True, True, False)
    biases = [matrix.bias is not None for matrix in tied.tensors.layers[0].products]
    assert biases == [True, rank == 0, True, rank == 0]
    assert (tied.shape.intermediate, mixture.shape.intermediate) == (16, 8)
    assert [one.shape.gathered for one in (tied, mixture, whole)] == [False, True, True]
    assert [one.shape.headless for one in (tied, mixture, whole)] == [rank == 1, False, False]
    assert (tied.shape.vocab, tied.shape.rows[HEAD]) == (128, 128)
    assert (mixture.shape.vocab, mixture.shape.rows[HEAD]) == (48, mixture.tensors.head.weight.shape[0]) == (48, 24)
    with pytest.raises(Unfit, match="other ranks"):
        divide(whole.shape, *HOPPER)
