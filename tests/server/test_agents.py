"""The released Claude Code and Codex, without a network: a turn with a tool call each, behind the real HTTP layer.

    npm install --ignore-scripts @anthropic-ai/claude-code@2.1.332 @openai/codex@0.171.0

RUNNER_CLAUDE and RUNNER_CODEX name the binaries in the platform packages, `claude-code-linux-x64/claude` and
`codex-linux-x64/vendor/x86_64-unknown-linux-musl/bin/codex`.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from told_backend import Running, ToldBackend

CLAUDE, CODEX = os.environ.get("RUNNER_CLAUDE"), os.environ.get("RUNNER_CODEX")
CONFIG = """model = "told"
model_provider = "local"
analytics = {{ enabled = false }}
features = {{ plugins = false }}
[model_providers.local]
name = "local"
base_url = "{url}/v1"
wire_api = "responses"
env_key = "LOCAL_KEY"
"""


def backend(work: Path) -> ToldBackend:
    (work / "note.txt").write_text("pineapple\n")

    def script(prompt: str, _order: object) -> str:
        if "<tool_response>\n" in prompt:
            return "The file says: pineapple." if "pineapple\n" in prompt else "Nothing was read."
        if '"Read"' in prompt:
            return f'<tool_call>\n{{"name": "Read", "arguments": {{"file_path": "{work}/note.txt"}}}}\n</tool_call>'
        return '<tool_call>\n{"name": "exec_command", "arguments": {"cmd": "cat note.txt"}}\n</tool_call>'

    return ToldBackend(script, context=400_000)


def run(command: list[str], work: Path, **environment: str) -> str:
    env = {"HOME": str(work), "PATH": os.environ["PATH"], **environment}
    done = subprocess.run(
        command, cwd=work, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.long
@pytest.mark.skipif(CLAUDE is None, reason="RUNNER_CLAUDE is not set")
def test_claude_code(tmp_path: Path) -> None:
    with Running([backend(tmp_path)]) as server:
        command = [str(CLAUDE), "-p", "What is in note.txt?", "--model", "told", "--permission-prompts", "none"]
        said = run(
            command, tmp_path, ANTHROPIC_BASE_URL=server.url, ANTHROPIC_API_KEY="dummy", DISABLE_TELEMETRY="1",
            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        )  # fmt: skip
        assert "The file says: pineapple." in said
        asked = [line for line in server.lines if line["path"] == "/v1/messages"]
        assert [line["status"] for line in asked] == [200, 200], asked


@pytest.mark.long
@pytest.mark.skipif(CODEX is None, reason="RUNNER_CODEX is not set")
def test_codex(tmp_path: Path) -> None:
    with Running([backend(tmp_path)]) as server:
        (tmp_path / "codex").mkdir()
        (tmp_path / "codex" / "config.toml").write_text(CONFIG.format(url=server.url))
        command = [str(CODEX), "exec", "--json", "--ephemeral", "--skip-git-repo-check", "-s", "read-only"]
        said = run([*command, "What is in note.txt?"], tmp_path, CODEX_HOME=str(tmp_path / "codex"), LOCAL_KEY="dummy")
        assert "The file says: pineapple." in said
        assert [line["status"] for line in server.lines] == [200, 200]
