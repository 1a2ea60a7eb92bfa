"""`runner chat`: a conversation. Answers go to stdout, notes and errors to stderr."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from runner.cli import engine, terminal
from runner.cli.chat_commands import Commands
from runner.cli.chat_input import LineReader
from runner.cli.chat_model import ChatModel, LocalModel
from runner.cli.chat_settings import ChatSettings
from runner.cli.conversation import Conversation
from runner.cli.history import History, Resume, TypedLines, keep_last_chat, model_of_last, resumed
from runner.cli.options import (
    Activations,
    Adapter,
    DType,
    GivenPrompt,
    GuessOptions,
    LengthOptions,
    Model,
    NamedModel,
    SamplingOptions,
    System,
    Thinking,
    Verbose,
    Wrap,
    model_and_text,
)
from runner.cli.server_options import ServerOptions
from runner.cli.template_options import TemplateArg, parsed
from runner.cli.thinking import AnswerOutput
from runner.errors import ContextLengthError, RunnerError, RunOver, UsageError

if TYPE_CHECKING:
    from runner.answer import Chunk

PROMPT_HELP = "Answer this and leave; piped text is appended to it. With -, that is all of it."


def chat(
    model: Model = None,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help=PROMPT_HELP, show_default=False)] = None,
    *,
    named: NamedModel = None,
    given: GivenPrompt = None,
    system: System = None,
    resume: Resume = False,
    history: History = True,
    dtype: DType = None,
    activations: Activations = "exact",
    adapter: Adapter = None,
    template_arg: TemplateArg = None,
    sampling: SamplingOptions,
    length: LengthOptions,
    guesses: GuessOptions,
    server: ServerOptions,
    thinking: Thinking = None,
    wrap: Wrap = True,
    verbose: Verbose = False,
) -> None:
    """Chat with a model. /help lists the chat's commands, Ctrl-C stops an answer, Ctrl-D leaves."""
    words = {**sampling.keywords(), **length.keywords()}
    guesses.check()
    variables = parsed(template_arg)
    conversation = Conversation()
    talker: ChatModel
    if server.url is not None:
        here = {"--dtype": dtype, "--adapter": adapter, "--context": length.context, "--continue": resume or None}
        here |= {"--activations": None if activations == "exact" else activations}
        here |= {f"--{name}": value or None for name, value in vars(guesses).items()}
        talker, text = server.opened((model, prompt), named, given, here)
        name, text = talker.name, None if text is None else terminal.prompt_text(text)
    else:
        server.check()
        last = resumed(resume, history)
        named = model_of_last((model, prompt), named, last)
        name, prompt = model_and_text((model, prompt), named, given, option="-p")
        text = None if prompt is None else terminal.prompt_text(prompt)
        if last is not None:
            conversation.replace(last.messages)
        talker = local_model(name, dtype, adapter, length.context, mtp=guesses.mtp, activations=activations)
        words |= guesses.keywords(dtype, activations)
    settings = ChatSettings(
        talker, words, variables=variables, thinking=thinking, verbose=verbose, wrap=wrap, history=history
    )
    settings.keywords()  # what a server cannot be asked for is refused before anything is typed
    if system is not None:
        conversation.system = talker.checked_system(system, settings.template_kwargs, "--system")
    talk = Chat(talker, None if server.url is not None else name, conversation, settings, keeps=resume)
    if text is None:
        talk.run()
    else:
        talk.ask(text)


def local_model(
    model: str,
    dtype: str | None,
    adapter: Sequence[str] | None,
    context: int | None,
    *,
    mtp: bool,
    activations: str = "exact",
) -> LocalModel:
    """Load a model of this machine; raises as `engine.open_model`, and UsageError where it cannot chat."""
    lm = engine.open_model(model, dtype, adapter, context, mtp=mtp, activations=activations)
    if not lm.tokenizer.has_chat_template:
        raise UsageError(f"{model} has no chat template, so it cannot chat: continue text with 'runner generate --raw'")
    return LocalModel(lm)


class Chat:
    """Runs one conversation: reads a message, streams the answer, remembers both."""

    def __init__(
        self, model: ChatModel, given: str | None, conversation: Conversation, settings: ChatSettings, *, keeps: bool
    ) -> None:
        """Begin.

        Args:
            given: the name that the model was given, for the next `-c`; None: there is none.
            keeps: whether the conversation is kept for it even if nobody sits at a terminal.
        """
        self.model = model
        self.given = given
        self.conversation = conversation
        self.settings = settings
        self.keeps = keeps
        self.reader = LineReader(Commands.completions(), TypedLines(kept=settings.history))
        self.commands = Commands(conversation, settings, self.answer, interactive=self.reader.interactive)

    def ask(self, text: str) -> None:
        """Answer one message and leave; Ctrl-C ends the program."""
        self.reader.interactive = False
        self.note_sampling()
        self.answer(text)

    def run(self) -> None:
        """Take turns until /quit, Ctrl-D or a second Ctrl-C.

        An error ends the turn at a terminal, but the program where messages come from a pipe.
        """
        self.note_sampling()
        if self.reader.interactive:
            name = terminal.paint(self.model.name, "bold", sys.stderr)
            print(f"{name}  {terminal.paint('/help lists the commands', 'dim', sys.stderr)}\n", file=sys.stderr)
            if self.conversation.messages:
                terminal.note(f"(going on with {len(self.conversation.all())} messages: /show messages lists them)\n")
        while True:
            try:
                entry = self.read()
                if entry is None:
                    return
                self.turn(*entry)
            except (RunnerError, OSError) as problem:
                if not self.reader.interactive or isinstance(problem, BrokenPipeError):
                    raise
                if isinstance(problem, RunOver):
                    raise
                terminal.error(str(problem))
                if isinstance(problem, ContextLengthError):
                    terminal.note("/reset starts again; your message was not kept")
                print(file=sys.stderr)

    def note_sampling(self) -> None:
        """Say once, where nothing says how to sample, what is done."""
        note = self.settings.keywords()[1]
        if note is not None:
            terminal.note(note)

    def read(self) -> tuple[str, bool] | None:
        """Read a message, and whether it may be a command; None at the end. The second Ctrl-C in a row is raised."""
        interrupted = False
        self.reader.typed.kept = self.settings.history and self.reader.typed.path.is_absolute()
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
        """Run a command, or answer a message."""
        if not (may_be_command and self.commands.take(text)) and text.strip():
            self.commands.ask(text)

    def answer(self, text: str) -> bool:
        """Stream the answer to `text` and remember both: after Ctrl-C what was shown, after an error nothing.

        Reasoning is no part of the answer: it goes back to the model only under the key that its template reads.
        Returns whether there was an answer to remember.
        """
        said, thought = "", ""
        last: Chunk | None = None
        status = terminal.Status()
        shown = AnswerOutput(self.settings.output, status, self.settings.thinking)
        interactive = self.reader.interactive
        messages = [*self.conversation.all(), {"role": "user", "content": terminal.checked_utf8(text, "the message")}]
        # At a terminal, the first Ctrl-C stops only the answer; in a pipe, it ends the program as usual.
        with soft_interrupt() if interactive else nullcontext(lambda: False) as cancelled:
            try:
                keywords, variables = self.settings.keywords()[0], self.settings.template_kwargs
                chunks = self.model.stream(messages, keywords, variables, status.prefill, cancelled)
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
            key = self.model.reasoning_key
            self.conversation.add(text, said, {key: thought} if key is not None and thought else {})
            kept = self.settings.history and (interactive or self.keeps or sys.stdout.isatty())
            if kept and self.given is not None:
                keep_last_chat(self.given, self.conversation.all())
        if shown.unanswered:
            terminal.note("(only reasoning and no answer: your message was not kept)")
        self.after(last, stopped=cancelled())
        return bool(said)

    def after(self, last: Chunk | None, *, stopped: bool) -> None:
        """Note why the answer was cut short, if it was; then print timings (--verbose) and a blank line."""
        if stopped:
            terminal.note("(stopped)")
        elif last is not None and last.finish_reason == "length":
            note = self.model.length_note(last, self.settings.max_tokens)
            terminal.note(f"({note}: /reset starts again)" if note.endswith("full") else f"({note})")
        if self.settings.verbose and last is not None:
            engine.print_timings(last.timings)
        if self.reader.interactive:
            print(file=sys.stderr)


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
