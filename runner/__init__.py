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
    from runner.answer import Timings as Timings
    from runner.constraints import Choice as Choice
    from runner.constraints import JsonObject as JsonObject
    from runner.constraints import JsonSchema as JsonSchema
    from runner.constraints import Lark as Lark
    from runner.constraints import Regex as Regex
    from runner.engine.prompt_cache import PromptCache as PromptCache
    from runner.engine.sampling import SamplingParams as SamplingParams
    from runner.errors import RunnerError as RunnerError
    from runner.errors import RunnerWarning as RunnerWarning
    from runner.errors import UsageError as UsageError
    from runner.language_model import LanguageModel as LanguageModel
    from runner.language_model import load as load
    from runner.many import Engine as Engine

__version__ = "0.1.0"

_LAZY = {
    "Choice": "runner.constraints",
    "Chunk": "runner.answer",
    "Engine": "runner.many",
    "Generation": "runner.answer",
    "JsonObject": "runner.constraints",
    "JsonSchema": "runner.constraints",
    "LanguageModel": "runner.language_model",
    "Lark": "runner.constraints",
    "PromptCache": "runner.engine.prompt_cache",
    "Regex": "runner.constraints",
    "RunnerError": "runner.errors",
    "RunnerWarning": "runner.errors",
    "SamplingParams": "runner.engine.sampling",
    "Timings": "runner.answer",
    "UsageError": "runner.errors",
    "load": "runner.language_model",
}

__all__ = [
    "Choice",
    "Chunk",
    "Engine",
    "Generation",
    "JsonObject",
    "JsonSchema",
    "LanguageModel",
    "Lark",
    "PromptCache",
    "Regex",
    "RunnerError",
    "RunnerWarning",
    "SamplingParams",
    "Timings",
    "UsageError",
    "load",
]


def __dir__() -> list[str]:
    """The public names, for completion and `help`."""
    return [*__all__, "__doc__", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'runner' has no attribute {name!r}")
    if _LAZY[name] != "runner.errors":  # every other module needs MLX: say early why it cannot run
        from runner.ops.backend import require

        require()
    return getattr(importlib.import_module(_LAZY[name]), name)
