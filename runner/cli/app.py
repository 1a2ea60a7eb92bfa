"""The table of commands, and the one place where an exception becomes a line on stderr and an exit code."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.main import get_command

from runner import installation
from runner.cli import completion, terminal
from runner.cli.bench import bench
from runner.cli.chat import chat
from runner.cli.convert import convert
from runner.cli.doctor import doctor
from runner.cli.generate import generate
from runner.cli.helptext import ALIASES, Command, Group
from runner.cli.hub import alias, list_models, pull, rm
from runner.cli.inspect import inspect
from runner.cli.launch import launch
from runner.cli.options import spread
from runner.cli.perplexity import perplexity
from runner.cli.serve import serve
from runner.cli.settings import default_model
from runner.errors import RunnerError, UsageError

BROKEN_PIPE = 141  # what a shell reports for a program ended by SIGPIPE (128 + 13)
INTERRUPTED = 130  # 128 + SIGINT


@dataclass(frozen=True)
class Entry:
    """One command: its name, the function that runs it, and the example at the end of its help.

    With `wraps`, what stands behind its first argument belongs to another command, options too.
    """

    name: str
    function: Callable[..., None]
    example: str
    wraps: bool = False


COMMANDS: tuple[Entry, ...] = (
    Entry("generate", generate, 'runner generate HuggingFaceTB/SmolLM2-135M-Instruct "What is a fjord?"'),
    Entry("chat", chat, "runner chat HuggingFaceTB/SmolLM2-135M-Instruct"),
    Entry("inspect", inspect, "runner inspect HuggingFaceTB/SmolLM2-135M-Instruct --all"),
    Entry("pull", pull, "runner pull HuggingFaceTB/SmolLM2-135M-Instruct"),
    Entry("list", list_models, "runner list --json"),
    Entry("alias", alias, "runner alias small HuggingFaceTB/SmolLM2-135M-Instruct"),
    Entry("rm", rm, "runner rm smollm2"),
    Entry("serve", serve, "runner serve HuggingFaceTB/SmolLM2-135M-Instruct --port 8080"),
    Entry(
        "launch",
        launch,
        "runner launch -n 2 generate HuggingFaceTB/SmolLM2-135M-Instruct 'What is a fjord?'",
        wraps=True,
    ),
    Entry("bench", bench, "runner bench Llama-3.2-1B --quantize 4 -p 512 -n 128"),
    Entry("doctor", doctor, "runner doctor"),
    Entry("convert", convert, "runner convert HuggingFaceTB/SmolLM2-135M-Instruct SmolLM2-4bit --quantize 4"),
    Entry(
        "perplexity",
        perplexity,
        "runner perplexity SmolLM2-4bit book.txt --against HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
)


def build() -> typer.Typer:
    """Build the typer application of `COMMANDS`."""
    # rich's help triples the start-up time and draws boxes; helptext.py prints plain columns instead.
    application = typer.Typer(
        cls=Group,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        epilog='Example:\n  runner generate HuggingFaceTB/SmolLM2-135M-Instruct "What is a fjord?"',
    )
    application.callback(invoke_without_command=True)(root)
    for entry in COMMANDS:
        settings = {"allow_interspersed_args": not entry.wraps}
        epilog = f"Example:\n  {entry.example}"
        command = application.command(entry.name, cls=Command, epilog=epilog, context_settings=settings)
        command(spread(entry.function))
    return application


def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", "-V", help="Print the version and exit.")] = False,
) -> None:
    """Run transformer language models on this machine, with Apple MLX.

    MODEL is a directory, a GGUF file, a name that 'runner list' shows, or a Hugging Face id: org/name, with @revision
    or :Q4_K_M after it where another branch or a GGUF file is meant.
    """
    if version:
        terminal.Output().line(f"runner {terminal.version()}")
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def run(argv: Sequence[str] | None) -> int:
    """Parse `argv`, run the command and flush stdout; every exception (KeyboardInterrupt too) becomes an exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that stdout cannot encode must not end the answer
    try:
        terminal.open_closed_streams()
        if os.environ.get(completion.VARIABLE):
            return complete()
        invoke(arguments)
        sys.stdout.flush()
        return 0
    except typer.Exit as request:
        return request.exit_code
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            sys.stderr.write("\n")  # the terminal has shown ^C: put the shell's prompt on a line of its own
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has gone (`| head`). Python flushes stdout again at exit: send that to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        return report(error, arguments)


def complete() -> int:
    """Print what the Tab key completes, for the shell that says in the environment what has been typed."""
    program: Any = get_command(build())
    try:
        program.main([], prog_name="runner")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def invoke(arguments: list[str]) -> None:
    """Run the command without typer's own error handling, which prints several lines and picks its own exit codes."""
    command = get_command(build())
    if arguments[:1] == ["help"]:  # `help X` is `X --help`; a word that is no command is refused by name
        if len(arguments) > 2:
            raise UsageError(f"help takes the name of one command, not also {arguments[2]!r}")
        arguments = [*(word for word in arguments[1:] if word != "help"), "--help"]
    with command.make_context("runner", arguments) as context:
        command.invoke(context)


def report(error: Exception, arguments: Sequence[str]) -> int:
    """Print `error` as one `error:` line (a list of problems keeps its lines) and return the exit code for it."""
    if isinstance(error, typer.TyperException):  # the arguments are wrong: name the command whose help to read
        name = next((a for a in arguments if a in ALIASES or any(a == entry.name for entry in COMMANDS)), "")
        message = " ".join(error.format_message().split()).rstrip(".")
        message = message[:1].lower() + message[1:]
        if name == "generate":
            message += quotes_hint(message, arguments)
        terminal.error(f"{message} (see '{' '.join(f'runner {name} --help'.split())}')")
        return error.exit_code
    if isinstance(error, RunnerError):
        terminal.error(str(error))
        return 2 if isinstance(error, UsageError) else 1
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename is not None else ""
        terminal.error(f"{error.strerror or error}{where}")
        return 1
    if isinstance(error, MemoryError):
        terminal.error("out of memory: try a smaller or quantized model, or a shorter prompt")
        return 1
    # Every other exception is a bug of ours.
    if os.environ.get("RUNNER_TRACEBACK"):
        raise error
    summary = " ".join(str(error).split())
    if unmet := installation.unmet():
        # Or it is one of an installation without its requirements, which pip would not have made.
        terminal.error(f"this installation has {', '.join(unmet)}; mend it with: {installation.install('')}")
        return 1
    terminal.error(f"unexpected {type(error).__name__}: {summary} (this is a bug; RUNNER_TRACEBACK=1 shows where)")
    return 1


def quotes_hint(message: str, arguments: Sequence[str]) -> str:
    """What to add to typer's `message` about words too many for `generate`: the prompt in quotes; "" for another."""
    found = re.fullmatch(r"got unexpected extra arguments?(?:\(s\))? \((.*)\)", message)
    if found is None:
        return ""
    extra = found[1].split(" ")
    start = next((n for n in range(2, len(arguments)) if list(arguments[n : n + len(extra)]) == extra), 0)
    before = list(arguments[max(start - 2, 1) : start])
    if len(before) < 2 or any(word.startswith("-") for word in before):
        return ": a prompt of several words needs quotes"
    from runner.checkpoint.names import names_model

    try:
        first = not names_model(before[0]) and default_model() is not None
    except RunnerError:
        first = False
    prompt = " ".join([*before[0 if first or "-m" in arguments else 1 :], *extra])
    return f': a prompt of several words needs quotes, as in "{prompt}"'
