"""A model that the machine can't hold is refused from its headers, with both numbers and before anything is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from places import TESTS

from runner import resources
from runner.bench.models import random_weights
from runner.checkpoint.model_files import open_files
from runner.engine import loaded
from runner.engine.loaded import assemble
from runner.errors import UsageError
from runner.families import find
from runner.weights import loading
from runner.weights.plan import plan

CASES = ["llama/llama-gqa", "families/gemma2-base", "families/qwen3_moe-base", "families/gpt_oss-mxfp4"]


@dataclasses.dataclass(frozen=True)
class Header:
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Unread:
    """A checkpoint of headers alone."""

    def __init__(self, headers: Mapping[str, Header]) -> None:
        self.headers = headers

    def read(self, name: str) -> mx.array:
        raise AssertionError(f"{name} was read")


def test_a_shape_larger_than_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 3.1 8B in bfloat16, 16.06 GB, on a machine with 16 GB."""
    raw = resources.read("shapes", "Llama-3.1-8B")
    source = Unread(stored(raw))
    monkeypatch.setattr(loaded, "capacity", lambda device: 16_000_000_000)
    with pytest.raises(UsageError, match=r"the weights take 16.1 GB, and there are 16.0 GB of memory"):
        assemble(raw, source, dtype="bfloat16")
    with pytest.raises(UsageError, match=r"the weights take 32.1 GB"):  # what is asked for counts, not what is stored
        assemble(raw, source, dtype="float32")


def stored(raw: dict[str, Any]) -> dict[str, Header]:
    made = random_weights(raw, dtype="bfloat16").headers
    return {name: Header(header.dtype, header.shape, header.nbytes) for name, header in made.items()}


@pytest.mark.parametrize("path", CASES)
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_the_number_is_what_a_model_takes(path: str, dtype: str | None) -> None:
    files = open_files(Path(TESTS / "fixtures" / path))
    config_class, model_class = find(files.config)
    layout = plan(model_class, config_class.from_dict(files.config), files.source.headers)
    loaded = assemble(files.config, files.source, dtype=dtype)
    wanted = {None: None, "float32": mx.float32, "bfloat16": mx.bfloat16}[dtype]
    if dtype is None and loaded.device.activations is None:
        wanted = loaded.dtype
    planned = loading.planned_nbytes(layout, files.source.headers, wanted)
    # Frequencies and other constants, which no file has, come on top.
    assert planned <= loaded.nbytes <= 1.05 * planned
