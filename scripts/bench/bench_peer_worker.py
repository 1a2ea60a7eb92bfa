"""Runs one engine in one process, driven by lines of JSON: `python bench_peer_worker.py KIND MODEL`. See `peer.py`.

KIND is runner, runner-int8 (activations of 8 bits), mlx-lm, llama.cpp, openvino, torch-bfloat16 or torch-float32.
Requests, each answered with a line of JSON:

    {"do": "pp", "tokens": 512}                  seconds to read a random prompt and choose the next token
    {"do": "tg", "tokens": 128, "depth": 128}    seconds to generate greedily after a random prompt, end tokens ignored
    {"do": "logits", "ids": [...], "to": FILE}   float32 logits at every position, as .npy
    {"do": "greedy", "text": ..., "tokens": 24}  runner: ids of the prompt and of the answer
    {"do": "share", "tokens": 32}                runner: bytes a second read in decoding, over the machine's
    {"do": "rss"}                                peak memory of the process

Every engine gets the same threads, keeps its cache at `depth` between requests, and is left alone with its defaults.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

SEED = 20261124
THREADS = int(os.environ.get("RUNNER_NUM_THREADS", "0")) or (
    len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
)


def random_ids(count: int, vocab: int) -> list[int]:
    """Draw token ids from a fixed seed, so that every engine gets the same prompt."""
    return np.random.default_rng(SEED).integers(0, vocab, count).tolist()


class Engine:
    """Interface of an engine; `position` is the number of tokens in its cache."""

    version: str
    vocab: int
    position = 0

    def rewind(self, depth: int) -> None:
        """Forget what came after `depth`; all of it, where that cannot be told apart."""
        raise NotImplementedError

    def read(self, ids: list[int]) -> int:
        """Append `ids` to the cache; the likeliest next token."""
        raise NotImplementedError

    def generate(self, token: int, count: int) -> None:
        """Append `token` and the likeliest after it, `count` in all."""
        for _ in range(count):
            token = self.read([token])

    def at(self, depth: int) -> None:
        """Have exactly `depth` random tokens in the cache."""
        if self.position > depth:
            self.rewind(depth)
        if self.position != depth:  # too few, or none: a window that has moved on cannot be cut back
            self.rewind(0)
            self.read(random_ids(depth, self.vocab))

    def seconds_to_read(self, count: int) -> float:
        """Seconds to read a random prompt and choose the next token."""
        self.rewind(0)
        ids = random_ids(count, self.vocab)
        start = time.perf_counter()
        self.read(ids)
        return time.perf_counter() - start

    def seconds_to_generate(self, count: int, depth: int) -> float:
        """Seconds to generate so many tokens behind `depth` random ones."""
        self.at(depth)
        start = time.perf_counter()
        self.generate(random_ids(1, self.vocab)[0], count)
        return time.perf_counter() - start

    def logits(self, ids: list[int]) -> np.ndarray:
        """Float32 logits `[T, V]`."""
        raise NotImplementedError


class Runner(Engine):
    """This project; MODEL is a directory, or `NAME:FORM` for a published shape packed as FORM."""

    def __init__(self, model: str, activations: str = "exact") -> None:
        from runner.bench.models import open_subject

        name, _, form = model.partition(":")
        self.subject = open_subject(name, quantize=form or None, activations=activations)
        self.engine = self.subject.engine
        self.directory = Path(name)
        self.version = importlib.metadata.version("mlx") + ", " + self.engine.device.name
        self.vocab = self.engine.config.vocab_size
        self.caches = self.engine.new_caches()

    def rewind(self, depth: int) -> None:
        from runner.bench.measure import rewind

        if not rewind(self.caches, depth):
            self.caches = self.engine.new_caches()
        self.position = self.caches.offset

    def read(self, ids: list[int]) -> int:
        from runner.bench.measure import read

        token = int(read(self.engine, np.array([ids], dtype=np.int32), self.caches).item())
        self.position = self.caches.offset
        return token

    def generate(self, token: int, count: int) -> None:
        from runner.bench.measure import generate

        generate(self.engine, np.array([[token]], dtype=np.int32), self.caches, count)
        self.position = self.caches.offset

    def logits(self, ids: list[int]) -> np.ndarray:
        return np.array(self.engine.logits(ids))

    def greedy(self, text: str, tokens: int) -> dict[str, list[int]]:
        """The answer to a chat message, or to plain text where there is no template."""
        from runner.text.tokenizer import Tokenizer

        self.rewind(0)
        ids = Tokenizer.from_directory(self.directory).encode(text)
        answer = [self.read(ids)]
        while len(answer) < tokens:
            answer.append(self.read([answer[-1]]))
        return {"prompt": ids, "answer": answer}

    def share(self, tokens: int) -> dict[str, float]:
        """Bandwidth of decoding and of the machine, one right after the other."""
        from runner.bench.bandwidth import read_bandwidth
        from runner.bench.measure import Case, measure

        result = measure(self.engine, Case("tg", tokens), 1, SEED)
        machine = read_bandwidth(3)
        return {"decode": result.bandwidth or 0.0, "machine": machine, "tps": result.tps}


class MlxLm(Engine):
    """mlx-lm on its default device, decoding as its `generate_step` does: one step ahead."""

    def __init__(self, model: str) -> None:
        import mlx.core as mx
        from mlx_lm.models import cache
        from mlx_lm.utils import load_model

        self.mx, self.cache = mx, cache
        self.model, config = load_model(Path(model))
        self.version = importlib.metadata.version("mlx-lm")
        self.vocab = config["vocab_size"]
        self.prompt_cache = cache.make_prompt_cache(self.model)

    def rewind(self, depth: int) -> None:
        if self.cache.can_trim_prompt_cache(self.prompt_cache):
            self.cache.trim_prompt_cache(self.prompt_cache, self.position - depth)
            self.position = depth
        else:
            self.prompt_cache, self.position = self.cache.make_prompt_cache(self.model), 0

    def step(self, token: Any) -> Any:
        self.position += token.shape[1]
        return self.mx.argmax(self.model(token, cache=self.prompt_cache)[:, -1], axis=-1)

    def read(self, ids: list[int]) -> int:
        for start in range(0, len(ids), 2048):  # mlx-lm's prefill_step_size
            token = self.step(self.mx.array([ids[start : start + 2048]]))
            self.mx.eval(token)
        return int(token.item())

    def generate(self, token: int, count: int) -> None:
        current = self.mx.array([token])
        for _ in range(count):
            following = self.step(current[None])
            self.mx.async_eval(following)
            current.tolist()
            current = following
        self.mx.eval(current)

    def logits(self, ids: list[int]) -> np.ndarray:
        return np.array(self.model(self.mx.array([ids]))[0].astype(self.mx.float32))


class LlamaCpp(Engine):
    """llama.cpp through llama-cpp-python's C interface, as llama-bench drives it; its cache is float16."""

    def __init__(self, model: str) -> None:
        import llama_cpp

        self.lib = llama_cpp
        self.llm = llama_cpp.Llama(
            model, n_ctx=8192, n_batch=2048, n_ubatch=512, n_threads=THREADS, n_threads_batch=THREADS, verbose=False
        )
        self.version = importlib.metadata.version("llama-cpp-python")
        self.vocab = self.llm.n_vocab()

    def rewind(self, depth: int) -> None:
        self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.llm.ctx), 0, depth, -1)
        self.position = depth

    def read(self, ids: list[int]) -> int:
        for start in range(0, len(ids), 2048):
            piece = ids[start : start + 2048]
            tokens = (self.lib.llama_token * len(piece))(*piece)
            if self.lib.llama_decode(self.llm.ctx, self.lib.llama_batch_get_one(tokens, len(piece))) != 0:
                raise RuntimeError("llama_decode failed")
        self.position += len(ids)
        row = self.lib.llama_get_logits_ith(self.llm.ctx, -1)
        return int(np.ctypeslib.as_array(row, (self.vocab,)).argmax())


class OpenVino(Engine):
    """OpenVINO GenAI's pipeline on the CPU, with its defaults but for the threads. It keeps no cache between requests.

    Generating is timed as the difference between a request for that many tokens and one more, and a request for one,
    which reads the same prompt. Both read the prompt anew, as random ids repeat.
    """

    def __init__(self, model: str) -> None:
        import openvino
        import openvino_genai

        self.openvino, self.genai = openvino, openvino_genai
        self.pipeline = openvino_genai.LLMPipeline(
            model, "CPU", INFERENCE_NUM_THREADS=THREADS, PERFORMANCE_HINT="LATENCY"
        )
        self.version = importlib.metadata.version("openvino-genai")
        self.vocab = json.loads((Path(model) / "config.json").read_text())["vocab_size"]

    def seconds_to_answer(self, ids: list[int], count: int) -> float:
        """Seconds from the request to the last of `count` tokens."""
        config = self.genai.GenerationConfig(max_new_tokens=count, ignore_eos=True)
        prompt = np.array([ids], dtype=np.int64)
        inputs = [self.openvino.Tensor(each) for each in (prompt, np.ones_like(prompt))]
        start = time.perf_counter()
        self.pipeline.generate(self.genai.TokenizedInputs(*inputs), config)
        return time.perf_counter() - start

    def seconds_to_read(self, count: int) -> float:
        return self.seconds_to_answer(random_ids(count, self.vocab), 1)

    def seconds_to_generate(self, count: int, depth: int) -> float:
        ids = random_ids(depth + 1, self.vocab)
        long, short = self.seconds_to_answer(ids, count + 1), self.seconds_to_answer(ids, 1)
        return max(long - short, 1e-6)  # of few tokens: what the prompts differ by may be more


class Torch(Engine):
    """transformers on torch, eager, with its default attention."""

    def __init__(self, model: str, dtype: str) -> None:
        import torch
        import transformers

        torch.set_num_threads(THREADS)
        self.torch, self.transformers = torch, transformers
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.version = f"{torch.__version__}, transformers {transformers.__version__}"
        self.vocab = self.model.config.vocab_size
        self.past = transformers.DynamicCache()

    def rewind(self, depth: int) -> None:
        if depth == 0:
            self.past = self.transformers.DynamicCache()
        elif self.position > depth:
            self.past.crop(depth - self.position)
        self.position = depth

    def read(self, ids: list[int]) -> int:
        for start in range(0, len(ids), 2048):
            piece = self.torch.tensor([ids[start : start + 2048]])
            with self.torch.inference_mode():
                out = self.model(piece, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.position += len(ids)
        return int(out.logits[0, -1].argmax())

    def logits(self, ids: list[int]) -> np.ndarray:
        with self.torch.inference_mode():
            return self.model(self.torch.tensor([ids])).logits[0].float().numpy()


def open_engine(kind: str, model: str) -> Engine:
    """Load the model in the engine called `kind`."""
    if kind.startswith("torch-"):
        return Torch(model, kind.removeprefix("torch-"))
    if kind == "runner-int8":
        return Runner(model, "int8")
    return {"runner": Runner, "mlx-lm": MlxLm, "llama.cpp": LlamaCpp, "openvino": OpenVino}[kind](model)


def answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Carry out a request and return the result."""
    what = request["do"]
    if what == "pp":
        return {"seconds": engine.seconds_to_read(request["tokens"])}
    if what == "tg":
        return {"seconds": engine.seconds_to_generate(request["tokens"], request["depth"])}
    if what == "logits":
        np.save(request["to"], engine.logits(request["ids"]))
        return {}
    if what == "rss":
        status = Path("/proc/self/status").read_text()  # ru_maxrss would start at the parent's
        return {"bytes": int(status.split("VmHWM:")[1].split()[0]) * 1024}
    assert isinstance(engine, Runner)
    if what == "greedy":
        return engine.greedy(request["text"], request["tokens"])
    assert what == "share"
    return engine.share(request["tokens"])


def main() -> None:
    """Answer requests on the original stdout; whatever libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = open_engine(sys.argv[1], sys.argv[2])
    print(json.dumps({"version": engine.version}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
