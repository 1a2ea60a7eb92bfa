"""A checkpoint that answers what it is told to: a GPT-2 whose next token depends on the position alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from runner.text.tokenizer import Tokenizer

WIDTH, POSITIONS = 288, 512
END = "<|endoftext|>"


def scripted(
    path: Path,
    turns: Sequence[tuple[Sequence[Mapping[str, str]], str]],
    *,
    template: str,
    special: Sequence[str] = (),
    added: Sequence[str] = (),
) -> Path:
    """Write a checkpoint that, asked each of the chats, gives the answer beside it, and then the end token.

    Tokens are single bytes, `special` tokens and `added` ones. Word and position embeddings are one-hot vectors, the
    latter ten times as long, and all layers are zero: the tied head reads off the position what comes next.
    """
    path.mkdir(parents=True, exist_ok=True)
    library = tokenizers.Tokenizer(
        models.BPE({letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([END, *special])
    library.add_tokens(list(added))
    library.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "chat_template": template}))
    tokenizer = Tokenizer.from_directory(path)
    end = tokenizer.special_tokens[END]
    config = {
        "model_type": "gpt2", "vocab_size": WIDTH, "n_embd": WIDTH, "n_head": 9, "n_layer": 1, "n_inner": 32,
        "n_positions": POSITIONS, "n_ctx": POSITIONS, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "bos_token_id": end, "eos_token_id": end, "torch_dtype": "float32",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    script = [end] * POSITIONS
    for messages, answer in turns:
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        said = [*tokenizer.encode(answer, add_special_tokens=False, parse_special=True), end]
        script[len(asked) - 1 : len(asked) - 1 + len(said)] = said
    mx.save_safetensors(str(path / "model.safetensors"), weights(script[:POSITIONS]))
    return path


def weights(script: Sequence[int]) -> dict[str, mx.array]:
    """The tensors, by GPT-2's names."""
    zeros = {
        "attn.c_attn.weight": (WIDTH, 3 * WIDTH), "attn.c_attn.bias": (3 * WIDTH,),
        "attn.c_proj.weight": (WIDTH, WIDTH), "attn.c_proj.bias": (WIDTH,),
        "mlp.c_fc.weight": (WIDTH, 32), "mlp.c_fc.bias": (32,),
        "mlp.c_proj.weight": (32, WIDTH), "mlp.c_proj.bias": (WIDTH,),
        "ln_1.weight": (WIDTH,), "ln_1.bias": (WIDTH,), "ln_2.weight": (WIDTH,), "ln_2.bias": (WIDTH,),
    }  # fmt: skip
    words = mx.eye(WIDTH)
    return {
        **{f"h.0.{name}": mx.zeros(shape) for name, shape in zeros.items()},
        "wte.weight": words,
        "wpe.weight": 10 * words[mx.array(list(script))],
        "ln_f.weight": mx.ones((WIDTH,)),
        "ln_f.bias": mx.zeros((WIDTH,)),
    }
