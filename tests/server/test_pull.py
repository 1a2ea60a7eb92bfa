"""Ollama's /api/pull, through its client, from a hub of our own; and that nothing is fetched unless it was allowed."""

from __future__ import annotations

import time
from pathlib import Path

import httpx2
import ollama
import pytest
from fake_hub import COMMIT, environment_of, fake_hub
from places import ROOT
from served_process import served
from told_backend import waited

FIXTURE = ROOT / "tests" / "fixtures" / "llama" / "llama-gqa"
NAMES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def test_a_model_is_fetched_and_served(tmp_path: Path) -> None:
    files = {name: (FIXTURE / name).read_bytes() for name in NAMES}
    with fake_hub() as hub:
        hub.add("org/name", files)
        hub.add("org/broken", {**files, "model.safetensors": b"x" * 2000})
        hub.add("org/slow", {**files, "model.safetensors": b"x" * (40 << 20)})
        words = (str(FIXTURE), "--port", "0", "--allow-pull")
        with served(*words, **environment_of(tmp_path, hub.endpoint)) as (_process, address, lines):
            client = ollama.Client(address)
            steps = list(client.pull("hf.co/org/name", stream=True))
            assert [step.status for step in steps if step.total is None] == ["pulling manifest", "success"]
            told = [(step.completed, step.total) for step in steps if step.total]
            size = len(files["model.safetensors"])
            assert told[-1] == (size, size)
            answers = [
                client.generate(model, "abc", raw=True, options={"temperature": 0, "num_predict": 8}).response
                for model in ("llama-gqa", "org/name", "hf.co/org/name")
            ]
            assert len(set(answers)) == 1
            assert "org/name" in [model.model for model in client.list().models]
            hub.requests.clear()
            assert client.pull("org/name").status == "success", "once more: brought up to date"
            assert f"GET /org/name/resolve/{COMMIT}/model.safetensors" not in hub.requests

            for name, why in (
                ("org/none", "org/none"),
                ("org/broken", "safetensors"),
                ("../../etc", "hub id"),
                (str(FIXTURE), "hub id"),
                ("llama3.2", "hub id"),
                ("http://127.0.0.1:1/org/name", "fetched from there alone"),
            ):
                for stream in (False, True):
                    with pytest.raises(ollama.ResponseError, match=why):
                        list(client.pull(name, stream=True)) if stream else client.pull(name)
            assert "is there" not in "".join(lines)

            hub.pause = 0.3
            body = {"model": "org/slow"}
            with httpx2.stream("POST", f"{address}/api/pull", json=body, timeout=30) as stream:
                assert any("completed" in line for line in stream.iter_lines())
            began = time.monotonic()
            hub.pause = 0
            assert waited(lambda: any('"path": "/api/pull", "status": 200' in line for line in lines[-3:]))
            assert client.pull("org/name").status == "success", "who has left does not hold up others"
            assert time.monotonic() - began < 20
            assert list((tmp_path / "hf").rglob("*.runner.incomplete")), "what has come is kept for the next time"


def test_nothing_is_fetched_unless_it_was_allowed(tmp_path: Path) -> None:
    with fake_hub() as hub:
        hub.add("org/name", {name: (FIXTURE / name).read_bytes() for name in NAMES})
        with served(str(FIXTURE), "--port", "0", **environment_of(tmp_path, hub.endpoint)) as (
            _process,
            address,
            _lines,
        ):
            for stream in (False, True):
                sent = httpx2.post(f"{address}/api/pull", json={"model": "org/name", "stream": stream})
                assert sent.status_code == 403 and "--allow-pull" in sent.json()["error"]
            missing = httpx2.post(f"{address}/api/generate", json={"model": "org/name", "prompt": "x"})
            assert missing.status_code == 404
            for method, path in (("DELETE", "delete"), ("POST", "copy"), ("POST", "create"), ("POST", "push")):
                sent = httpx2.request(method, f"{address}/api/{path}", json={"model": "llama-gqa"})
                assert sent.status_code == 403 and "cannot make, copy, send or delete" in sent.json()["error"]
        assert hub.requests == []
