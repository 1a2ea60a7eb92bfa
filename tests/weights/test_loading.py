"""Memory while a model is read: the model and little more, by MLX's count and by the kernel's."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from places import ROOT, TESTS
from sources import NAMES, Info

from runner.checkpoint.directory import write_checkpoint
from runner.config.base import Config
from runner.families import find
from runner.nn.linear import Linear
from runner.weights import loading
from runner.weights.plan import plan
from runner.weights.tags import weight
from runner.weights.tree import leaf_shapes

SMALL = TESTS / "fixtures" / "llama" / "llama-gqa"
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4,
    "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 16000, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
LOADER = """
import json, resource, sys
from pathlib import Path
import mlx.core as mx
from runner.engine.loaded import open_loaded
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
open_loaded(Path(sys.argv[1])).logits([1])
before = peak()
mx.reset_peak_memory()
engine = open_loaded(Path(sys.argv[2]), dtype=sys.argv[3] or None)
print(json.dumps([peak() - before, mx.get_peak_memory(), engine.nbytes]))
"""


class Made:
    """A source whose tensors are made when they are read."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: mx.Dtype) -> None:
        self.dtype = dtype
        sizes = {name: mx.zeros(0, dtype).itemsize * shape[0] * shape[1] for name, shape in shapes.items()}
        self.headers = {name: Info(NAMES[dtype], shape, sizes[name]) for name, shape in shapes.items()}

    def read(self, name: str) -> mx.array:
        return mx.full(self.headers[name].shape, len(name), dtype=self.dtype)


@dataclass
class Fused:
    qkv: Linear = weight("{q,k,v,o}", (1024,) * 4, "hidden_size")


@dataclass
class Stacked:
    experts: mx.array = weight("experts.{vocab_size}.w", 512, "hidden_size")


@pytest.mark.skipif(mx.cuda.is_available(), reason="MLX frees buffers there when kernels end, later")
@pytest.mark.parametrize("dtype", [None, mx.float32])
@pytest.mark.parametrize(
    ("cls", "shapes"),
    [
        (Fused, {f"{name}.weight": (1024, 2048) for name in "qkvo"}),
        (Stacked, {f"experts.{i}.w": (512, 2048) for i in range(16)}),
    ],
)
def test_a_fused_field_is_held_once_and_its_parts_one_by_one(
    cls: type, shapes: dict[str, tuple[int, ...]], dtype: mx.Dtype | None
) -> None:
    source = Made(shapes, mx.bfloat16)
    config = Config(model_type="t", vocab_size=16, hidden_size=2048, num_hidden_layers=1, num_attention_heads=1)
    layout = plan(cls, config, source.headers)
    part = max(info.nbytes for info in source.headers.values())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = loading.build(layout, source, dtype=dtype)
    field = loading.nbytes(model)
    assert field == sum(info.nbytes for info in source.headers.values()) * (1 if dtype is None else 2)
    assert mx.get_peak_memory() - before < field + (1.1 if dtype is None else 3.1) * part  # a part, and it cast


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize(
    ("stored", "dtype"), [(mx.bfloat16, ""), (mx.bfloat16, "float32"), (mx.float32, "bfloat16")], ids=str
)
def test_loading_holds_little_more_than_the_model(tmp_path: Path, stored: mx.Dtype, dtype: str) -> None:
    """The head is a fifth of the model and its last field: cast at the end, it would be in memory three times.

    Where it is moved into large pages, it is there twice for a moment.
    """
    config_class, model_class = find(LLAMA)
    arrays = plan(model_class, config_class.from_dict(LLAMA), None).arrays()
    stores = (leaf_shapes(array.tree, array.sizes) for array in arrays)
    tensors = ((leaf.name, mx.zeros(shape, stored)) for leaf, shape in itertools.chain.from_iterable(stores))
    write_checkpoint(tmp_path / "model", tensors, LLAMA)
    command = [sys.executable, "-c", LOADER, str(SMALL), str(tmp_path / "model"), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, cwd=ROOT)
    resident, counted, held = json.loads(done.stdout)
    assert held > 150e6
    assert counted < 1.25 * held
    assert resident < 1.25 * held
