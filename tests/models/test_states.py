"""Models whose layers carry states: no result depends on where a prompt is cut, nor on what was tried before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from references import FIXTURES, TOLERANCE, error

import runner
from runner.answer import Chunk
from runner.config.memory import State
from runner.engine.loaded import open_loaded
from runner.engine.prefill import new_caches, prefill
from runner.engine.prompt_cache import PromptCache
from runner.families import find
from runner.language_model import LanguageModel
from runner.nn.batch import Batch


def has_states(path: Path) -> bool:
    raw = json.loads((path / "config.json").read_text())
    config = find(raw)[0].from_dict(raw)
    memories = [memory for index in range(config.num_hidden_layers) for memory in config.memory(index)]
    return any(isinstance(memory, State) for memory in memories)


STATEFUL = [path for path in FIXTURES if has_states(path)]
by_name = pytest.mark.parametrize("path", STATEFUL, ids=lambda path: path.name)
PROMPT = [1, *(8 + i * i % 37 for i in range(99))]
"""Longer than 64, at which chunked recurrences have a border, and no multiple of 16."""


@by_name
def test_a_prompt_can_be_cut_anywhere(path: Path) -> None:
    engine = open_loaded(path, dtype="float32")
    whole = prefill(engine.model, PROMPT, new_caches(engine.config))
    for chunk in (1, 7, 16, 64):
        assert error(prefill(engine.model, PROMPT, new_caches(engine.config), chunk=chunk), whole) < TOLERANCE, chunk


@by_name
def test_a_reserved_pass_can_be_taken_back_to_each_of_its_tokens(path: Path) -> None:
    """As speculation does; what follows is as if the tokens that were taken back had never been fed."""
    engine = open_loaded(path, dtype="float32")
    last = mx.array([[PROMPT[30]]])
    for accepted in (0, 1, 3, 5):
        caches, fresh = engine.new_caches(), engine.new_caches()
        mx.eval(prefill(engine.model, PROMPT[:20], caches))
        caches.reserve(5)
        mx.eval(engine.model(Batch(mx.array([PROMPT[20:25]]), 20), caches))
        assert caches.reach(20 + accepted) == 20 + accepted
        caches.rewind(20 + accepted)
        mx.eval(prefill(engine.model, PROMPT[: 20 + accepted], fresh))
        found, wanted = (engine.model.logits(engine.model(Batch(last, c.offset), c)) for c in (caches, fresh))
        assert error(found, wanted) < TOLERANCE


def with_tokenizer(path: Path, tmp_path: Path) -> LanguageModel:
    """The fixture, whose directory has no tokenizer, with one of a character for each id."""
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    size = json.loads((path / "config.json").read_text())["vocab_size"]
    model = {"type": "BPE", "vocab": {chr(0x4E00 + token): token for token in range(size)}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    return runner.load(tmp_path, dtype="float32")


def answer(lm: LanguageModel, ids: list[int], kept: PromptCache | None) -> list[Chunk]:
    bias = {token: -1e9 for token in lm.eos_token_ids if token < lm.engine.config.vocab_size}
    return list(lm.stream(ids, max_tokens=5, temperature=0, logit_bias=bias, prompt_cache=kept))


@by_name
def test_a_chat_of_six_turns_with_an_edit_is_a_fresh_start_each_time(path: Path, tmp_path: Path) -> None:
    """Of each prompt only what is new is read, but for the turn that edits an earlier one."""
    lm = with_tokenizer(path, tmp_path)
    kept, history, again = lm.prompt_cache(), PROMPT[:20], []
    for turn in range(6):
        if turn == 3:
            history = [*history[:24], 40, *history[25:]]  # edited in the middle: back to a mark before it
        found = answer(lm, history, kept)
        assert [chunk.token for chunk in found] == [chunk.token for chunk in answer(lm, history, None)]
        assert found[-1].timings is not None
        again.append(len(history) - found[-1].timings.cached_tokens)
        history = [*history, *(chunk.token for chunk in found), *PROMPT[turn + 3 : turn + 8]]
    assert again[0] == 20 and all(count <= 7 for count in again[1:3] + again[4:]), again
    assert again[3] <= len(PROMPT[:20]) + 3 * 10 + 1 - 19, again  # not from the start: the first prompt stays
