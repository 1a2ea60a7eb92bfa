"""The released Claude Code and Codex, without a network, behind the real HTTP layer: told answers, and the demo model.

    npm install --ignore-scripts @anthropic-ai/claude-code@2.1.332 @openai/codex@0.171.0

RUNNER_CLAUDE and RUNNER_CODEX name the binaries in the platform packages, `claude-code-linux-x64/claude` and
`codex-linux-x64/vendor/x86_64-unknown-linux-musl/bin/codex`. The demo model holds 8,192 tokens, which a full prompt of
theirs with tools does not fit: Claude Code is asked for its small one (`--bare`), Codex gets short instructions.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from told_backend import Running, ToldBackend, local

import runner

CLAUDE, CODEX = os.environ.get("RUNNER_CLAUDE"), os.environ.get("RUNNER_CODEX")
MODEL = os.environ.get("RUNNER_DEMO_MODEL")
CONFIG = """model = "{model}"
model_provider = "local"
analytics = {{ enabled = false }}
features = {{ plugins = false }}
[model_providers.local]
name = "local"
base_url = "{url}/v1"
wire_api = "responses"
env_key = "LOCAL_KEY"
"""
pytestmark = pytest.mark.long
claude_only = pytest.mark.skipif(CLAUDE is None, reason="RUNNER_CLAUDE is not set")
codex_only = pytest.mark.skipif(CODEX is None, reason="RUNNER_CODEX is not set")
demo_only = pytest.mark.skipif(MODEL is None, reason="RUNNER_DEMO_MODEL is not set")


def call(name: str, **arguments: str) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def reads(work: Path) -> ToldBackend:
    """Reads note.txt by whichever tool it is offered, and tells what it says."""
    (work / "note.txt").write_text("pineapple\n")

    def script(prompt: str, _order: object) -> str:
        if "<tool_response>\n" in prompt:
            return "The file says: pineapple." if "pineapple\n" in prompt else "Nothing was read."
        if '"Read"' in prompt:
            return call("Read", file_path=f"{work}/note.txt")
        return call("exec_command", cmd="cat note.txt")

    return ToldBackend(script, context=400_000)


def greets(context: int = 400_000) -> ToldBackend:
    return ToldBackend(lambda prompt, order: "Hello there.", context=context)


def run(command: list[str], work: Path, **environment: str) -> tuple[int, str]:
    """Exit code and output."""
    env = {"HOME": str(work), "PATH": os.environ["PATH"], **environment}
    done = subprocess.run(
        command, cwd=work, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout + done.stderr


def claude(server: Running, work: Path, prompt: str, *words: str, model: str = "told", **more: str) -> tuple[int, str]:
    command = [str(CLAUDE), "-p", prompt, "--model", model, "--permission-prompts", "none", *words]
    return run(
        command, work, ANTHROPIC_BASE_URL=server.url, ANTHROPIC_API_KEY="dummy", DISABLE_TELEMETRY="1",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1", **more,
    )  # fmt: skip


def codex(server: Running, work: Path, prompt: str, *words: str, model: str = "told") -> tuple[int, str]:
    (work / "codex").mkdir()
    (work / "codex" / "config.toml").write_text(CONFIG.format(url=server.url, model=model))
    command = [str(CODEX), "exec", "--json", "--ephemeral", "--skip-git-repo-check", "-s", "read-only", *words, prompt]
    return run(command, work, CODEX_HOME=str(work / "codex"), LOCAL_KEY="dummy")


def asked(server: Running) -> list[int]:
    """The statuses of the requests that a client made."""
    return [line["status"] for line in server.lines if line.get("path") in ("/v1/messages", "/v1/responses")]


@claude_only
def test_claude_code(tmp_path: Path) -> None:
    with Running([reads(tmp_path)]) as server:
        code, said = claude(server, tmp_path, "What is in note.txt?")
        assert code == 0 and "The file says: pineapple." in said, said
        assert asked(server) == [200, 200]


@claude_only
def test_claude_code_after_calls_that_fail(tmp_path: Path) -> None:
    calls = [call("Read", file_path=f"{tmp_path}/{name}.txt") for name in ("one", "two")]
    turns = iter(["\n".join(calls), "Both failed."])
    with Running([ToldBackend(lambda prompt, order: next(turns), context=400_000)]) as server:
        code, said = claude(server, tmp_path, "Try")
        assert code == 0 and "Both failed." in said, said
        (served,) = server.serving.models.values()
        backend: Any = served.backend
        prompt = backend.facts.tokenizer.decode(backend.orders[-1].ids, skip_special_tokens=False)
        assert prompt.count("<tool_response>\nError: File does not exist.") == 2, prompt[-700:]
        assert asked(server) == [200, 200]


@claude_only
def test_claude_code_and_a_prompt_that_is_too_long(tmp_path: Path) -> None:
    with Running([greets(context=4096)]) as server:
        code, said = claude(server, tmp_path, "Hi")
        assert code == 1 and "too long" in said, said
        assert asked(server) == [400]


@claude_only
def test_claude_code_when_the_engine_fails_once(tmp_path: Path) -> None:
    backend = greets()
    backend.fails = RuntimeError("once")
    with Running([backend], on_engine_failure="restart") as server:
        code, said = claude(server, tmp_path, "Hi")
        assert code == 0 and "Hello there." in said, said
        assert len(asked(server)) == 2  # the second without a stream


@claude_only
@demo_only
def test_claude_code_with_the_demo_model(tmp_path: Path, demo: Running) -> None:
    limit = {"CLAUDE_CODE_MAX_OUTPUT_TOKENS": "200"}
    code, said = claude(demo, tmp_path, "Say hello.", "--bare", "--output-format", "json", model="demo", **limit)
    answer = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert code == 0 and answer["result"] and not answer["is_error"], said
    assert answer["usage"]["output_tokens"] > 0 and 200 in asked(demo)


@codex_only
def test_codex(tmp_path: Path) -> None:
    with Running([reads(tmp_path)]) as server:
        code, said = codex(server, tmp_path, "What is in note.txt?")
        assert code == 0 and "The file says: pineapple." in said, said
        assert asked(server) == [200, 200]


@codex_only
def test_codex_with_two_calls_at_once(tmp_path: Path) -> None:
    turns = iter([call("exec_command", cmd="echo one") + "\n" + call("exec_command", cmd="echo two"), "Both done."])
    with Running([ToldBackend(lambda prompt, order: next(turns), context=400_000)]) as server:
        code, said = codex(server, tmp_path, "Try")
        assert code == 0 and "Both done." in said, said
        (served,) = server.serving.models.values()
        backend: Any = served.backend
        prompt = backend.facts.tokenizer.decode(backend.orders[-1].ids, skip_special_tokens=False)
        assert prompt.count("<tool_response>\n") == 2 and asked(server) == [200, 200]


@codex_only
def test_codex_and_a_prompt_that_is_too_long(tmp_path: Path) -> None:
    with Running([greets(context=4096)]) as server:
        code, said = codex(server, tmp_path, "Hi")
        assert code == 1 and "context window" in said, said
        assert asked(server) == [400]


@codex_only
def test_codex_when_the_engine_fails_once(tmp_path: Path) -> None:
    backend = greets()
    backend.fails = RuntimeError("once")
    with Running([backend], on_engine_failure="restart") as server:
        code, said = codex(server, tmp_path, "Hi")
        assert code == 0 and "Hello there." in said, said
        assert len(asked(server)) == 2


@codex_only
@demo_only
def test_codex_with_the_demo_model(tmp_path: Path, demo: Running) -> None:
    (tmp_path / "short.md").write_text("You are brief.\n")
    words = ["--disable", "multi_agent", "--disable", "goals", "-c", 'web_search="disabled"']
    words += ["-c", f'model_instructions_file="{tmp_path}/short.md"']
    code, said = codex(demo, tmp_path, "Say hello.", *words, model="demo")
    items = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    (answer,) = [each["item"]["text"] for each in items if each.get("item", {}).get("type") == "agent_message"]
    assert code == 0 and answer and items[-1]["type"] == "turn.completed", said


@pytest.fixture
def demo() -> Iterator[Running]:
    with Running([local(runner.load(str(MODEL)), "demo")]) as server:
        yield server
