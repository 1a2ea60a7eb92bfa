"""`runner serve` as a process: its first lines, its options and config file, SIGTERM."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from places import ROOT
from served_process import served
from told_backend import waited

from runner.cli import main

FIXTURE = ROOT / "tests" / "fixtures" / "llama" / "llama-gqa"


def test_first_lines_a_request_and_sigterm_during_a_stream(tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text(
        f'model = ["{FIXTURE}"]\nport = 0\nalias = ["mine={FIXTURE}"]\nmax-queue = 7\n'
    )
    key = tmp_path / "key"
    key.write_text("from-a-file\n")
    with served("--config", str(tmp_path / "serve.toml"), "--api-key-file", str(key)) as (process, address, lines):
        assert re.match(r"http://127\.0\.0\.1:\d+$", address)
        text = "".join(lines)
        assert "curl" in text and "openai:" in text and "from-a-file" not in text
        headers = {"authorization": "Bearer from-a-file"}
        if shutil.which("curl"):
            (shown,) = re.findall("curl .*", text)
            words = {**os.environ, "RUNNER_API_KEY": "from-a-file"}
            answered = subprocess.run(["sh", "-c", shown], env=words, capture_output=True, check=True, timeout=60)
            assert json.loads(answered.stdout)["choices"][0]["message"]["role"] == "assistant"
        names = [each["id"] for each in httpx2.get(f"{address}/v1/models", headers=headers).json()["data"]]
        assert names[0] == "llama-gqa" and "mine" in names
        body = {"prompt": "abc", "max_tokens": 40, "stream": True, "temperature": 0, "ignore_eos": True}
        with httpx2.stream("POST", f"{address}/v1/completions", json=body, headers=headers, timeout=30) as sent:
            pieces = sent.iter_text()
            got = next(pieces)
            process.send_signal(signal.SIGTERM)
            got += "".join(pieces)
        assert got.endswith("data: [DONE]\n\n"), "the stream was cut"
        assert process.wait(30) == 0
    assert '"path": "/v1/completions"' in "".join(lines)


def test_a_socket_for_this_account_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with served(str(FIXTURE), "--uds", str(path), RUNNER_API_KEY="of-the-environment") as (_process, address, lines):
        assert address == f"unix:{path}" and path.stat().st_mode & 0o777 == 0o600
        with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(path))) as client:
            assert client.get("http://localhost/health").json()["status"] == "ok"
            statuses = [
                client.get("http://localhost/v1/models", headers={"x-api-key": key}).status_code
                for key in ("of-the-environment", "another")
            ]
            assert statuses == [200, 401] and "of-the-environment" not in "".join(lines)
    assert not path.exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--host", "0.0.0.0"], "--no-auth"),
        (["--cache-size", "1GB"], "--cache-dir"),
        (["--api-key", "x"], "--api-key"),
        (["--alias", "x"], "NAME=MODEL"),
        (["--alias", "x=other"], "other"),
        (["--root-path", "x"], "--root-path"),
        (["--pin", "other"], "--pin other"),
        (["--keep-alive", "soon"], "no duration"),
        (["--memory", "10kB"], "0.0 MB are allowed"),
        (["--api-key-file", "/nonexistent"], "/nonexistent"),
        (["--config", "/nonexistent.toml"], "/nonexistent.toml"),
        (["--host", "999.1.1.1", "--no-auth"], "999.1.1.1"),
    ],
)
def test_options_that_do_not_go(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(FIXTURE), *words]) != 0
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("ports = 1", "did you mean 'port'"),
        ("port = 'x'", "whole number"),
        ("api-key = 'x'", "'api-key' is no option"),
        ("[port]\nx = 1", "port must be a value"),
        ("port = ", "not valid TOML"),
        ("config = 'x'", "'config' is no option"),
    ],
)
def test_config_files_that_do_not_go(text: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text(text)
    assert main(["serve", str(FIXTURE), "--config", str(tmp_path / "c.toml")]) != 0
    assert named in capsys.readouterr().err


def test_several_models_in_one_memory(tmp_path: Path) -> None:
    """The first and those that are pinned are loaded at the start, others when they are asked for."""
    others = [tmp_path / name for name in ("second", "third")]
    for other in others:
        other.symlink_to(FIXTURE)
    words = (str(FIXTURE), *map(str, others), "--pin", str(others[1]), "--port", "0", "--keep-alive", "0.1s")
    with served(*words) as (_process, address, lines):

        def loaded() -> list[str]:
            return [each["id"] for each in httpx2.get(f"{address}/v1/models").json()["data"] if each["loaded"]]

        assert {"llama-gqa", "third"} <= set(loaded()) and "second" not in loaded()
        body = {"model": "second", "prompt": "abc", "max_tokens": 2}
        assert httpx2.post(f"{address}/v1/completions", json=body).status_code == 200
        assert waited(lambda: "second" not in loaded() and "third" in loaded())
    assert any('"event": "unloaded", "model": "second"' in line for line in lines)


def test_other_commands_import_none_of_it() -> None:
    extra = ("starlette", "uvicorn", "msgspec", "prometheus_client", "llguidance")
    code = f"import sys, runner, runner.cli.app\nprint([name for name in {extra} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_was_computed_outlives_the_server(tmp_path: Path) -> None:
    """SIGTERM puts it on disk, that of an answer under way included; the next server gives the same text from there."""
    words = (str(FIXTURE), "--port", "0", "--cache-dir", str(tmp_path / "kept"))
    body = {"prompt": [1, *range(20, 60)], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    long = body | {"prompt": [1, *range(30, 60)], "max_tokens": 60, "stream": True}
    found = []
    for _ in range(2):
        with served(*words) as (process, address, _lines):
            answer = httpx2.post(f"{address}/v1/completions", json=body, timeout=30).json()
            found.append((answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]))
            with httpx2.stream("POST", f"{address}/v1/completions", json=long, timeout=30) as stream:
                lines = stream.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                assert list(lines)[-2] == "data: [DONE]"
            assert process.wait(30) == 0
    assert found == [(found[0][0], 0), (found[0][0], 40)]
    # One of each prompt; of the answer that was under way, as far as each server came.
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) in (2, 3)
