"""The one exception tree. What users can cause derives from `RunnerError`; its message is a readable line (or list)."""

from __future__ import annotations


class RunnerError(Exception):
    """Base of every error this package raises on purpose; the command line prints it and exits 1."""


class UsageError(RunnerError, ValueError):
    """An argument or option is wrong; the command line exits 2."""


class ConfigError(RunnerError, ValueError):
    """`config.json` (or a sibling) misses a key, has a bad value, or a key that would change numbers and is unknown."""


class CheckpointError(RunnerError, ValueError):
    """A checkpoint's files are missing, malformed or unsafe to read."""


class WeightsError(CheckpointError):
    """Tensor names, shapes or dtypes do not fit the model: every problem at once, one per line."""


class TokenizerError(RunnerError, ValueError):
    """A tokenizer is missing, malformed, or cannot represent the input."""


class TemplateError(RunnerError, ValueError):
    """A chat template is missing, unsafe, too expensive, or raised an exception of its own."""


class ContextLengthError(UsageError):
    """A prompt does not fit the context window; carries both numbers."""

    def __init__(self, prompt_tokens: int, context_length: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length
        super().__init__(
            f"the prompt has {prompt_tokens} tokens, but the context window holds {context_length} "
            "(prompt and at least one new token must fit): shorten the prompt"
        )


class HubError(RunnerError, OSError):
    """A model could not be found or fetched from the hub."""


class BackendError(RunnerError, RuntimeError):
    """MLX has no usable backend on this machine, or it failed."""
