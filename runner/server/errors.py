"""Errors of requests, and the form in which each API says them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.errors import (
    BackendError,
    ContextLengthError,
    NumericsError,
    RunnerError,
    TemplateError,
    TokenizerError,
    UsageError,
)

INVALID = "invalid_request_error"


@dataclass
class ApiError(Exception):
    """A request that is not answered, and why.

    Attributes:
        status: the HTTP status.
        kind: OpenAI's name of the kind of error.
        param: the path of the field that is wrong, such as `messages[0].role`.
        code: a word that programs act on.
        retry_after: seconds after which another try may succeed.
        methods: those that the path takes, where the request had another one.
    """

    status: int
    message: str
    kind: str = INVALID
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None
    anthropic_message: str | None = None
    methods: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.message

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return {**headers, "allow": ", ".join(self.methods)} if self.methods else headers


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that no repetition makes right: 400."""
    return ApiError(400, message, param=param, code=code)


def ending() -> ApiError:
    """The end of an answer that had no more time, as the server was told to end."""
    return ApiError(503, "the server was told to end", "server_error", code="shutting_down")


def of_exception(error: BaseException) -> ApiError:
    """The error that a client sees for an exception; what nobody foresaw is a 500 without its details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        count = f"{'at least ' if 'at least' in str(error) else ''}{error.prompt_tokens}"
        return ApiError(
            400,
            f"This model's maximum context length is {error.context_length} tokens. However, your messages resulted in "
            f"{count} tokens, and at least one more must fit. Please reduce the length of the messages.",
            param="messages",
            code="context_length_exceeded",
            # Claude Code looks for these words.
            anthropic_message=f"prompt is too long: {error.prompt_tokens} tokens > {error.context_length} maximum",
        )
    if isinstance(error, TemplateError | TokenizerError):
        return invalid(str(error), "messages")
    if isinstance(error, UsageError):
        return invalid(str(error))
    if isinstance(error, NumericsError):
        return ApiError(500, str(error), "server_error", code="numerics")
    if isinstance(error, BackendError):
        return ApiError(503, str(error), "server_error", code="engine_failed")
    if isinstance(error, MemoryError):
        return ApiError(503, "out of memory: try again later, or a shorter prompt", "server_error", retry_after=5)
    if isinstance(error, RunnerError):
        return ApiError(500, str(error), "server_error")
    return ApiError(500, "the server failed; its log says more", "server_error")


def openai_form(error: ApiError) -> dict[str, Any]:
    """OpenAI's form: code and param become attributes of the client's exception."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


_ANTHROPIC: Mapping[int, str] = {
    400: INVALID,
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


def anthropic_form(error: ApiError) -> dict[str, Any]:
    """Anthropic's form."""
    kind = _ANTHROPIC.get(error.status, INVALID if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.anthropic_message or error.message}}


def ollama_form(error: ApiError) -> dict[str, Any]:
    """Ollama's form: a text."""
    return {"error": error.message}


def form_for(path: str, error: ApiError) -> dict[str, Any]:
    """The form of the API to which a path belongs."""
    if path.startswith("/v1/messages"):
        return anthropic_form(error)
    return ollama_form(error) if path.startswith("/api/") else openai_form(error)
