"""A draft model in the server: the same answers, and counts of its guesses in the metrics."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import httpx2
import mlx.core as mx
import pytest
from places import TESTS
from told_backend import Running

import runner
from runner.cli import main
from runner.errors import UsageError
from runner.ops.device import current
from runner.server.local import LocalModels
from runner.server.pool import Pool

FIXTURES = TESTS / "fixtures" / "llama"


def guessed(server: Running) -> dict[str, float]:
    text = httpx2.get(f"{server.url}/metrics").text
    return {
        name: float(value) for name, value in re.findall(r'spec_decode_num_(\w+)_total\{model_name="big"\} (\S+)', text)
    }


def test_answers_are_the_same_and_guesses_are_counted(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "llama-gqa", tmp_path / "other")
    tensors = mx.load(str(tmp_path / "other" / "model.safetensors"))
    assert isinstance(tensors, dict)
    tensors["model.layers.1.mlp.up_proj.weight"] *= -3  # it often guesses wrong
    mx.save_safetensors(str(tmp_path / "other" / "model.safetensors"), tensors)
    body = {"model": "big", "prompt": "abc", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    dtype = None if current().ops.one_form else "float32"
    with runner.load(FIXTURES / "llama-gqa", dtype=dtype) as lm:
        biased = dict.fromkeys(lm.eos_token_ids, -100.0)
        wanted = lm.generate("abc", max_tokens=60, temperature=0, logit_bias=biased).text
    for draft, always in ((FIXTURES / "llama-gqa", True), (tmp_path / "other", False)):
        with runner.load(draft, dtype=dtype) as small:
            local = LocalModels(Pool(1 << 30), dtype=dtype, draft=small)
            local.add("big", FIXTURES / "llama-gqa")
            assert local.pool.engine.budget.weights == small.nbytes, "it counts among what stays"
            with Running([served.backend for served in local.served.values()]) as server:
                assert httpx2.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]["text"] == wanted
                first = guessed(server)
                assert guessed(server) == first
                assert 0 < first["drafts"] < first["draft_tokens"]
                if always:
                    assert first["accepted_tokens"] == first["draft_tokens"] > 40
                else:
                    assert first["accepted_tokens"] < first["draft_tokens"]
                httpx2.post(f"{server.url}/v1/completions", json={**body, "n": 2, "temperature": 1})
                assert guessed(server)["draft_tokens"] > first["draft_tokens"]


def test_another_vocabulary_is_refused_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(FIXTURES / "llama-spm-json")
    with runner.load(other) as small, pytest.raises(UsageError, match=r"cannot guess for big: .* same vocabulary"):
        LocalModels(Pool(1 << 30), draft=small).add("big", FIXTURES / "llama-gqa")
    assert main(["serve", str(FIXTURES / "llama-gqa"), "--draft", other, "--port", "0"]) != 0
    assert "same vocabulary" in capsys.readouterr().err
