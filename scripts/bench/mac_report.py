"""The report of `scripts/check_mac`: what a Mac computes, how fast, and beside mlx-lm, as Markdown on stdout.

Each part runs in processes of its own with a limit of time, so that one that crashes or hangs costs its own lines only.
Models are published shapes with random weights (`configs/shapes`): nothing is fetched.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
WORKER = ROOT / "scripts" / "bench" / "bench_peer_worker.py"
LENGTHS = (64, 1100, 4200)
SEED = 20261124


@dataclasses.dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
        peer: the interpreter of an environment with mlx-lm; it need not exist.
        small: models of six layers, as a trial of this script.
        work: a folder for models.
    """

    peer: Path
    small: bool
    work: Path

    def shape(self, name: str) -> dict[str, Any]:
        """The config of a published shape."""
        from runner import resources

        raw = resources.read("shapes", name)
        size = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
        less = {"num_hidden_layers": 6, "vocab_size": 2048, "hidden_size": 512, "intermediate_size": 512}
        return {**raw, **less, "head_dim": size} if self.small else raw


def main() -> None:
    """Run the parts one after the other, or one of them within this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", type=Path, default=Path("no-mlx-lm"))
    parser.add_argument("--parts", default=",".join(PARTS), help="which parts, in this order")
    parser.add_argument("--small", action="store_true", help="models of six layers, to try the script")
    parser.add_argument("--without-mlx-lm", action="store_true")
    parser.add_argument("--within", type=Path, help=argparse.SUPPRESS)  # the work folder: run one part here
    chosen = parser.parse_args()
    parts = chosen.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    if chosen.within is not None:
        options = Options(chosen.peer, chosen.small, chosen.within)
        for line in PARTS[parts[0]](options):
            print(line, flush=True)
        return
    print(f"# check_mac, {time.strftime('%Y-%m-%d')}")
    failed = []
    with tempfile.TemporaryDirectory(prefix="check_mac.") as work:
        for part in parts:
            print(f"\n## {part}\n", flush=True)
            words = ["--within", work, "--peer", str(chosen.peer), *(["--small"] if chosen.small else [])]
            if not run([sys.executable, __file__, "--parts", part, *words], LIMITS[part]):
                failed.append(part)
    print(f"\nParts that failed: {', '.join(failed) or 'none'}. Thank you: please send all of this back.")
    sys.exit(bool(failed))


def run(command: list[str], limit: float) -> bool:
    """Run a command on our stdout, within `limit` seconds; returns whether it went well, and says what did not."""
    path = os.pathsep.join([str(ROOT), str(HELPERS)])
    with tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(
                command, stderr=errors, timeout=limit, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}
            )
        except subprocess.TimeoutExpired:
            print(f"**stopped after {limit:.0f} seconds**")
            return False
        if done.returncode == 0:
            return True
        errors.seek(0)
        said = clean("".join(errors.readlines()[-15:]))
    print(f"**failed ({done.returncode})**\n\n```text\n{said}\n```")
    return False


def clean(text: str) -> str:
    """`text` without the user's own folders."""
    return text.replace(str(ROOT), "REPOSITORY").replace(str(Path.home()), "~").strip()


def table(*rows: tuple[object, ...]) -> Iterator[str]:
    """A Markdown table; the first row names the columns."""
    for index, row in enumerate(rows):
        yield f"| {' | '.join(map(str, row))} |"
        if index == 0:
            yield "|" + " --- |" * len(row)


# -- parts


def machine(options: Options) -> Iterator[str]:
    """Chip, system, versions, the wheel's tag, and what `doctor` says."""
    import mlx.core as mx

    from runner.ops import metal

    gpu = metal.find()
    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform()
    info = mx.device_info(mx.default_device())
    rows: list[tuple[object, ...]] = [
        ("", ""),
        ("chip", gpu.chip if gpu else info.get("device_name")),
        ("architecture", info.get("architecture")),
        ("system", f"{system}, {platform.machine()}, {os.cpu_count()} cores"),
        ("python", f"{platform.python_version()}, {sys.implementation.name}"),
        ("line editing", line_editing()),
        ("mlx", mx.__version__),
        ("commit", output(["git", "rev-parse", "--short", "HEAD"])),
        ("wheel", wheel_name(options.work)),
    ]
    if gpu is not None:
        rows += [("memory, working set", f"{gpu.memory / 1e9:.1f} GB, {gpu.working_set / 1e9:.1f} GB")]
    yield from table(*rows)
    yield "\n```text"
    yield clean(output([sys.executable, "-m", "runner", "doctor"]))
    yield "```"


def line_editing() -> str:
    """Which editor Python's readline is."""
    try:
        import readline
    except ImportError:
        return "none"
    return "libedit" if "libedit" in (readline.__doc__ or "") else "GNU readline"


def wheel_name(work: Path) -> str:
    """The name of the wheel that this machine makes."""
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation")
    output([sys.executable, "-m", "pip", "wheel", *options, "-w", str(work / "wheel"), str(ROOT)])
    return ", ".join(path.name for path in (work / "wheel").glob("*.whl")) or "could not be made"


def output(command: list[str], **environment: str) -> str:
    """What a command says, stdout and stderr together."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    return done.stdout.strip()


def suite(options: Options) -> Iterator[str]:
    """The tests, with exact float32 products; where the chip has TF32, with it too."""
    from runner.ops.device import current

    wanted = [("0", "exact float32")]
    if current().tf32:
        wanted.append(("1", "TF32"))
    else:
        yield "This GPU has no TF32: one run says it all.\n"
    chosen = ["tests/ops", "tests/cache"] if options.small else ["tests", "--ignore=tests/fuzz"]
    for value, name in wanted:
        start = time.perf_counter()
        words = ["-m", "pytest", "-q", "-n", "auto", "--dist", "loadfile", "-p", "no:cacheprovider", *chosen]
        said = output([sys.executable, *words], MLX_ENABLE_TF32=value).splitlines()
        results = [line for line in said if re.match(r"(FAILED|ERROR)|.*\d (passed|failed|error)", line)]
        yield f"{name}, {time.perf_counter() - start:.0f} s:\n\n```text"
        yield clean("\n".join(results[-60:] or said[-15:]))
        yield "```"


def logits(options: Options) -> Iterator[str]:
    """Logits of the GPU against those of the CPU in float32, on prompts within and beyond a chunk and a window."""
    rows: list[tuple[object, ...]] = [("model", "dtype", "tokens", "largest difference / sd", "same top token")]
    import numpy as np

    names = ("SmolLM2-135M", "Gemma-3-1B")
    for name in names:
        files = {}
        for device, dtype in (("gpu", "bfloat16"), ("gpu", "float32"), ("cpu", "float32")):
            target = options.work / f"{name}-{device}-{dtype}.npz"
            files[device, dtype] = target
            code = "import mac_report, sys; mac_report.write_logits(*sys.argv[1:])"
            words = [name, device, dtype, str(target), "small" if options.small else ""]
            said = output([sys.executable, "-c", code, *words], PYTHONPATH=paths())
            if not target.exists():
                raise SystemExit(clean(said))
        exact = np.load(files["cpu", "float32"])
        for dtype in ("bfloat16", "float32"):
            found = np.load(files["gpu", dtype])
            for count in LENGTHS:
                one, two = found[str(count)], exact[str(count)]
                same = (one.argmax(-1) == two.argmax(-1)).mean()
                rows.append((name, dtype, count, f"{np.abs(one - two).max() / two.std():.2g}", f"{same:.1%}"))
    if "gpu" not in default_device():
        yield "No GPU here: the CPU stands in for it.\n"
    yield from table(*rows)


def paths() -> str:
    """PYTHONPATH for a process that imports this file and the tests' helpers."""
    return os.pathsep.join([str(ROOT), str(HELPERS), str(Path(__file__).parent)])


def default_device() -> str:
    """MLX's default device, as text."""
    import mlx.core as mx

    return str(mx.default_device())


def write_logits(name: str, device: str, dtype: str, target: str, small: str) -> None:
    """Write the logits of the last 64 positions of each length, read in the device's chunks, as one .npz."""
    import mlx.core as mx
    import numpy as np

    from runner.nn.batch import Batch

    if device == "cpu":
        mx.set_default_device(mx.cpu)
    engine = random_engine(Options(Path(), bool(small), Path()), name, dtype=dtype, layers=4)
    found = {}
    for count in LENGTHS:
        ids = np.random.default_rng(SEED).integers(0, engine.config.vocab_size, count).tolist()
        caches, chunk = engine.new_caches(), engine.device.chunk
        rows = []
        for start in range(0, count, chunk):
            piece = mx.array([ids[start : start + chunk]], dtype=mx.int32)
            hidden = engine.model(Batch(piece, start, count), caches)
            rows.append(hidden[:, -64:])
            mx.eval(rows, caches.arrays)
        last = mx.concatenate(rows, axis=1)[:, -64:]
        found[str(count)] = np.array(engine.model.logits(last)[0].astype(mx.float32))
    np.savez(target, **found)


def random_engine(options: Options, name: str, *, form: str | None = None, layers: int = 0, **more: Any) -> Any:
    """A published shape with random weights; `layers`, if any, of them."""
    from runner.bench.models import random_weights
    from runner.convert.quantize import QUANTIZATIONS
    from runner.engine.loaded import assemble

    raw = options.shape(name)
    if layers:
        raw["num_hidden_layers"] = min(layers, raw["num_hidden_layers"])
    source = random_weights(raw, form=None if form is None else QUANTIZATIONS[form], **more)
    return assemble(raw, source, **more)


def speed(options: Options) -> Iterator[str]:
    """pp512 and tg128 beside mlx-lm: a dense and a windowed model, and a Q4_K_M file beside mlx-lm's 4 bits."""
    dense = packed(options, "Llama-3.2-1B")
    windowed = packed(options, "Gemma-3-1B")
    file = gguf_file(options, "Llama-3.2-1B")
    rows: list[tuple[object, ...]] = [("model", "test", "ours, t/s", "mlx-lm, t/s", "ratio")]
    versions = set()
    for name, ours, theirs in (
        ("Llama-3.2-1B, 4 bits", dense, dense),
        ("Gemma-3-1B, 4 bits, windows", windowed, windowed),
        ("Llama-3.2-1B, Q4_K_M, beside 4 bits", file, dense),
    ):
        mine, version = rates(sys.executable, "runner", ours, options.small)
        peer, other = {}, "no mlx-lm"
        if options.peer.exists():
            peer, other = rates(str(options.peer), "mlx-lm", theirs, options.small)
        versions |= {version, other}
        for test, rate in mine.items():
            beside = peer.get(test)
            ratio = f"{rate / beside:.2f}" if beside else ""
            rows.append((name, test, f"{rate:.1f}", f"{beside:.1f}" if beside else "", ratio))
    yield from table(*rows)
    yield f"\n{'; '.join(sorted(versions))}"


def packed(options: Options, name: str) -> Path:
    """A published shape in 4 bits, as a directory that mlx-lm reads too."""
    from runner.bench.models import random_weights
    from runner.checkpoint.writer import write_checkpoint
    from runner.convert.quantize import QUANTIZATIONS

    raw, form = options.shape(name), QUANTIZATIONS["4"]
    source = random_weights(raw, form=form)
    quantization = {"bits": form.bits, "group_size": form.group_size, "mode": form.mode}
    target = options.work / name
    tensors = ((each, source.read(each)) for each in source.headers)
    write_checkpoint(target, tensors, {**raw, "quantization": quantization})
    return target


def gguf_file(options: Options, name: str) -> Path:
    """The shape of a Llama in llama.cpp's Q4_K_M: Q4_K, but Q6_K for half of the values and of the down-projections."""
    import numpy as np
    from gguf import GGMLQuantizationType as Type
    from gguf_bytes import file_bytes, vocabulary
    from gguf_cases import blocks
    from gguf_writer import metadata_of

    raw = options.shape(name)
    hidden, wide, count = raw["hidden_size"], raw["intermediate_size"], raw["num_hidden_layers"]
    size = raw.get("head_dim") or hidden // raw["num_attention_heads"]
    queries, keys = raw["num_attention_heads"] * size, raw["num_key_value_heads"] * size
    one = np.ones(hidden, np.float32)
    tensors: dict[str, Any] = {
        "token_embd.weight": (blocks(Type.Q6_K, raw["vocab_size"], hidden, 0, 4e-4), Type.Q6_K),
        "output_norm.weight": (one, Type.F32),
    }
    matrices = {
        "attn_q": (queries, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden),
        "attn_output": (hidden, queries), "ffn_gate": (wide, hidden), "ffn_up": (wide, hidden),
        "ffn_down": (hidden, wide),
    }  # fmt: skip
    for layer in range(count):
        tensors |= {f"blk.{layer}.{norm}_norm.weight": (one, Type.F32) for norm in ("attn", "ffn")}
        for matrix, shape in matrices.items():
            finer = matrix in ("attn_v", "ffn_down") and layer % 2 == 0
            kind = Type.Q6_K if finer else Type.Q4_K
            tensors[f"blk.{layer}.{matrix}.weight"] = (blocks(kind, *shape, layer, 4e-4), kind)
    target = options.work / f"{name}.gguf"
    target.write_bytes(file_bytes({**metadata_of(raw), **vocabulary(raw["vocab_size"])}, tensors))
    return target


def rates(python: str, kind: str, model: Path, small: bool) -> tuple[dict[str, float], str]:
    """Tokens per second of each test, the best of four, and the engine's version; see bench_peer_worker.py."""
    process = subprocess.Popen(
        [python, str(WORKER), kind, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT) if kind == "runner" else ""},
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    version = json.loads(process.stdout.readline())["version"]
    found = {}
    full, trial = (("pp", 512, 0), ("pp", 4096, 0), ("tg", 128, 512)), (("pp", 16, 0), ("tg", 4, 16))
    for what, tokens, depth in trial if small else full:
        request = json.dumps({"do": what, "tokens": tokens, "depth": depth})
        seconds = []
        for _ in range(2 if small else 5):  # the first warms up
            print(request, file=process.stdin, flush=True)
            seconds.append(json.loads(process.stdout.readline())["seconds"])
        found[f"{what}{tokens}" + (f" @ d{depth}" if depth else "")] = tokens / min(seconds[1:])
    process.stdin.close()
    process.wait(timeout=60)
    return found, f"{kind} {version}"


def answer(engine: Any, prompt: int, tokens: int) -> Iterator[int]:
    """The ids of a greedy answer to a random prompt, through all that an answer passes but the tokenizer."""
    import numpy as np

    from runner.engine.prompt_cache import PromptCache
    from runner.engine.request import Run
    from runner.engine.sampling import SamplingParams
    from runner.engine.ticket import Order

    ids = np.random.default_rng(SEED).integers(0, engine.config.vocab_size, prompt).tolist()
    order = Order(ids=ids, params=SamplingParams(temperature=0.0), budget=tokens)
    run = Run(engine, PromptCache(engine, keeps=False), order)
    return (token.id for token in run if token is not None)


def threads(options: Options) -> Iterator[str]:
    """An answer of which each token is asked for by a new thread, beside the same answer from one thread."""
    engine = random_engine(options, "SmolLM2-135M", form="4")
    wanted = list(answer(engine, 64, 200))
    before, found, tokens = threading.active_count(), [], answer(engine, 64, 200)
    rows: list[tuple[object, ...]] = [("tokens", "threads of Python", "memory at most, GB")]
    for index in range(200):
        asking = threading.Thread(target=lambda: found.append(next(tokens)))
        asking.start()
        asking.join()
        if index % 50 == 49:
            rows.append((index + 1, threading.active_count() - before, f"{resident():.2f}"))
    yield f"The same tokens: {'yes' if found == wanted else 'NO'}\n"
    yield from table(*rows)


def resident() -> float:
    """The most that this process held in memory, in GB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (most if sys.platform == "darwin" else most * 1024) / 1e9


def memory(options: Options) -> Iterator[str]:
    """What MLX and the process hold after a prompt of 8,000 tokens and an answer of 300."""
    import mlx.core as mx

    from runner.ops.memory import Memory

    rows: list[tuple[object, ...]] = [
        ("model", "weights", "cache of 8,300", "MLX's own peak", "with freed buffers", "kept after", "process at most")
    ]
    for name in ("Llama-3.2-1B", "Gemma-3-1B"):
        engine = random_engine(options, name, form="4")
        mx.reset_peak_memory()
        watched = Memory(engine.device.keeps)
        for _ in answer(engine, 8000, 300):
            watched.look()
        sizes = (engine.nbytes, cache_bytes(engine, 8300), mx.get_peak_memory(), watched.peak, mx.get_cache_memory())
        rows.append((name, *(f"{size / 1e9:.2f} GB" for size in sizes), f"{resident():.2f} GB"))
    yield from table(*rows)


def cache_bytes(engine: Any, tokens: int) -> int:
    """Bytes of keys and values of a sequence."""
    from runner.config.memory import needed

    memories = (each for layer in range(engine.config.num_hidden_layers) for each in engine.config.memory(layer))
    return needed(memories, tokens, engine.dtype.size)


def wired(options: Options) -> Iterator[str]:
    """What the wired limit is set to during answers: two in turn, one that is broken off; and what it is at the end."""
    from runner.engine import loaded as engines
    from runner.ops.metal import Metal
    from runner.ops.owner import OWNER

    if options.small:
        engines.LARGE = 1
    engine = random_engine(options, "Llama-3.2-1B", form="8")
    gpu, said = engine.device.metal, []
    setter: Callable[[int], int] = (lambda nbytes: 0) if gpu is None else gpu.set_wired_limit
    if gpu is None:
        yield "No Metal here: what would be set.\n"
        gpu = Metal("none", 0, 8 << 30, 8 << 30)

    def noted(nbytes: int) -> int:
        before = setter(nbytes)
        said.append((nbytes, before))
        return before

    device = dataclasses.replace(engine.device, metal=dataclasses.replace(gpu, set_wired_limit=noted))
    engine = dataclasses.replace(engine, device=device)
    list(answer(engine, 64, 16))
    broken = answer(engine, 64, 16)
    next(broken)
    del broken
    OWNER.run(lambda: None)
    yield f"{engine.nbytes / 1e9:.2f} GB of weights (small models, under 1 GiB, have nothing wired)\n"
    yield from table(("set to, GB", "before, GB"), *((f"{new / 1e9:.2f}", f"{old / 1e9:.2f}") for new, old in said))


PARTS: dict[str, Callable[[Options], Iterator[str]]] = {
    "machine": machine,
    "logits": logits,
    "speed": speed,
    "threads": threads,
    "memory": memory,
    "wired": wired,
    "suite": suite,
}
LIMITS = {"machine": 300, "logits": 300, "speed": 400, "threads": 120, "memory": 240, "wired": 120, "suite": 900}
"""Seconds; a report takes some ten minutes on an M2, most of them for the suite."""

if __name__ == "__main__":
    main()
