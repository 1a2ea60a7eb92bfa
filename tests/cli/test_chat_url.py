"""`runner chat --url`: a chat with a model behind a server, over a real socket."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from told_backend import Running, ToldBackend, tokenizer, waited

from runner.cli import main

THINKING = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think></think>' }}{%- endif -%}{%- endif -%}"
)


def script(prompt: str, _order: object) -> str:
    count = prompt.count("<|im_start|>user")
    answer = f"Answer {count}, with ünïcode."
    return answer if prompt.endswith("</think>") else f"<think>A thought.</think>{answer}"


@pytest.fixture(scope="module")
def told() -> ToldBackend:
    return ToldBackend(script, facts=tokenizer(THINKING))


@pytest.fixture(scope="module")
def server(told: ToldBackend) -> Iterator[Running]:
    with Running([told, ToldBackend(lambda prompt, order: "Another.", name="org/other")], api_key="a-key") as running:
        yield running


def chat(server: Running, *words: str, typed: str = "", key: str | None = "a-key") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runner", "chat", "--url", server.url, *words]
    env = {**os.environ, **({} if key is None else {"RUNNER_API_KEY": key})}
    return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=60, env=env, check=False)


def test_a_conversation(server: Running, told: ToldBackend) -> None:
    done = chat(server, "--temperature", "0.5", "--seed", "3", "-n", "200", "--system", "Be brief.", typed="One\nTwo\n")
    assert (done.returncode, done.stdout) == (0, "Answer 1, with ünïcode.\nAnswer 2, with ünïcode.\n"), done.stderr
    params = told.orders[-1].params
    assert (params.temperature, params.seed, told.orders[-1].max_tokens) == (0.5, 3, 200)
    prompt = told.facts.tokenizer.decode(told.orders[-1].ids, skip_special_tokens=False)
    assert "Be brief." in prompt and "Answer 1" in prompt and "A thought." not in prompt


def test_one_question_and_reasoning_as_in_a_local_chat(server: Running, told: ToldBackend) -> None:
    assert chat(server, "Hello there").stdout == "Answer 1, with ünïcode.\n"
    shown = chat(server, "--thinking", "show", "Hello")
    assert shown.stdout == "Answer 1, with ünïcode.\n" and "A thought." in shown.stderr
    assert "A thought." not in chat(server, "--thinking", "hide", "Hello").stderr
    chat(server, "--thinking", "off", "Hello")
    assert told.facts.tokenizer.decode(told.orders[-1].ids, skip_special_tokens=False).endswith("<think></think>")
    chat(server, "--template-arg", "enable_thinking=false", "Hello")
    assert told.facts.tokenizer.decode(told.orders[-1].ids, skip_special_tokens=False).endswith("<think></think>")
    timed = chat(server, "--verbose", "Hello").stderr
    assert "Prompt: " in timed and "Generation: " in timed and "memory" not in timed
    assert "(--max-tokens reached)" in chat(server, "-n", "5", "Hello").stderr


def test_models_of_the_server(server: Running) -> None:
    assert chat(server, "org/other", "Hello").stdout == "Another.\n"
    assert chat(server, "-m", "org/other", "Hello").stdout == "Another.\n"
    assert chat(server, "org/other", typed="Hello\n/show\n").stdout == "Another.\n"
    refused = chat(server, "nope", "Hello")
    assert refused.returncode == 2 and "no model 'nope': there is told, org/other" in refused.stderr


def test_keys_come_from_the_environment_or_a_file(server: Running, tmp_path: Path) -> None:
    refused = chat(server, "Hello", key=None)
    assert refused.returncode == 2 and "an API key is needed" in refused.stderr
    (tmp_path / "key").write_text("a-key\n")
    assert chat(server, "--api-key-file", str(tmp_path / "key"), "Hello", key=None).returncode == 0
    wrong = chat(server, "Hello", key="another")
    assert "the API key is wrong" in wrong.stderr and "another" not in wrong.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--url", "http://127.0.0.1:1", "Hi"], "cannot be reached"),
        (["--url", "ftp://x", "Hi"], "must be an address"),
        (["--api-key-file", "k", "model", "Hi"], "needs a server"),
        *(
            (["--url", "http://127.0.0.1:1", *words, "Hi"], f"{words[0]} is for models of this machine")
            for words in (["--dtype", "fp32"], ["--adapter", "a"], ["--lookup"], ["--context", "9"], ["--continue"])
        ),
    ],
)
def test_what_does_not_go(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", *words]) in (1, 2)
    assert told in capsys.readouterr().err


def test_a_setting_that_the_api_lacks_is_refused(server: Running, told: ToldBackend) -> None:
    refused = chat(server, typed="/set penalty_window 5\nHello\n")
    assert refused.returncode == 2 and "penalty_window" in refused.stderr and not refused.stdout
    assert chat(server, "--preset", "precise", "Hello").returncode == 0
    assert told.orders[-1].params.temperature < 0.5
    shown = chat(server, typed="/set top_k 7\n/show settings\nHello\n")
    assert "the server's own" in shown.stderr and told.orders[-1].params.top_k == 7


def test_ctrl_c_ends_the_answer_on_the_server(server: Running, told: ToldBackend) -> None:
    told.held.clear()
    command = [sys.executable, "-m", "runner", "chat", "--url", server.url, "Hello"]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "RUNNER_API_KEY": "a-key"},
    )  # fmt: skip
    try:
        assert waited(lambda: told.open == 1, 20)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert waited(lambda: told.open == 0), "its place is free"
    finally:
        told.held.set()
        process.kill()
        process.communicate()


class Strange(BaseHTTPRequestHandler):
    """A server that breaks off its answers, or gives none."""

    answer = b""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(json.dumps({"data": [{"id": "m"}]}).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.reply(self.answer)

    def reply(self, data: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(data)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b'data: {"choices": [{"delta": {"content": "Hal', "ended before the answer did"),
        (b'data: {"error": {"message": "no\\nluck"}}\n\n', "no luck"),
    ],
)
def test_servers_that_break_off(answer: bytes, told: str) -> None:
    handler = type("Bound", (Strange,), {"answer": answer})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as strange:
        thread = threading.Thread(target=strange.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        command = [sys.executable, "-m", "runner", "chat", "--url", f"127.0.0.1:{strange.server_address[1]}", "Hi"]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
        )
        strange.shutdown()
    assert done.returncode == 1 and told in done.stderr, done.stderr
