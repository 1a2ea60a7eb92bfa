"""`runner chat`: a conversation. Answers go to stdout, notes and errors to stderr."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from runner.cli import engine, terminal
from runner.cli.chat_input import LineReader
from runner.cli.conversation import Conversation
from runner.cli.options import (
    Adapter,
    DType,
    LengthOptions,
    Model,
    NamedModel,
    SamplingOptions,
    System,
    Thinking,
    Verbose,
    Wrap,
    named_model,
)
from runner.cli.template_options import TemplateArg, parsed, template_kwargs
from runner.cli.thinking import AnswerOutput
from runner.errors import ContextLengthError, RunnerError, UsageError

if TYPE_CHECKING:
    from runner.answer import Chunk
    from runner.language_model import LanguageModel

HELP = {
    "/help": "this list",
    "/reset": "forget the conversation, keep the system message",
    "/system TEXT": "set the system message (no text: show it; 'clear': remove it)",
    "/save FILE": "write the conversation as JSON",
    "/load FILE": "go on with a saved conversation",
    "/quit": "leave (also Ctrl-D, or Ctrl-C twice)",
    '"""': "begin and end a message of several lines; or end a line with \\",
    "Ctrl-C": "stop the answer",
}


def chat(
    model: Model = None,
    *,
    named: NamedModel = None,
    system: System = None,
    dtype: DType = None,
    adapter: Adapter = None,
    template_arg: TemplateArg = None,
    sampling: SamplingOptions,
    length: LengthOptions,
    thinking: Thinking = None,
    wrap: Wrap = True,
    verbose: Verbose = False,
) -> None:
    """Chat with a model. /help lists the chat's commands, Ctrl-C stops an answer, Ctrl-D leaves."""
    model = named_model(model, named)
    keywords = {**sampling.keywords(), **length.keywords()}
    variables = parsed(template_arg)
    conversation = Conversation()
    if system is not None:
        conversation.system = terminal.checked_utf8(system, "--system")
    lm = engine.open_model(model, dtype, adapter, length.context)
    if not lm.tokenizer.has_chat_template:
        raise UsageError(f"{model} has no chat template, so it cannot chat: continue text with 'runner generate --raw'")
    keywords["template_kwargs"] = template_kwargs(lm.tokenizer, variables, thinking)
    keywords, untold = engine.sampling_of(lm, keywords)
    if untold is not None:
        terminal.note(untold)
    Chat(lm, conversation, keywords, verbose, thinking, wrap=wrap).run()


class Chat:
    """Runs one conversation: reads a message, streams the answer, remembers both."""

    def __init__(
        self,
        lm: LanguageModel,
        conversation: Conversation,
        keywords: dict[str, Any],
        verbose: bool,
        thinking: str | None = None,
        *,
        wrap: bool = True,
    ) -> None:
        self.lm = lm
        self.cache = lm.prompt_cache()
        self.conversation = conversation
        self.keywords = keywords
        self.verbose = verbose
        self.thinking = thinking
        self.reader = LineReader(tuple(name.split()[0] for name in HELP if name.startswith("/")))
        self.output = terminal.Output(wrap=wrap)
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": self.help,
            "/reset": self.reset,
            "/system": self.set_system,
            "/save": self.save,
            "/load": self.load,
            "/quit": self.quit,
        }

    def run(self) -> None:
        """Take turns until /quit, Ctrl-D or a second Ctrl-C.

        An error ends the turn at a terminal, but the program where messages come from a pipe.
        """
        if self.reader.interactive:
            name = terminal.paint(self.lm.path.name, "bold", sys.stderr)
            print(f"{name}  {terminal.paint('/help lists the commands', 'dim', sys.stderr)}\n", file=sys.stderr)
        while True:
            try:
                entry = self.read()
                if entry is None:
                    return
                self.turn(*entry)
            except (RunnerError, OSError) as problem:
                if not self.reader.interactive or isinstance(problem, BrokenPipeError):
                    raise
                terminal.error(str(problem))
                if isinstance(problem, ContextLengthError):
                    terminal.note("/reset starts again; your message was not kept")
                print(file=sys.stderr)

    def read(self) -> tuple[str, bool] | None:
        """Read a message, and whether it may be a command; None at the end. The second Ctrl-C in a row is raised."""
        interrupted = False
        while True:
            try:
                return self.reader.read()
            except KeyboardInterrupt:
                if interrupted or not self.reader.interactive:
                    raise
                interrupted = True
                print(file=sys.stderr)
                terminal.note("(to leave, press Ctrl-C again, press Ctrl-D, or type /quit)")

    def turn(self, text: str, may_be_command: bool) -> None:
        """Run a command, or answer a message. A command is `/` and letters alone, so `/etc/hosts ...` is a message."""
        word, _, rest = text.partition(" ")
        if may_be_command and word[:1] == "/" and word[1:].isalpha():
            if word not in self.commands:
                raise UsageError(
                    f"unknown command {word}: /help lists the commands (to send it as text, begin with a space)"
                )
            self.commands[word](rest.strip())
        elif text.strip():
            self.answer(terminal.checked_utf8(text, "the message"))

    def answer(self, text: str) -> None:
        """Stream the answer to `text` and remember both: after Ctrl-C what was shown, after an error nothing.

        Reasoning is no part of the answer: it goes back to the model only under the key that its template reads.
        """
        said, thought = "", ""
        last: Chunk | None = None
        status = terminal.Status()
        shown = AnswerOutput(self.output, status, self.thinking)
        interactive = self.reader.interactive
        messages = [*self.conversation.all(), {"role": "user", "content": text}]
        # At a terminal, the first Ctrl-C stops only the answer; in a pipe, it ends the program as usual.
        with soft_interrupt() if interactive else nullcontext(lambda: False) as cancelled:
            try:
                chunks = self.lm.chat_stream(
                    messages,
                    prompt_cache=self.cache,
                    on_prefill=status.prefill,
                    cancelled=cancelled,
                    **self.keywords,
                )
                for last in chunks:
                    shown.write(last)
                    said += last.text
                    thought += last.reasoning
            except KeyboardInterrupt:  # a second Ctrl-C, before the model could react to the first
                if not interactive:
                    raise
            finally:
                shown.end()
        if said:
            key = self.lm.tokenizer.reasoning_key()
            self.conversation.add(text, said, {key: thought} if key is not None and thought else {})
        if shown.unanswered:
            terminal.note("(only reasoning and no answer: your message was not kept)")
        self.after(last, stopped=cancelled())

    def after(self, last: Chunk | None, *, stopped: bool) -> None:
        """Note why the answer was cut short, if it was; then print timings (--verbose) and a blank line."""
        if stopped:
            terminal.note("(stopped)")
        elif last is not None and last.finish_reason == "length":
            note = engine.length_note(self.lm, last, self.keywords["max_tokens"])
            terminal.note(f"({note}: /reset starts again)" if note.endswith("full") else f"({note})")
        if self.verbose and last is not None:
            engine.print_timings(last.timings)
        if self.reader.interactive:
            print(file=sys.stderr)

    def help(self, rest: str) -> None:
        """Run `/help`: list the commands."""
        no_text("/help", rest)
        for name, text in HELP.items():
            print(f"  {name:<14}{terminal.paint(text, 'dim', sys.stderr)}", file=sys.stderr)
        print(file=sys.stderr)

    def reset(self, rest: str) -> None:
        """Run `/reset`: forget all messages but the system message."""
        no_text("/reset", rest)
        self.conversation.messages.clear()
        terminal.note("(forgotten)\n")

    def set_system(self, rest: str) -> None:
        """Run `/system [TEXT | clear]`: set, remove or show the system message."""
        if rest:
            self.conversation.system = None if rest == "clear" else terminal.checked_utf8(rest, "the system message")
        shown = "none" if self.conversation.system is None else self.conversation.system
        terminal.note(f"(system message: {shown})\n")

    def save(self, rest: str) -> None:
        """Run `/save FILE`: write the conversation."""
        path = self.conversation.save(rest)
        terminal.note(f"({len(self.conversation.all())} messages in {path})\n")

    def load(self, rest: str) -> None:
        """Run `/load FILE`: replace the conversation by a saved one."""
        self.conversation.load(rest)
        terminal.note(f"({len(self.conversation.all())} messages)\n")

    def quit(self, rest: str) -> None:
        """Run `/quit`: leave."""
        no_text("/quit", rest)
        raise typer.Exit(0)


def no_text(command: str, rest: str) -> None:
    """Refuse text after a command that takes none, rather than ignore it."""
    if rest:
        raise UsageError(f"{command} takes no text after it, got {rest!r}")


@contextmanager
def soft_interrupt() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C set a flag, which the yielded function returns; a second Ctrl-C raises KeyboardInterrupt."""
    pressed = False

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
