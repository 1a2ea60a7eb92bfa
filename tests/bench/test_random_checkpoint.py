"""scripts/bench/random_checkpoint: its tokenizer, by the library that others load it with."""

from __future__ import annotations

import json
import runpy

import tokenizers
from places import ROOT

from runner.bench.serving import WORDS


def test_each_word_is_a_token_and_each_id_has_a_text() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "bench" / "random_checkpoint"))["tokenizer"](600, 3)
    library = tokenizers.Tokenizer.from_str(json.dumps(made))
    words = [f" {word}" for word in WORDS.split()]
    assert len(library.encode("".join(words)).ids) == len(words)
    assert library.get_vocab_size() == 600 and library.token_to_id("<|end|>") == 3
    assert all(library.decode([at]) for at in range(600) if at != 3)
    assert library.decode(library.encode("Ünïcode, 3\n").ids) == "Ünïcode, 3\n"
