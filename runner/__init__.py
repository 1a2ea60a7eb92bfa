"""Transformer inference on MLX, in a small code base.

    import runner
    lm = runner.load("path-or-hub-id")
    for chunk in lm.stream("Once upon a time", max_tokens=64):
        print(chunk.text, end="")

Importing this package imports neither MLX nor huggingface_hub; each name in `__all__` is imported at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.answer import Chunk as Chunk
    from runner.answer import Generation as Generation
    from runner.engine.sampling import SamplingParams as SamplingParams
    from runner.errors import RunnerError as RunnerError
    from runner.language_model import LanguageModel as LanguageModel
    from runner.language_model import load as load

__version__ = "0.1.0"

_LAZY = {
    "Chunk": "runner.answer",
    "Generation": "runner.answer",
    "LanguageModel": "runner.language_model",
    "RunnerError": "runner.errors",
    "SamplingParams": "runner.engine.sampling",
    "load": "runner.language_model",
}

__all__ = ["Chunk", "Generation", "LanguageModel", "RunnerError", "SamplingParams", "load"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'runner' has no attribute {name!r}")
    if _LAZY[name] != "runner.errors":  # every other module needs MLX: say early why it cannot run
        from runner.ops.backend import require

        require()
    return getattr(importlib.import_module(_LAZY[name]), name)
