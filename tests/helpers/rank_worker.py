"""One process of a run over every fixture: rank 0 compares what all compute together with what it computes alone.

    python rank_worker.py RESULTS TOKENS REQUESTS TIMES FIXTURE ...

REQUESTS, where it is not 0, are answered besides, several at once, by the engine of a server. TIMES is how often a
fixture's layers come, one after another, so that there are enough for many ranks: where a layer's kind depends on its
place, the config says of more layers by `MORE`, and their weights are random.

with `RUNNER_RANKS`, `MLX_RANK` and `MLX_HOSTFILE` in the environment. Rank 0 writes a line of JSON for each fixture.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from rank_run import run_rank
from rank_twin import Twin, take_twins

from runner.bench.models import random_weights
from runner.checkpoint.model_files import open_files
from runner.engine.dtypes import choose
from runner.engine.engine import Engine
from runner.engine.loaded import Loaded, assemble
from runner.engine.part import Whole
from runner.engine.prefill import prefill
from runner.engine.replay import Steps
from runner.engine.sampler import Token
from runner.engine.sampling import SamplingParams
from runner.errors import ConfigError, UsageError, WeightsError
from runner.families import find
from runner.ops.device import current
from runner.ops.exchange import Exchange
from runner.ops.owner import OWNER
from runner.ranks.follower import Follower
from runner.ranks.leader import Leader
from runner.ranks.part import Held, held
from runner.ranks.settings import Settings
from runner.weights.loading import read_nbytes
from runner.weights.plan import plan
from runner.weights.tags import Source

DTYPE = "float32" if mx.cuda.is_available() else None
"""Of weights and activations: on a GPU, 16 bits would hide a fault behind their rounding."""

PROMPT = [1 + i % 30 for i in range(12)]
CHUNK = 5


SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA3N = {
    "num_hidden_layers": 8, "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
    "activation_sparsity_pattern": [0.95, 0.5, 0.95, 0.5, 0.0, 0.0, 0.0, 0.0], "intermediate_size": [32] * 8,
}  # fmt: skip
GEMMA4 = {"num_hidden_layers": 8, "layer_types": [SLIDING, FULL] * 4}
MORE: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v3-base": {"num_hidden_layers": 4},
    "deepseek_v32-base": {"num_hidden_layers": 4},
    "ernie4_5_moe-base": {"num_hidden_layers": 5, "moe_capacity": [8] * 5, "moe_layer_end_index": 4},
    "falcon_h1-base": {"num_hidden_layers": 4},
    "falcon_h1-norms-v5": {"num_hidden_layers": 4},
    "gemma3n_text-base": GEMMA3N,
    "gemma3n_text-v5": {**GEMMA3N, "intermediate_size": [32, 24, 32, 40, 32, 24, 32, 40]},
    "gemma4_text-base": GEMMA4,
    "gemma4_text-moe-v5": GEMMA4,
    "gemma4_text-v5": GEMMA4,
    "glm4_moe-base": {"num_hidden_layers": 4},
    "glm4_moe_lite-base": {"num_hidden_layers": 4},
    "jamba-base": {"num_hidden_layers": 5},
    "jamba-v5": {"num_hidden_layers": 5},
    "llama4_text-base": {"num_hidden_layers": 5, "moe_layers": [0, 2, 4], "no_rope_layers": [1, 1, 0, 1, 1]},
    "nemotron_h-base": {"num_hidden_layers": 8, "hybrid_override_pattern": "ME*M-M*E"},
    "nemotron_h-latent-v5": {"layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"] * 2},
    "qwen2_moe-mixed": {"num_hidden_layers": 5},
    "qwen3_moe-mixed": {"num_hidden_layers": 4, "mlp_only_layers": [1, 3]},
}
"""What a config says of at least four layers that remember something, for fixtures whose layers depend on their place.
"""


def deepened(path: Path, times: int, *, last: bool = False) -> tuple[Mapping[str, Any], Source]:
    """A model whose layers come so many times, one after another, or whose `last` one does, or that is in `MORE`."""
    files = open_files(path)
    if times == 1:
        return files.config, files.source
    if path.name in MORE:
        config = {**files.config, **MORE[path.name]}
        if "per_layer_config" in config:  # by the kind of layer: every second one
            config["per_layer_config"] = {**config["per_layer_config"], "7": config["per_layer_config"]["5"]}
        return config, random_weights(config, dtype="float32")
    name = next((each for each in COUNTS if each in files.config), None)
    if name is None:
        raise ConfigError("no number of layers")
    count = files.config[name]

    def longer(value: Any) -> Any:
        if not isinstance(value, list) or len(value) != count:
            return value
        return value + value[-1:] * (times - 1) * count if last else value * times

    config = {key: longer(value) for key, value in files.config.items()}
    names = Names(count, times, last)
    for key in ("quantization", "quantization_config"):  # of single layers, by their names
        if isinstance(config.get(key), dict):
            config[key] = {new: value for old, value in config[key].items() for new in names.of(old)}
    return {**config, name: count * times}, Deep(files.source, names)


@dataclass(frozen=True)
class Names:
    """What a name stands for, where `count` layers come so many times, or the last of them does."""

    count: int
    times: int
    last: bool

    def of(self, name: str) -> list[str]:
        """The name of the same thing in each layer."""
        found = LAYER.search(name)
        if found is None or (self.last and int(found[2]) < self.count - 1):
            return [name]
        first, step = int(found[2]), 1 if self.last else self.count
        places = range(first, self.count * self.times, step)
        return [f"{found[1]}{place}.{name[found.end() :]}" for place in places]


class Deep:
    """A source with a model's layers several times, or its `last` one."""

    def __init__(self, source: Source, names: Names) -> None:
        self._source = source
        self._names = {new: name for name in source.headers for new in names.of(name)}
        self.headers = {name: source.headers[stored] for name, stored in self._names.items()}

    def read(self, name: str) -> mx.array:
        return self._source.read(self._names[name])


def follow(message: Mapping[str, Any], part: Follower) -> Loaded:
    """Open what rank 0 has."""
    config, source = deepened(Path(message["model"]), message["times"], last=message["last"])
    return OWNER.run(lambda: assemble(config, source, dtype=DTYPE, part=part))


COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LAYER = re.compile(r"(^(?:[a-z_]+\.)*(?:layers|h|blocks)\.)(\d+)\.")


def answered(engine: Loaded, tokens: int) -> tuple[list[int], np.ndarray]:
    """Greedy tokens behind a prompt that is read in chunks, and the logits of each."""
    caches, ops = engine.new_caches(), engine.device.ops
    logits = prefill(engine.model, PROMPT, caches, chunk=CHUNK)
    steps, found, rows = Steps(engine.model, caches, ops), [], []
    for index in range(tokens):
        token = ops.argmax(logits)
        ops.schedule(token)
        # As an answer is computed: the next step is built before the last one's token is read.
        following = steps(token.reshape(1, 1))[0] if index + 1 < tokens else logits
        found.append(int(token.item()))
        rows.append(np.array(logits.astype(mx.float32)))
        logits = following
    return found, np.stack(rows)


def served(engine: Loaded, requests: int) -> tuple[list[list[Token]], int]:
    """Answers to requests that begin alike, and how many tokens of them were not read again.

    Up to five come together, of which three are computed at once: others begin beside answers that are under way.

    Few bytes are kept of earlier ones, so that some go, and others are copied.
    """
    draw = random.Random(0)
    begun = [draw.choices(range(1, 31), k=24) for _ in range(3)]
    # Every second one's tokens may be picked where they are computed.
    kinds = [SamplingParams(temperature=0.0, logprobs=0), SamplingParams(temperature=0.0)]
    found: list[list[Token]] = []
    with Engine(engine, memory=1 << 30, rows=3, prefixes=int(engine.footprint.of(1) * 2.5)) as answering:
        while len(found) < requests:
            waiting = []
            for _ in range(min(draw.randint(1, 5), requests - len(found))):
                at = draw.choice((6, 12, 18, 24))
                prompt = [*draw.choice(begun)[:at], *draw.choices(range(1, 31), k=draw.randint(1, 9))]
                params = kinds[(len(found) + len(waiting)) % 2]
                waiting.append(answering.submit(prompt, params, max_tokens=draw.randint(1, 6), turns=(at,)))
            found += [list(ticket) for ticket in waiting]
        return found, answering.status().prefixes.reused


def distance(ones: list[list[Token]], others: list[list[Token]]) -> float:
    """How far apart the log-probabilities of the same answers are; infinite where the answers differ."""
    pairs = [pair for one, other in zip(ones, others, strict=True) for pair in itertools.zip_longest(one, other)]
    if any(one is None or other is None or one.id != other.id for one, other in pairs):
        return float("inf")
    known = [(one.logprob, other.logprob) for one, other in pairs if one.logprob is not None]
    return max((abs(one - other) for one, other in known), default=0.0)


def expected(raw: Mapping[str, Any], source: Source, settings: Settings) -> list[Held]:
    """What each rank should hold and send, from headers alone."""
    config_class, model_class = find(raw)
    config = config_class.from_dict(raw)
    device = current()
    dtypes = choose(DTYPE, device, raw, source.headers)
    provided = {"ops": device.ops, "activations": dtypes.activations}
    layout = plan(model_class, config, source.headers, provided)
    whole = Whole(model_class, layout, config, source, provided, dtypes.weights)
    return [held(whole, settings, Exchange(rank, settings.size)) for rank in range(settings.size)]


def compared(path: Path, leader: Leader, tokens: int, requests: int, times: int) -> dict[str, Any]:
    """What comes of one fixture."""
    for often, last in ((times, False), (times, True), (1, False)):
        try:
            config, source = deepened(path, often, last=last)
            single = OWNER.run(lambda config=config, source=source: assemble(config, source, dtype=DTYPE))
            break
        except (ConfigError, WeightsError):  # layers are told apart by their numbers
            if often == 1:
                raise
    try:
        wanted = OWNER.run(lambda: expected(config, source, leader.settings))
    except UsageError as error:
        return {"refused": str(error)}
    alone_tokens, alone = OWNER.run(lambda: answered(single, tokens))

    def shared() -> Loaded:
        leader.begin(model=str(path), times=often, last=last)
        return assemble(config, source, dtype=DTYPE, part=leader)

    engine = OWNER.run(shared)
    before = OWNER.run(leader.sent)  # on loading, models look at how large keys are
    found_tokens, found = OWNER.run(lambda: answered(engine, tokens))
    after = OWNER.run(leader.sent)
    deviation = float(np.std(alone)) or 1.0
    passes = len(PROMPT) + tokens - 1
    # Of a table and a head that are stored apart, the files alone do not say whether they are equal and so one.
    arrays = [array for array in engine.part.whole.arrays() if array.same_as is not None]
    apart = any(not mx.array_equal(*(source.read(t.name) for t in (a.tree, a.same_as))) for a in arrays)
    begun = Twin.begun
    several = [served(one, requests) for one in (single, engine)] if requests else [([], 0)] * 2
    gc.collect()
    OWNER.run(leader.sent)  # tells of what is gone, too
    return {
        "tokens": found_tokens == alone_tokens,
        "equal": bool(np.array_equal(found, alone)),
        "error": float(np.abs(found - alone).max()) / deviation,
        "held": [read_nbytes(engine.model.model, engine.layout), *leader.loaded],
        "held_said": [each.nbytes + each.twins * apart for each in wanted],
        "sent": [there - here for there, here in zip(after, before, strict=True)],
        "sent_said": [each.sends * passes + each.draws * tokens for each in wanted],
        "served": distance(several[0][0], several[1][0]) / deviation,
        "reused": several[1][1],
        "kept": max(OWNER.run(leader.kept)),
        "steps": Twin.begun - begun,
    }


def main() -> None:
    if os.environ.get("RANK_TWIN") == "1":
        take_twins()
    results, tokens, requests, times, *fixtures = sys.argv[1:]

    def found(path: Path, leader: Leader) -> dict[str, Any]:
        return compared(path, leader, int(tokens), int(requests), int(times))

    run_rank(results, [Path(fixture) for fixture in fixtures], follow, found, lambda path: {"path": path.name})


if __name__ == "__main__":
    main()
