"""What a chat needs of a model: one of this machine here, one behind a server in `chat_server.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from runner.cli import engine
from runner.cli.conversation import Message
from runner.cli.template_options import checked_system, template_kwargs

if TYPE_CHECKING:
    from runner.answer import Chunk
    from runner.language_model import LanguageModel


class ChatModel(Protocol):
    """A model to chat with."""

    @property
    def name(self) -> str:
        """What to call it."""
        ...

    @property
    def reasoning_key(self) -> str | None:
        """The key of a message under which reasoning goes back to it; None: it does not."""
        ...

    @property
    def template(self) -> str:
        """Its chat template, for people."""
        ...

    def variables(self, given: Mapping[str, Any], thinking: str | None) -> dict[str, Any]:
        """Variables for the template; raises UsageError where it does not know one, or cannot turn reasoning off."""
        ...

    def checked_system(self, text: str, variables: Mapping[str, Any], name: str) -> str:
        """A system message that the model reads; raises UsageError where it does not."""
        ...

    def keywords(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
        """The keywords for an answer, and a note where nothing says how to sample."""
        ...

    def shown(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that hold where `given` are asked for: those of sampling, `max_tokens` and `stop`."""
        ...

    def stream(
        self,
        messages: Sequence[Message],
        keywords: Mapping[str, Any],
        variables: Mapping[str, Any],
        on_prefill: Callable[[int, int], None],
        cancelled: Callable[[], bool],
    ) -> Iterator[Chunk]:
        """The answer as it comes; the last chunk says why it ended."""
        ...

    def length_note(self, last: Chunk, max_tokens: int | None) -> str:
        """What ended an answer whose length did."""
        ...

    def info(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> dict[str, str]:
        """What is known of it, and of a conversation with it, for people."""
        ...


class LocalModel:
    """A model that is loaded here."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._cache = lm.prompt_cache()

    @property
    def name(self) -> str:
        """What to call it."""
        return self._lm.name

    @property
    def reasoning_key(self) -> str | None:
        """The key that its template reads reasoning from."""
        return self._lm.tokenizer.reasoning_key()

    @property
    def template(self) -> str:
        """Its chat template."""
        return self._lm.tokenizer.template_sources.get("default", "(no default template)")

    def variables(self, given: Mapping[str, Any], thinking: str | None) -> dict[str, Any]:
        """Variables for the template."""
        return template_kwargs(self._lm.tokenizer, given, thinking)

    def checked_system(self, text: str, variables: Mapping[str, Any], name: str) -> str:
        """A system message that its template writes."""
        return checked_system(self._lm.tokenizer, text, variables, name=name)

    def keywords(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
        """See `engine.sampling_of`."""
        return engine.sampling_of(self._lm, given)

    def shown(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What holds."""
        lm, chosen = self._lm, self.keywords(given)[0]
        params = vars(lm.sampling)
        params = vars(lm.sampling.replace(**{name: chosen[name] for name in params if name in chosen}))
        rest = "what is left of the context"
        limit = given.get("max_tokens") or lm.defaults.max_new_tokens or rest
        return {**params, "max_tokens": limit, "stop": given.get("stop", lm.defaults.stop)}

    def stream(
        self,
        messages: Sequence[Message],
        keywords: Mapping[str, Any],
        variables: Mapping[str, Any],
        on_prefill: Callable[[int, int], None],
        cancelled: Callable[[], bool],
    ) -> Iterator[Chunk]:
        """The answer as it comes."""
        return self._lm.chat_stream(
            messages,
            prompt_cache=self._cache,
            on_prefill=on_prefill,
            cancelled=cancelled,
            template_kwargs=dict(variables),
            **keywords,
        )

    def length_note(self, last: Chunk, max_tokens: int | None) -> str:
        """See `engine.length_note`."""
        return engine.length_note(self._lm, last, max_tokens)

    def info(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> dict[str, str]:
        """What is known of it."""
        lm, used = self._lm, 0
        if messages:
            used = len(lm.tokenizer.apply_chat_template(messages, **variables))
        return {
            "model": str(lm.path),
            "family": str(lm.config.model_type),
            "weights": f"{lm.nbytes / 1e9:.2f} GB in memory",
            "device": lm.device.name,
            "context": f"{lm.context_length} tokens, {used} of them used by {len(messages)} messages",
        }
