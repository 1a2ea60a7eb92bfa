"""Steps by kernels on each of two GPUs, which exchange between them."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from places import TESTS
from ranks import over_processes

from runner.ranks.settings import NCCL, TENSOR, Settings

CASES: list[Any] = [
    ("Llama-3.1-8B", None, {"vocab_size": 4096}),
    ("Llama-3.2-1B", "4", {"vocab_size": 4096}),  # the head is the table, on rank 0
    ("Qwen2.5-0.5B", None, {"vocab_size": 4096, "tie_word_embeddings": False}),  # biases
    ("SmolLM2-135M", None, {"vocab_size": 1000}),  # nine heads stay whole on both
    ("Qwen3-30B-A3B", None, {"vocab_size": 4096, "num_experts": 32}),
    ("Qwen3-30B-A3B", "4", {"vocab_size": 4096, "num_experts": 32}),
]

needs_gpu = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs an NVIDIA GPU")


@needs_gpu
@pytest.mark.long  # processes that share a GPU wait for each other
def test_logits_are_as_near_to_float32_as_those_of_operations(tmp_path: Path) -> None:
    """Of eleven sequences; two of them alone get the same bits, and steps begun ahead the same tokens."""
    settings = Settings(2, TENSOR, (), "127.0.0.1", 0, secrets.token_hex(8), 60, NCCL, False)
    worker = TESTS / "helpers" / "rank_steps.py"
    found = over_processes(tmp_path, worker, [json.dumps(case) for case in CASES], settings, patience=240)
    assert len(found) == len(CASES)
    for one in found:
        assert "raised" not in one and "refused" not in one and "lost" not in one, one
        assert one["kernels"] < 1.2 * one["operations"] and one["alone"] and one["ahead"], one
        assert one["sent"][0] == one["sent"][1] > 0, one
