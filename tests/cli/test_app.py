"""The command line as a subprocess: stdout, stderr and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from command_line import own, run
from places import TESTS

import runner
from runner.cli.app import COMMANDS

FIXTURES = TESTS / "fixtures" / "llama"
MODEL = str(FIXTURES / "llama-gqa")
GREEDY = ["--temperature", "0", "--max-tokens", "8"]


def answer(*arguments: str, stdin: str | None = None) -> str:
    done = run("generate", MODEL, *arguments, *GREEDY, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [entry.name for entry in COMMANDS])
def test_every_command_has_help_with_an_example(name: str) -> None:
    done = run(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"\nExample:\n  runner {name}" in done.stdout


def test_help_and_import_load_nothing_heavy() -> None:
    heavy = ["mlx", "numpy", "huggingface_hub", "rich.console", "jinja2", "tokenizers", "sentencepiece", "safetensors"]
    code = (
        "import sys\nfrom runner.cli.app import run\nassert run(['--help']) == 0\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "[]"
    assert "Commands:" in done.stdout


def test_an_answer_loads_only_what_it_needs() -> None:
    spared = [
        "numpy",
        "pydantic",  # typer's, for values that are not plain
        "importlib.metadata",
        "runner.checkpoint.gguf",
        "runner.bench",
        "huggingface_hub.hf_api",
        "rich.console",
        "sentencepiece",
        "asyncio",
    ]
    code = (
        "import sys\nfrom runner.cli.app import run\n"
        f"assert run(['generate', {MODEL!r}, 'abc', '--max-tokens', '2', '--temperature', '0.5']) == 0\n"
        f"print([name for name in {spared!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    # The kernels for NVIDIA GPUs are given their numbers by NumPy.
    assert done.stderr.strip().splitlines()[-1] == ("['numpy']" if mx.cuda.is_available() else "[]")


def test_importing_the_package_loads_no_part_of_it() -> None:
    code = "import sys, runner; print(sorted(name for name in sys.modules if name.startswith(('runner', 'mlx'))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "['runner']"


def test_version_and_no_command() -> None:
    assert run("--version").stdout.startswith("runner ")
    done = run()
    assert done.returncode == 2 and done.stdout == "" and "Commands:" in done.stderr


def test_the_prompt_comes_from_argument_dash_or_pipe() -> None:
    wanted = answer("abc def", "--raw")
    assert wanted.endswith("\n") and "\x1b" not in wanted
    assert answer("--raw", stdin="abc def\n") == wanted
    assert answer("-", "--raw", stdin="abc def") == wanted
    assert answer("abc", "--raw", stdin="def") == answer("abc\n\ndef", "--raw")


def test_chat_is_the_default_where_there_is_a_template() -> None:
    asked = answer("abc")
    assert asked == answer("abc", "--chat") and asked != answer("abc", "--raw")
    assert asked != answer("abc", "--system", "be brief")


def test_a_model_without_a_template_says_that_it_continues_the_text(tmp_path: Path) -> None:
    model = tmp_path / "base"
    shutil.copytree(MODEL, model, ignore=shutil.ignore_patterns("chat_template*", "expected*"))
    raw = run("generate", str(model), "abc", "--raw", *GREEDY)
    assert (raw.returncode, raw.stderr) == (0, "")
    done = run("generate", str(model), "abc", *GREEDY)
    assert (done.returncode, done.stdout) == (0, raw.stdout)
    assert done.stderr.count("no chat template") == 1 and "--raw" in done.stderr
    for command in (["generate", str(model), "abc", "--chat"], ["chat", str(model)]):
        refused = run(*command, stdin="abc\n")
        assert refused.returncode in (1, 2) and refused.stdout == "" and "no chat template" in refused.stderr
    # The same model with its template in the file that processors keep it in asks through it.
    source = (FIXTURES / "llama-gqa" / "chat_template.jinja").read_text(encoding="utf-8")
    (model / "chat_template.json").write_text(json.dumps({"chat_template": source}), encoding="utf-8")
    found = run("generate", str(model), "abc", *GREEDY)
    assert (found.stdout, found.stderr) == (answer("abc"), "")


def test_json_is_an_object_a_token() -> None:
    text = answer("abc", "--raw")
    rows = [json.loads(line) for line in answer("abc", "--raw", "--json", "--logprobs", "2").splitlines()]
    assert "".join(row["text"] for row in rows) + "\n" == text
    assert len(rows) == 8 and all(row["logprob"] <= 0 and len(row["top_logprobs"]) == 2 for row in rows)
    assert rows[-1]["finish_reason"] == "length"
    assert rows[-1]["timings"]["generation_tokens"] == 8


def test_verbose_prints_three_lines_on_stderr() -> None:
    done = run("generate", MODEL, "abc", "--raw", "--verbose", *GREEDY)
    lines = own(done.stderr).splitlines()
    assert [line.split(":")[0] for line in lines] == ["Prompt", "Generation", "Peak memory"]
    assert "8 tokens" in lines[1]
    assert done.stdout == answer("abc", "--raw")


def test_a_seed_repeats_and_another_does_not() -> None:
    def sampled(seed: str) -> str:
        done = run("generate", MODEL, "abc", "--raw", "--temperature", "2", "--max-tokens", "16", "--seed", seed)
        return done.stdout

    assert sampled("1") == sampled("1") != sampled("2")


def test_stop_ends_before_the_text() -> None:
    text = answer("abc", "--raw").rstrip("\n")
    stop = text[len(text) // 2 :][:2]
    assert answer("abc", "--raw", "--stop", stop).rstrip("\n") == text[: text.index(stop)]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["generate", "/nowhere", "x"], 1, "/nowhere"),
        (["generate", MODEL, "x", "--tempature", "0"], 2, "--temperature"),
        (["generate", MODEL, "x", "--top-p", "7"], 2, "top_p"),
        (["generate", MODEL, "x", "--max-tokens", "0"], 2, "--max-tokens"),
        (["generate", MODEL], 2, "prompt is empty"),
        (["generate", MODEL, "x", "--raw", "--system", "y"], 2, "--system"),
        (["generate", MODEL, "x", "--logprobs", "2"], 2, "--json"),
        (["generate", MODEL, "x", "--dtype", "int3"], 2, "dtype"),
        (["generate", MODEL, "x " * 400, "--raw"], 2, "128"),
        (["generate", str(FIXTURES / "llama-bare"), "x"], 1, "llama-bare"),
        (["inspect", str(FIXTURES.parent)], 1, "is this a model's directory"),
        (["convert", __file__, "/tmp/never"], 2, "GGUF"),
        (["convert", "/nowhere.gguf", "/tmp/never"], 1, "/nowhere.gguf"),
        (["perplexity", MODEL, "/nowhere.txt"], 2, "/nowhere.txt"),
        (["convert", __file__], 2, "OUT"),
        (["pull", "nameless"], 1, "nameless"),
        (["inspect", "/nowhere"], 1, "/nowhere"),
        (["list", "surplus"], 2, "surplus"),
        (["frobnicate"], 2, "frobnicate"),
        (["genrate"], 2, "generate"),
        (["chat", MODEL, "--temprature", "0"], 2, "--temperature"),
        (["chat", MODEL, "--preset", "nope"], 2, "nope"),
    ],
)
def test_an_error_is_one_line_and_a_code(arguments: list[str], code: int, words: str) -> None:
    done = run(*arguments, HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    said = own(done.stderr)
    assert said.startswith("error: ") and said.count("\n") == 1
    assert words in said


def test_bytes_that_are_no_text_are_refused() -> None:
    done = run("generate", MODEL, "-", stdin=b"caf\xe9")
    assert done.returncode == 2 and "UTF-8" in done.stderr


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    """Gone before the first token: a reader that takes one byte may, or may not, leave before the last is written."""
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "runner", "generate", MODEL, "abc", "--raw", "--temperature", "0"]
    with subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE) as process:
        os.close(writing)
        os.close(reading)
        assert own(process.communicate(timeout=60)[1].decode()) == ""
    assert process.returncode != 0


def test_inspect_reads_headers_alone(tmp_path: Path) -> None:
    report = json.loads(run("inspect", MODEL, "--json").stdout)
    fields = {entry["field"]: entry for entry in report["entries"]}
    fused = fields["layers.0.self_attn.qkv_proj.weight"]
    assert fused["tensors"] == [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    assert sum(entry["bytes"] for entry in report["entries"]) == report["bytes"]
    shown = run("inspect", MODEL)
    assert "layers.0-1" in shown.stdout and "2 alike" in shown.stdout and "\x1b" not in shown.stdout
    assert run("inspect", MODEL, "--all").stdout.count("input_layernorm.weight") >= 4


def test_list_and_pull_without_a_hub(tmp_path: Path) -> None:
    done = run("list", "--json", HF_HUB_CACHE=str(tmp_path), XDG_DATA_HOME=str(tmp_path))
    assert (done.returncode, json.loads(done.stdout)) == (0, [])
    done = run("pull", "org/name", HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path))
    assert done.returncode == 1 and "HF_HUB_OFFLINE" in done.stderr


on_a_cpu = pytest.mark.skipif(
    mx.default_device() != mx.Device(mx.cpu), reason="a GPU is not slower without kernels for CPUs"
)


@on_a_cpu
def test_doctor_calls_missing_kernels_slow_and_not_broken() -> None:
    done = run("doctor", "--json", RUNNER_KERNELS_ISA="none")
    report = json.loads(done.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert done.returncode == 0 and report["usable"]
    assert checks["kernels"]["state"] == "note" and checks["kernels"]["fix"] == "unset RUNNER_KERNELS_ISA"
    shown = run("doctor", RUNNER_KERNELS_ISA="none").stdout
    assert "unset RUNNER_KERNELS_ISA" in shown and shown.endswith("\nready\n")


@on_a_cpu
def test_kernels_missing_is_said_once_on_stderr() -> None:
    done = run("generate", MODEL, "abc", "--raw", *GREEDY, RUNNER_KERNELS_ISA="none")
    assert done.returncode == 0
    assert done.stderr.count("slower") == 1


def test_an_ignored_key_is_one_note_on_stderr(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**raw, "use_flash_attention_2": True}))
    note = "config.json: nothing reads 'use_flash_attention_2' = True: ignored\n"
    done = run("generate", str(model), "abc", "--raw", *GREEDY)
    assert (done.returncode, done.stdout) == (0, answer("abc", "--raw")) and done.stderr.count(note) == 1
    shown = run("inspect", str(model))
    assert shown.returncode == 0 and shown.stderr == note


def test_the_context_option_is_obeyed_and_its_excess_noted() -> None:
    done = run("generate", MODEL, "abc", "--raw", "--context", "2", *GREEDY)
    assert done.returncode == 2 and "the context window holds 2" in done.stderr
    done = run("generate", MODEL, "abc", "--raw", *GREEDY, RUNNER_CONTEXT="99999999999")
    told = "--context must be at most 16777216, not 99999999999 (set by RUNNER_CONTEXT)"
    assert done.returncode == 2 and told in done.stderr
    done = run("generate", MODEL, "abc", "--raw", "--context", "100000", *GREEDY)
    assert done.returncode == 0 and "beyond the" in done.stderr


def test_a_model_that_says_nothing_of_sampling_gets_the_balanced_preset(tmp_path: Path) -> None:
    """Said once on stderr; a temperature decides instead, and so do the model's own files."""
    note = "nothing of sampling: --preset balanced; --temp 0"

    def asked(*arguments: str, model: str = MODEL, command: str = "generate") -> tuple[str, str]:
        words = ["abc", "--raw"] if command == "generate" else []
        done = run(command, model, *words, "-n", "16", *arguments, stdin="abc\ndef\n" if command == "chat" else None)
        assert done.returncode == 0
        return done.stdout, done.stderr

    told, said = asked("--seed", "3")
    named, silent = asked("--seed", "3", "--preset", "balanced")
    assert told == named and said.count(note) == 1 and note not in silent
    likeliest = ("--top-k", "1", "--repetition-penalty", "1")
    assert asked("--seed", "3", *likeliest)[0] == asked("--temp", "0")[0] != told
    assert note in asked("--seed", "3", "--min-p", "0")[1]
    assert asked(command="chat", model=MODEL)[1].count(note) == 1
    for given in (["--temp", "0"], ["--temp", "0.7", "--seed", "3"], ["--preset", "greedy"]):
        assert note not in asked(*given)[1] and note not in asked(*given, command="chat")[1]
    model = tmp_path / "greedy"
    shutil.copytree(MODEL, model)
    (model / "generation_config.json").write_text('{"do_sample": false}')
    assert asked(model=str(model)) == (asked("--temp", "0")[0], "")
    # The library's default stays what the files say, and greedy where they say nothing.
    assert runner.load(MODEL).sampling.temperature == 0


def test_switches_for_raw_text() -> None:
    """The fixture's tokenizer puts <|begin_of_text|> first; spelled out, it is that token only if asked for."""

    lm = runner.load(MODEL)
    begin = lm.tokenizer.bos_token_id
    plain = lm.tokenizer.encode("abc", add_special_tokens=False)
    assert begin is not None and lm.tokenizer.encode("abc") == [begin, *plain]

    def told(prompt: list[int]) -> str:
        return lm.generate(prompt, temperature=0, max_tokens=8).text + "\n"

    spelled = "<|begin_of_text|>abc"
    assert answer("abc", "--raw") == answer("abc", "--raw", "--bos") == told([begin, *plain])
    assert answer("abc", "--raw", "--no-bos") == told(plain) != told([begin, *plain])
    assert answer(spelled, "--raw", "--no-bos", "--parse-special") == told([begin, *plain])
    assert answer(spelled, "--raw", "--parse-special") == told([begin, begin, *plain])
    assert answer(spelled, "--raw") == told(lm.tokenizer.encode(spelled)) != told([begin, begin, *plain])
    for switch in ("--bos", "--no-bos", "--parse-special"):
        for more, named in (([], "add --raw"), (["--chat"], "leave out --chat")):
            done = run("generate", MODEL, "abc", switch, *more)
            assert done.returncode == 2 and switch in done.stderr and named in done.stderr
