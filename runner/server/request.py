"""One kind of request, whichever API it came by: what to answer, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.constraints import Constraint
from runner.server.errors import ApiError, invalid

MAX_CHOICES = 32
MAX_TOOLS = 512
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_LENGTH = 4096


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation to answer, in OpenAI's shapes.

    Attributes:
        variables: further variables for the template.
        effort: how much to reason, in OpenAI's words ("none" to "high", or what else the template knows); None: as the
            template does by itself.
        continues: whether the answer goes on with the last message, the assistant's, instead of a new one.
        tools: functions that the model may call, in OpenAI's form.
        choice: "auto"; "none": no function is called; "required": one is; or the name of the one that is.
        strict: whether arguments are held to their schemas where the model calls by itself, too.
        parallel: whether an answer may have several calls.
    """

    messages: Sequence[Mapping[str, Any]]
    variables: Mapping[str, Any] = field(default_factory=dict)
    effort: str | None = None
    continues: bool = False
    tools: Sequence[Mapping[str, Any]] = ()
    choice: str = "auto"
    strict: bool = False
    parallel: bool = True

    @property
    def offered(self) -> Sequence[Mapping[str, Any]]:
        """The functions that the model is told of."""
        return self.tools if self.choice != "none" else ()

    @property
    def forced(self) -> Sequence[Mapping[str, Any]]:
        """The functions one of which must be called; none where the model decides.

        Raises:
            ApiError: there is no such function.
        """
        if self.choice in ("auto", "none"):
            return ()
        named = [tool for tool in self.tools if self.choice in ("required", tool["function"]["name"])]
        if not named:
            told = (
                "needs tools"
                if self.choice == "required"
                else f"names {self.choice[:100]!r}, which is none of the tools"
            )
            raise invalid(f"tool_choice {told}", "tool_choice")
        return named


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text to continue, or its ids.

    Attributes:
        suffix: a text that stands behind what is to be written; None: there is none. For a text alone, not for ids.
        special: whether the text of special tokens in it means those tokens, as clients that fill in the middle expect.
    """

    prompt: str | Sequence[int]
    suffix: str | None = None
    special: bool = True


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request.

    Attributes:
        sampling: fields of `SamplingParams`; what is absent is the model's own.
        max_tokens: the most tokens of an answer; None: what is left of the context.
        stop: texts before which an answer ends; None: the model's own.
        choices: how many answers to give.
        constraint: what the answer must be; None: any text.
        context: how many tokens prompt and answer may have together; None: as many as the model can hold.
        priority: requests with a higher one go first.
        ignore_eos: whether end tokens are kept from coming, so that an answer has its full length.
        fields: what the request calls a field of this, or of `SamplingParams`, where that is another name: errors name
            what the client has written.
    """

    prompt: Chat | Text
    sampling: Mapping[str, Any]
    max_tokens: int | None = None
    stop: Sequence[str] | None = None
    choices: int = 1
    constraint: Constraint | None = None
    context: int | None = None
    priority: int = 0
    ignore_eos: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)

    def wrong(self, name: str, message: str) -> ApiError:
        """The error for a field of this, or of `SamplingParams`; `message` begins with its name."""
        called = self.fields.get(name, name)
        return invalid(called + message.removeprefix(name), called)
