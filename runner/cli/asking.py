"""How a prompt is put to a model: as a message through its chat template, or raw, as text to be continued."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from runner.cli import terminal
from runner.cli.conversation import Conversation, Message
from runner.cli.options import System
from runner.cli.template_options import TemplateArg, checked_system, parsed, template_kwargs
from runner.errors import UsageError

if TYPE_CHECKING:
    from runner.answer import Chunk
    from runner.language_model import LanguageModel
    from runner.text.tokenizer import Tokenizer

RAW = "Raw text (--raw)"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class AskingOptions:
    """Options for the way; those of one way are refused with the other, by name."""

    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Ask through the model's chat template, or let the model continue the text as it is. "
            "Default: --chat if the model has a template, else --raw with a note.",
        ),
    ] = None
    system: System = None
    template_arg: TemplateArg = None
    parse_special: Annotated[
        bool,
        typer.Option(
            "--parse-special",
            help="Take special tokens that the text spells, such as <|im_end|>, for those tokens.",
            rich_help_panel=RAW,
        ),
    ] = False
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="Begin with the token for the beginning of a text, or without. Default: as the model's files say.",
            rich_help_panel=RAW,
        ),
    ] = None

    def check(self, **others: Any) -> None:
        """Refuse options that exclude each other, before a model is loaded in vain; raises UsageError.

        Args:
            others: further options that need a template, by name; None where they were not given.
        """
        for option in self._of_templates(others) if self.chat is False else ():
            raise UsageError(f"{option} needs the chat template: leave out --raw")
        for option in self._of_raw_text() if self.chat else ():
            raise UsageError(f"{option} is for text that is continued as it is: leave out --chat")
        parsed(self.template_arg)

    def messages(self, lm: LanguageModel, text: str, earlier: Sequence[Message], **others: Any) -> list[Message] | None:
        """Return the chat that `text` is asked in, after the `earlier` messages; None: the text is continued.

        Where the model has no template and neither way was asked for, a note on stderr says that the text is continued.

        Raises:
            UsageError: an option of one way was given, and the model's files decide for the other.
        """
        templated = lm.tokenizer.has_chat_template
        for option in self._of_templates(others) if self.chat is None and not templated else ():
            raise UsageError(f"{option} needs a chat template, and this model has none")
        for option in self._of_raw_text() if self.chat is None and templated else ():
            raise UsageError(f"{option} is for text that is continued as it is: add --raw")
        if self.chat is None and not templated:
            terminal.note("(no chat template: the text is continued as it is; --raw asks for that)")
        if not (self.chat or (self.chat is None and templated)):
            return None
        return self.chat_of(text, earlier)

    def chat_of(self, text: str, earlier: Sequence[Message] = ()) -> list[Message]:
        """The chat that `text` is asked in, after the `earlier` messages."""
        chat = Conversation()
        chat.replace(list(earlier))
        if self.system is not None:
            chat.system = terminal.checked_utf8(self.system, "--system")
        return [*chat.all(), {"role": "user", "content": text}]

    def stream(
        self, lm: LanguageModel, text: str, messages: list[Message] | None, thinking: str | None, **keywords: Any
    ) -> Iterator[Chunk]:
        """Begin the answer to `messages`, or the continuation of `text` where they are None.

        Args:
            keywords: those of `LanguageModel.stream`.

        Raises:
            UsageError: an option does not go with the model's template or tokenizer.
        """
        return self.put(lm, text, messages, thinking, lm.stream, lm.chat_stream, **keywords)

    def put(
        self,
        lm: LanguageModel,
        text: str,
        messages: Sequence[Message] | None,
        thinking: str | None,
        continues: Callable[..., T],
        answers: Callable[..., T],
        **keywords: Any,
    ) -> T:
        """What `answers` makes of `messages`, or `continues` of `text` where they are None; errors as of `stream`."""
        if messages is None:
            return continues(self._raw(lm.tokenizer, text), **keywords)
        variables = template_kwargs(lm.tokenizer, parsed(self.template_arg), thinking)
        if self.system is not None:
            checked_system(lm.tokenizer, self.system, variables, name="--system")
        return answers(messages, template_kwargs=variables, **keywords)

    def _of_templates(self, others: Mapping[str, Any]) -> list[str]:
        """The options that were given and mean nothing without a template."""
        given = {"system": self.system, "template_arg": self.template_arg or None, **others}
        return [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]

    def _of_raw_text(self) -> list[str]:
        """The options that were given and mean nothing with a template, which writes all special tokens itself."""
        given = {"--parse-special": self.parse_special, "--bos": self.bos is True, "--no-bos": self.bos is False}
        return [name for name, value in given.items() if value]

    def _raw(self, tokenizer: Tokenizer, text: str) -> str | list[int]:
        """The prompt for `LanguageModel.stream`: ids where an option says how the text becomes them."""
        if not self.parse_special and self.bos is None:
            return text
        begin = tokenizer.bos_token_id
        if self.bos and begin is None:
            raise UsageError("--bos: this model's tokenizer has no token for the beginning of a text")
        ids = tokenizer.encode(text, add_special_tokens=self.bos is not False, parse_special=self.parse_special)
        return [begin, *ids] if self.bos and begin is not None and ids[:1] != [begin] else ids
