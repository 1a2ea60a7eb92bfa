"""Exceptions of this package. Errors that a user can cause derive from `RunnerError` and have a message for people."""

from __future__ import annotations


class RunnerError(Exception):
    """Base of every error this package raises on purpose; the command line prints it and exits 1."""


class RunnerWarning(UserWarning):
    """A model was loaded, but something in its files was ignored or guessed; the command line prints it as a note."""


class UsageError(RunnerError, ValueError):
    """An argument or option is wrong; the command line exits 2."""


class ConfigError(RunnerError, ValueError):
    """`config.json` or a file beside it lacks a key, has a wrong value, or a key that could change numbers and is not
    understood."""


class CheckpointError(RunnerError, ValueError):
    """A checkpoint's files are missing, malformed or unsafe to read."""


class WeightsError(CheckpointError):
    """Names, shapes or dtypes of tensors do not fit the model; the message lists all problems, one per line."""


class TokenizerError(RunnerError, ValueError):
    """A tokenizer is missing, malformed, or cannot represent the input."""


class TemplateError(RunnerError, ValueError):
    """A chat template is missing, unsafe or too expensive, failed, or refuses the messages."""


class ContextLengthError(UsageError):
    """A prompt does not fit the context window; the attributes have both lengths in tokens.

    A prompt that is too long by its bytes alone is not split into tokens: then the length is the least it can have.
    """

    def __init__(self, prompt_tokens: int, context_length: int, *, at_least: bool = False) -> None:
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length
        least = "at least " if at_least else ""
        super().__init__(
            f"the prompt has {least}{prompt_tokens} tokens, but the context window holds {context_length} "
            "(prompt and at least one new token must fit): shorten the prompt"
        )


class NumericsError(RunnerError, ArithmeticError):
    """A model's logits are not numbers to choose by: NaN, plus infinity, or minus infinity for every token."""


class HubError(RunnerError, OSError):
    """A model could not be found or fetched from the hub."""


class UserFileError(RunnerError, ValueError):
    """A file of the user's own, such as the table of names, is damaged or cannot be written."""


class BackendError(RunnerError, RuntimeError):
    """MLX has no usable backend on this machine, or it failed."""


class RunOver(BackendError):
    """A run of several processes is over: nothing can be computed any more."""
