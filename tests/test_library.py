"""What people do with the library in a Python prompt, an editor, a script that goes on, and an event loop."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from places import ROOT, TESTS

import runner
from runner.checkpoint.model_files import name_of
from runner.engine.loaded import open_loaded
from runner.engine.sampling import SamplingOptions
from runner.errors import UsageError
from runner.language_model import LanguageModel
from runner.ops.owner import OWNER
from runner.weights.module import ranges

MODEL = TESTS / "fixtures" / "llama" / "llama-gqa"
ASK = [{"role": "user", "content": "abc"}]


@pytest.fixture
def lm() -> Iterator[LanguageModel]:
    with runner.load(MODEL, dtype="float32") as model:
        yield model


def options(lm: LanguageModel, **more: Any) -> Any:
    """Greedy answers that no end token cuts short."""
    return {"temperature": 0, "max_tokens": 12, "logit_bias": dict.fromkeys(lm.eos_token_ids, -1e9), **more}


def python(code: str, *arguments: object) -> str:
    """What a program prints to stdout; it must end well and say nothing on stderr."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# --- reprs and names --------------------------------------------------------------------------------------------------


def test_every_public_object_has_a_short_repr(lm: LanguageModel) -> None:
    cache = lm.prompt_cache()
    answer = lm.generate("abc", prompt_cache=cache, **options(lm))
    chunk = next(lm.stream("abc", **options(lm)))
    found = [lm, lm.engine, lm.config, lm.defaults, lm.sampling, lm.device, lm.tokenizer, cache, answer, chunk]
    found += [answer.timings, cache.caches, lm.device.ops, lm.engine.layout, lm.model.layers[0].self_attn.rope]
    for value in found:
        assert len(repr(value)) <= 300 and "\n" not in repr(value) and " object at 0x" not in repr(value), repr(value)
    assert repr(lm) == (
        f"LanguageModel('llama-gqa', llama, {lm.nbytes / 1e6:.1f} MB on {lm.device.name}, context of 128 tokens)"
    )
    assert repr(lm.sampling) == "SamplingParams(temperature=0.0)"
    assert repr(chunk) == f"Chunk(text={chunk.text!r}, token={chunk.token})"
    assert repr(cache).startswith(f"PromptCache({cache.caches.offset} tokens, ")


def test_a_model_has_the_name_that_people_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name_of(tmp_path / "models--org--It-1B" / "snapshots" / "0123abc") == "It-1B"
    assert name_of(tmp_path / "models--org--It-1B" / "snapshots" / "0123abc" / "it-Q4_K_M.gguf") == "it-Q4_K_M.gguf"
    assert name_of(tmp_path / "mine") == "mine"
    monkeypatch.chdir(MODEL)
    assert name_of(Path(".")) == "llama-gqa" and name_of(Path("..")) == "llama"


def test_a_model_is_shown_as_its_tree(lm: LanguageModel) -> None:
    assert repr(lm.model).splitlines() == [
        "Llama(",
        "  (embed_tokens): PlainEmbedding([336, 32] float32)",
        "  (layers): 2 x Block(",
        "    (input_layernorm): RMSNorm([32] float32)",
        "    (self_attn): Attention(",
        "      (qkv_proj): PlainLinear([64, 32] float32)",
        "      (o_proj): PlainLinear([32, 32] float32)",
        "    )",
        "    (post_attention_layernorm): RMSNorm([32] float32)",
        "    (mlp): MLP(",
        "      (gate_up_proj): PlainLinear([64, 32] float32)",
        "      (down_proj): PlainLinear([32, 32] float32)",
        "    )",
        "  )",
        "  (norm): RMSNorm([32] float32)",
        "  (lm_head): PlainLinear([336, 32] float32)",
        ")",
    ]


@pytest.mark.parametrize("name", sorted(path.name for path in (TESTS / "fixtures" / "families").glob("*-base")))
def test_every_familys_tree_fits_a_screen(name: str) -> None:
    """A screen for a model of one kind of layers, and some forty lines for each other kind."""
    lines = repr(open_loaded(TESTS / "fixtures" / "families" / name).model).splitlines()
    kinds = max(1, sum(bool(re.match(r" {4}\([\d, -]+\): ", line)) for line in lines))
    assert 5 < len(lines) <= 20 + 40 * kinds and max(map(len, lines)) <= 110


def test_layers_that_are_alike_are_one_entry() -> None:
    assert ranges([0, 1, 2, 4, 5, 7]) == "0-2, 4-5, 7"
    lines = repr(open_loaded(TESTS / "fixtures" / "families" / "deepseek_v2-grouped").model)
    assert "    (0): Block(" in lines and "    (1): Block(" in lines  # a plain MLP first, then experts


def test_models_compare_by_identity(lm: LanguageModel) -> None:
    other = runner.load(MODEL, dtype="float32")
    assert lm == lm and lm != other and len({lm, other, lm}) == 2


HELP = """
import sys, runner
names = dir(runner)
assert "mlx" not in sys.modules
print(" ".join(names))
help(runner)
"""


def test_completion_and_help_show_the_public_names() -> None:
    names, _, text = python(HELP).partition("\n")
    assert set(names.split()) == {*runner.__all__, "__doc__", "__version__"}
    for name in ("load(", "class LanguageModel", "class SamplingParams", "class UsageError", "temprature"):
        assert (name in text) == (name != "temprature"), name


# --- arguments --------------------------------------------------------------------------------------------------------


def test_the_types_of_sampling_options_are_those_of_the_parameters() -> None:
    fields = runner.SamplingParams.__annotations__
    assert list(SamplingOptions.__annotations__) == list(fields)
    for name, kind in SamplingOptions.__annotations__.items():
        assert kind.__forward_arg__.removesuffix(" | None") == fields[name].removesuffix(" | None"), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda lm: lm.stream("a", temprature=0),
            r"stream\(\) has no keyword 'temprature': did you mean 'temperature'",
        ),
        (lambda lm: lm.generate("a", max_token=5), "did you mean 'max_tokens'"),
        (lambda lm: lm.chat(ASK, template_kwarg={}), r"chat\(\) has no keyword .* did you mean 'template_kwargs'"),
        (lambda lm: lm.chat_stream(ASK, tool=[]), "did you mean 'tools'"),
        (lambda lm: lm.astream("a", stops="x"), "did you mean 'stop'"),
        (lambda lm: lm.generate("a", xyz=1), "has no keyword 'xyz': it has prompt, temperature, top_k"),
        (lambda lm: runner.load(MODEL, dtpe="float32"), r"load\(\) has no keyword 'dtpe': did you mean 'dtype'"),
        (lambda lm: lm.stream("a", stop=3), "stop must be a text or a list of texts, or None, not 3"),
        (lambda lm: lm.astream("a", stop={"b": 1}), "stop must be a text or a list"),
        (lambda lm: lm.generate("a", prompt_cache=3), r"prompt_cache must be what lm.prompt_cache\(\) makes, or None"),
        (lambda lm: lm.generate("a", on_prefill=3), "on_prefill must be a function"),
        (lambda lm: lm.agenerate("a", cancelled=True), "cancelled must be a function"),
        (lambda lm: lm.chat(ASK, template=3), "template must be a text"),
        (lambda lm: runner.load(None), "model must be a text or a path, not None"),
        (lambda lm: runner.load(MODEL, adapters=3), "adapters must be a list or a mapping"),
        (lambda lm: runner.load(MODEL, revision=3), "revision must be a text"),
        (lambda lm: lm.generate(b"abc"), "not bytes"),
        (lambda lm: lm.stream(bytearray(b"abc")), "not bytes"),
        (lambda lm: lm.logits(b"abc"), "not bytes"),
    ],
)
def test_what_is_misspelt_or_no_prompt_is_named(lm: LanguageModel, call: Callable[..., Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(lm)


TYPED = """
import runner
lm = runner.load("x", context_length=5)
for chunk in lm.stream("a", temperature=0.5, max_tokens=3): reveal_type(chunk)
reveal_type(lm.chat([{"role": "user", "content": "a"}], tools=None, top_k=3))
async def ask() -> None:
    async for chunk in lm.astream("a", seed=1): reveal_type(chunk.text)
lm.stream("a", temprature=0)
lm.generate("a", max_tokens="3")
lm.chat([{}], stop=3)
runner.load("x", dtpe="float32")
lm.agenerate("a", top_n=3)
"""


def test_mypy_sees_options(tmp_path: Path) -> None:
    """Under the package's own settings, so that the cache of `scripts/check` serves this run too."""
    (tmp_path / "snippet.py").write_text(TYPED)
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(tmp_path / "snippet.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    said = [line.partition("snippet.py:")[2] for line in done.stdout.splitlines() if "snippet.py:" in line]
    found: dict[int, str] = {}
    for line in said:
        found.setdefault(int(line.split(":")[0]), line)
    assert set(found) == {4, 5, 7, 8, 9, 10, 11, 12}, done.stdout + done.stderr
    assert 'Unexpected keyword argument "temprature"' in found[8]
    for line, words in (
        (4, "Chunk"),
        (5, "Generation"),
        (7, "str"),
        (9, '"str"; expected "int'),
        (10, '"int"; expected'),
    ):
        assert words in found[line], found[line]
    assert 'did you mean "dtype"' in found[11] and "top_n" in found[12]


# --- what a library keeps to itself -----------------------------------------------------------------------------------

SPEAKS = {"cli", "server", "progress.py", "__main__.py"}
"""The command line, the server, which is a process of its own, and the bars that `load(progress=True)` asks for."""


def test_the_library_never_prints_and_never_touches_signals() -> None:
    for path in (ROOT / "runner").rglob("*.py"):
        if path.relative_to(ROOT / "runner").parts[0] in SPEAKS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
                assert "signal" not in names, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("print", "input"), f"{path}:{node.lineno}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sys":
                assert node.attr not in ("stdout", "stderr", "stdin"), f"{path}:{node.lineno}"


QUIET = """
import os, signal, sys
import runner
handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)]
def files(): return sorted(os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd"))
runner.load(sys.argv[1]).close()
before = files()
with runner.load(sys.argv[1]) as lm:
    lm.chat([{"role": "user", "content": "a"}], max_tokens=3)
assert len(files()) == len(before), files()
assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)] == handlers
assert sys.argv[1] not in open("/proc/self/maps").read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_says_nothing_and_leaves_no_file_open() -> None:
    assert python(QUIET, MODEL) == ""


def test_a_closed_model_refuses_what_needs_its_weights() -> None:
    with runner.load(MODEL) as lm:
        cache = lm.prompt_cache()
        under_way = lm.stream("abc", **options(lm))
        next(under_way)
    calls: list[Callable[[], Any]] = [
        lambda: next(under_way), lambda: lm.generate("a"), lambda: lm.stream([5]), lambda: lm.chat(ASK),
        lambda: lm.logits([5]), lm.prompt_cache, lambda: lm.model, lambda: lm.set_adapters({}),
        lambda: asyncio.run(lm.agenerate("a")), lambda: lm.stream("a", prompt_cache=cache),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(UsageError, match="was closed"):
            call()
    lm.close()
    assert "closed" in repr(lm) and lm.config.vocab_size == 336 and lm.tokenizer.encode("a")


def test_closing_gives_memory_back() -> None:
    OWNER.run(mx.clear_cache)
    before = mx.get_active_memory() + mx.get_cache_memory()
    lm = runner.load(MODEL)
    lm.generate("abc", **options(lm))
    held = lm.nbytes
    assert mx.get_active_memory() + mx.get_cache_memory() >= before + held > 0
    lm.close()
    assert mx.get_active_memory() + mx.get_cache_memory() < before + held / 10
    assert lm.nbytes == 0


# --- asyncio ----------------------------------------------------------------------------------------------------------


def test_an_awaited_answer_is_the_other_one(lm: LanguageModel) -> None:
    async def ask() -> tuple[Any, Any, list[Any]]:
        one = await lm.agenerate("abc", **options(lm))
        two = await lm.achat(ASK, **options(lm))
        return one, two, [chunk async for chunk in lm.achat_stream(ASK, **options(lm))]

    one, two, chunks = asyncio.run(ask())
    assert one.tokens == lm.generate("abc", **options(lm)).tokens and one.text
    assert two.tokens == lm.chat(ASK, **options(lm)).tokens == [chunk.token for chunk in chunks]
    assert chunks[-1].finish_reason == "length" and chunks[-1].timings.generation_tokens == 12


def test_answers_of_several_tasks_take_turns(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token; a long prompt holds nobody up for more than one of its chunks."""
    order: list[str] = []
    begun: list[object] = []
    wait = type(lm.engine).wait

    async def ask(name: str, ids: list[int]) -> list[int]:
        def read(done: int, total: int) -> None:
            order.append(name)

        found = []
        async for chunk in lm.astream(ids, on_prefill=read, **options(lm)):
            order.append(name)
            found.append(chunk.token)
        return found

    async def both() -> list[list[int]]:
        prepared = asyncio.Event()

        async def wait_for_the_other(self: Any, step: Any) -> Any:
            # Each prompt is prepared on a thread of its own: neither may take a step before the other has one, too.
            begun.append(step)
            if len(begun) == 2:
                prepared.set()
            await prepared.wait()
            return await wait(self, step)

        monkeypatch.setattr(type(lm.engine), "wait", wait_for_the_other)
        return await asyncio.gather(ask("a", [5, 6, 7] * 8), ask("b", [8, 9]))

    object.__setattr__(lm.engine.device, "chunk", 4)
    wanted = [lm.generate(ids, **options(lm)).tokens for ids in ([5, 6, 7] * 8, [8, 9])]
    assert asyncio.run(both()) == wanted
    assert len(order) == (6 + 12) + (1 + 12)
    assert order.index("b") < 6 and order[-1] == "a"


def slow(monkeypatch: pytest.MonkeyPatch, lm: LanguageModel, seconds: float) -> list[float]:
    """Make each pass of the model take so long; the list says when passes ended."""
    ended: list[float] = []
    whole = type(lm.model).__call__

    def call(self: Any, *args: Any) -> Any:
        time.sleep(seconds)
        ended.append(time.monotonic())
        return whole(self, *args)

    monkeypatch.setattr(type(lm.model), "__call__", call)
    return ended


def test_the_event_loop_goes_on(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, lm, 0.3)

    async def watched() -> float:
        answer = asyncio.create_task(lm.agenerate([5, 6], **options(lm, max_tokens=2)))
        longest, last = 0.0, time.monotonic()
        while not answer.done():
            await asyncio.sleep(0.005)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        await answer
        return longest

    assert asyncio.run(watched()) < 0.25


def test_a_cancelled_task_frees_its_run(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a long prompt: no further chunk is read, and the cache is there for the next answer."""
    prompt = [5, 6, 7] * 20
    wanted = lm.generate([5, 6, 7, 8], **options(lm)).tokens
    object.__setattr__(lm.engine.device, "chunk", 4)
    cache = lm.prompt_cache()

    async def ask() -> list[int]:
        with monkeypatch.context() as patch:
            ended = slow(patch, lm, 0.1)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(lm.agenerate(prompt, prompt_cache=cache, **options(lm)), 0.25)
            OWNER.run(lambda: None)
            count = len(ended)
            await asyncio.sleep(0.3)
            assert 1 <= count == len(ended) <= 4
        return (await lm.agenerate([5, 6, 7, 8], prompt_cache=cache, **options(lm))).tokens

    assert asyncio.run(ask()) == wanted


def test_a_loop_that_is_left_frees_its_run(lm: LanguageModel) -> None:
    cache = lm.prompt_cache()

    async def ask() -> list[int]:
        async for _ in lm.astream([5, 6, 7], prompt_cache=cache, **options(lm)):
            break
        async for chunk in lm.astream([5, 6, 7], prompt_cache=lm.prompt_cache(), **options(lm, max_tokens=3)):
            if chunk.finish_reason is not None:
                break  # what it ends with is behind it
        await asyncio.sleep(0)
        return (await lm.agenerate([5, 6], prompt_cache=cache, **options(lm))).tokens

    assert asyncio.run(ask()) == lm.generate([5, 6], **options(lm)).tokens


def test_two_tasks_cannot_share_a_cache(lm: LanguageModel) -> None:
    cache = lm.prompt_cache()

    async def both() -> list[Any]:
        asked = (lm.agenerate([5, 6, at], prompt_cache=cache, **options(lm)) for at in (7, 8))
        return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(both())
    refused = [error for error in found if isinstance(error, UsageError)]
    assert len(refused) == 1 and "in use by another answer" in str(refused[0])


def test_errors_come_to_the_task_that_asked(lm: LanguageModel) -> None:
    async def ask(**more: Any) -> None:
        await lm.agenerate("abc", **more)

    for more, message in (({"top_p": 3}, "top_p must be"), ({"max_tokens": 0}, "max_tokens must be")):
        with pytest.raises(UsageError, match=message):
            asyncio.run(ask(**more))
    with pytest.raises(ZeroDivisionError):
        asyncio.run(ask(cancelled=lambda: bool(1 // 0)))
    assert lm.generate("abc", **options(lm)).text


LEFT = """
import asyncio, sys, threading
import runner
lm = runner.load(sys.argv[1])
async def ask():
    task = asyncio.create_task(lm.agenerate([5, 6, 7], max_tokens=100, temperature=0))
    await asyncio.sleep(0.02)
asyncio.run(ask())  # the loop ends with an answer under way
print(len(lm.generate([5, 6, 7], max_tokens=3, temperature=0).tokens), threading.active_count())
"""


def test_a_loop_may_end_with_an_answer_under_way() -> None:
    count, threads = python(LEFT, MODEL).split()
    assert int(count) >= 1 and int(threads) <= 2
