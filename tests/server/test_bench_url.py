"""`runner bench --url` against a server whose pace is known."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from told_backend import Running, ToldBackend

from runner.bench.serving import Asked, Load, summed
from runner.cli import main
from runner.server.backend import Order


def test_a_server_of_known_pace(capsys: pytest.CaptureFixture[str]) -> None:
    backend = ToldBackend(lambda prompt, order: "x" * 100)
    backend.pause = 0.01
    words = ["--num-prompts", "6", "--max-concurrency", "2", "--random-input-len", "20", "--random-output-len", "8"]
    with Running([backend]) as server:
        assert main(["bench", "--url", server.url, *words, "-o", "json", "--goodput", "ttft:5000"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["completed"] == 6 and result["failed"] == 0 and result["model_id"] == "told"
        assert result["total_output_tokens"] == 48 and result["total_input_tokens"] == 120
        assert 10 <= result["median_itl_ms"] < 60 and 80 <= result["median_e2el_ms"] < 500
        assert result["request_goodput"] == result["request_throughput"]
        assert main(["bench", "told", "--url", f"{server.url}/v1", *words, "--request-rate", "50"]) == 0
        assert "TTFT" in capsys.readouterr().out
        assert main(["bench", "other", "--url", server.url, *words]) != 0


def test_words_for_a_server_that_takes_no_ids(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []

    def answer(prompt: str, order: Order) -> str:
        seen.append(prompt)
        return "x" * 10

    words = ["--num-prompts", "3", "--random-input-len", "5", "--random-output-len", "4", "--text-prompts"]
    with Running([ToldBackend(answer)]) as server:
        assert main(["bench", "--url", server.url, *words, "-o", "json"]) == 0
        assert json.loads(capsys.readouterr().out)["completed"] == 3
    assert len(set(seen)) == 3 and all(prompt[0] == " " and len(prompt.split()) == 5 for prompt in seen)
    assert main(["bench", "--text-prompts"]) == 2
    assert "--text-prompts needs a server" in capsys.readouterr().err


def test_the_client_loads_nothing_that_computes() -> None:
    found = "import sys, runner.cli.bench, runner.bench.serving; print('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", found], capture_output=True, text=True).stdout == "False\n"


def test_the_words_mean_what_vllm_means() -> None:
    asked = Asked(10.0, [10.5, 10.6, 10.8], 10.8, 7, 3)
    result = summed(Load("x", goals={"ttft": 400.0}), "m", [asked, Asked(0.0, error="status 429")], 2.0)
    assert result["mean_ttft_ms"] == pytest.approx(500) and result["mean_tpot_ms"] == pytest.approx(150)
    assert result["mean_itl_ms"] == pytest.approx(150) and result["mean_e2el_ms"] == pytest.approx(800)
    assert result["output_throughput"] == 1.5 and result["total_token_throughput"] == 5.0
    assert result["failed"] == 1 and result["errors"] == ["status 429"] and result["request_goodput"] == 0.0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--num-prompts", "3"], "--num-prompts needs a server"),
        (["--url", "ftp://x"], "--url"),
        (["--url", "http://127.0.0.1:1"], "cannot be reached"),
        (["--url", "http://127.0.0.1:1", "--goodput", "speed:3"], "--goodput"),
        (["--url", "http://127.0.0.1:1", "-o", "csv"], "-o csv"),
        (["--url", "http://127.0.0.1:1", "--request-rate", "0"], "--request-rate"),
    ],
)
def test_what_does_not_go(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert named in capsys.readouterr().err
