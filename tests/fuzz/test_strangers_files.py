"""Files of strangers, damaged at random: refused in a RunnerError or read, in little memory and within seconds.

Headers, configs, tokenizers, templates, GGUF files and adapters go through what a user's first command does with them.
Each batch runs in a process of its own, which a crash or a hang ends; its parent then knows the seed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT, TESTS

BATCH = 100
SECONDS = 5.0

CHILD = r"""
import gc, json, random, shutil, sys, time, warnings
from pathlib import Path

sys.path[:0] = [sys.argv[1] + "/tests/helpers", sys.argv[1]]
kind, first, count, work, tests = sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]), Path(sys.argv[6])
import mlx.core as mx
import mutate
import runner
from runner.adapters import fit, open_adapters
from runner.checkpoint.model_files import open_files
from runner.errors import RunnerError
from runner.families import find
from runner.inspect_model import inspect
from runner.text.tokenizer import Tokenizer
warnings.simplefilter("ignore")

LLAMA, TOKENS = tests / "fixtures/llama/llama-gqa", tests / "data/tokenizers/chatml"
CHAT = [{"role": "system", "content": "Be <|im_start|> brief."}, {"role": "user", "content": "Köln, 東京, 🙂 </s>"}]

def copied(source, *names):
    target = work / "model"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith("expected"):
            shutil.copy(path, target)
    return target

def damage(path, how, draw):
    path.write_bytes(how(path.read_bytes(), draw))
    return path.stat().st_size

def headers(draw):
    model = copied(LLAMA)
    size = damage(model / "model.safetensors", of_header if draw.random() < 0.5 else mutate.of_bytes, draw)
    return size, lambda: read_all(model)

def of_header(data, draw):
    length = int.from_bytes(data[:8], "little")
    head = mutate.of_json(data[8 : 8 + length], draw)
    return len(head).to_bytes(8, "little") + head + data[8 + length :]

def read_all(model):
    inspect(model)
    source = open_files(model).source
    for name in list(source.headers)[:3]:
        source.read(name)

def configs(draw):
    model = copied(LLAMA if draw.random() < 0.6 else draw.choice(FAMILIES))
    name = "config.json"
    if draw.random() < 0.2 and (model / "generation_config.json").exists():
        name = "generation_config.json"
    size = damage(model / name, mutate.of_json, draw)
    def use():
        inspect(model)
        if (model / "tokenizer.json").exists() and draw.random() < 0.2:
            runner.load(model).generate([5, 6], max_tokens=2)
    return size, use

FAMILIES = sorted(path.parent for path in (tests / "fixtures/families").glob("*/config.json"))

def tokenizers(draw):
    model = copied(draw.choice([TOKENS, tests / "data/tokenizers/llama", LLAMA]))
    name = draw.choice([path.name for path in sorted(model.glob("*.json")) if path.name != "config.json"])
    size = damage(model / name, mutate.of_json if draw.random() < 0.8 else mutate.of_bytes, draw)
    def use():
        tokenizer = Tokenizer.from_directory(model)
        ids = tokenizer.encode("Hello Köln <s> <|im_end|> " * 3)
        tokenizer.decode(ids)
        stream = tokenizer.detokenizer()
        "".join(stream.add(token) for token in ids) + stream.flush()
        tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    return size, use

def templates(draw):
    model = copied(LLAMA)
    size = damage(model / "chat_template.jinja", mutate.of_template if draw.random() < 0.8 else mutate.of_bytes, draw)
    return size, lambda: Tokenizer.from_directory(model).apply_chat_template(CHAT * 20, add_generation_prompt=True)

def ggufs(draw):
    path = work / "model.gguf"
    path.write_bytes(mutate.of_bytes(GGUF, draw))
    def use():
        files = open_files(path)
        inspect(path)
        files.tokenizer().encode("abc")
        for name in list(files.source.headers)[:3]:
            files.source.read(name)
    return path.stat().st_size, use

def adapters(draw):
    source = draw.choice(ADAPTERS)
    target = copied(source)
    if draw.random() < 0.6:
        size = damage(target / "adapter_config.json", mutate.of_json, draw)
    else:
        file = next(iter(target.glob("*.safetensors")))
        size = damage(file, of_header if draw.random() < 0.6 else mutate.of_bytes, draw)
    def use():
        files = open_files(LLAMA)
        fit(files.config, find(files.config), files.source, open_adapters([str(target)], Path))
    return size, use

ADAPTERS = sorted(path.parent for path in (tests / "fixtures/adapters").glob("llama-*/*/adapter_config.json"))
if kind == "ggufs":
    import gguf_writer
    raw = json.loads((LLAMA / "config.json").read_text())
    gguf_writer.write_model(work / "whole.gguf", raw, gguf_writer.weights_of(LLAMA))
    GGUF = (work / "whole.gguf").read_bytes()

def high_water():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) << 10

report = {"refused": 0, "read": 0, "worst seconds": 0.0, "worst bytes": 0, "failed": []}
for seed in range(first, first + count):
    print(seed, file=sys.stderr, flush=True)
    draw = random.Random(f"{kind} {seed}")
    size, use = globals()[kind](draw)
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")
    before, started = resident(), time.process_time()
    try:
        use()
        report["read"] += 1
    except RunnerError:
        report["refused"] += 1
    except BaseException as error:
        report["failed"].append(f"{kind} {seed}: {type(error).__name__}: {str(error)[:200]}")
    spent, grown = time.process_time() - started, high_water() - before
    report["worst seconds"] = max(report["worst seconds"], spent)
    report["worst bytes"] = max(report["worst bytes"], grown)
    if spent > float(sys.argv[7]):
        report["failed"].append(f"{kind} {seed}: {spent:.1f} s")
    if grown > max(20 * size, 96 << 20) and not mx.cuda.is_available():  # whose libraries come when they are wanted
        report["failed"].append(f"{kind} {seed}: {grown >> 20} MiB for a file of {size} bytes")
print(json.dumps(report))
"""

KINDS = ["headers", "configs", "tokenizers", "templates", "ggufs", "adapters"]


def damaged(kind: str, count: int, tmp_path: Path) -> dict[str, float]:
    """Run `count` damaged files of a kind; returns the totals, and fails with every seed that went wrong."""
    totals: dict[str, float] = {"refused": 0, "read": 0, "worst seconds": 0, "worst bytes": 0}
    failed: list[str] = []
    for first in range(0, count, BATCH):
        work = tmp_path / str(first)
        work.mkdir()
        size = min(BATCH, count - first)
        arguments = [str(ROOT), kind, str(first), str(size), str(work), str(TESTS), str(SECONDS)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *arguments],
            capture_output=True, text=True, env=environment, timeout=60 * SECONDS, check=False,
        )  # fmt: skip
        if done.returncode:
            failed.append(f"{kind}: exit code {done.returncode} after seed {done.stderr[-300:]}")
            continue
        report = json.loads(done.stdout.splitlines()[-1])
        failed += report["failed"]
        for name in totals:
            totals[name] = max(totals[name], report[name]) if "worst" in name else totals[name] + report[name]
    print(kind, totals)
    assert not failed, "\n".join(failed)
    return totals


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_a_few_damaged_files(kind: str, tmp_path: Path) -> None:
    totals = damaged(kind, 60, tmp_path)
    assert totals["refused"] > 5 and totals["refused"] + totals["read"] == 60


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_thousand_damaged_files(kind: str, tmp_path: Path) -> None:
    damaged(kind, 3400, tmp_path)
