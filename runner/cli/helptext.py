"""Commands as typer runs them: help pages in plain columns, other names, and variables named where they are wrong."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from runner.cli.chat_settings import SAMPLING
from runner.cli.plain_values import without_pydantic
from runner.cli.terminal import paint
from runner.cli.variables import blamed, let_preset_win
from runner.errors import UsageError

OPTIONS = "Options"
ALIASES = {"run": "chat", "ls": "list", "show": "inspect"}
"""Commands by the names that they have in other programs."""


class Command(TyperCommand):
    """A command whose help groups options by `rich_help_panel` and prints the epilog unwrapped.

    An error about an option that an environment variable has set names the variable.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line."""
        without_pydantic(self.get_params(ctx))
        try:
            rest = super().parse_args(ctx, args)
            let_preset_win(ctx, [name for name in SAMPLING if name != "seed"])
            return rest
        except typer.BadParameter as error:
            error.message = blamed(ctx, error.message, error.param)
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except UsageError as error:
            error.args = (blamed(ctx, str(error)),)
            raise

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """Write one line, `Usage: runner generate [OPTIONS] MODEL [PROMPT]`."""
        arguments = [parameter for parameter in self.params if isinstance(parameter, TyperArgument)]
        pieces = [a.metavar or a.name.upper() for a in arguments]
        shown = [piece if a.required else f"[{piece}]" for piece, a in zip(pieces, arguments, strict=True)]
        formatter.write_usage(ctx.command_path, " ".join(["[OPTIONS]", *shown]), prefix=heading("Usage") + " ")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, the panels in the order of their first options, then the options without a panel."""
        rows: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, TyperArgument):
                rows["Arguments"].append((parameter.metavar or parameter.name.upper(), parameter.help or ""))
                continue
            assert isinstance(parameter, TyperOption)
            record = parameter.get_help_record(ctx)
            if record is not None:
                rows.setdefault(parameter.rich_help_panel or OPTIONS, []).append(record)
        rows[OPTIONS] = rows.pop(OPTIONS)  # --help lives there: last
        for name, panel in rows.items():
            write_section(formatter, name, panel)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The example, with its line breaks."""
        write_epilog(formatter, self.epilog)


class Group(TyperGroup):
    """The program itself, whose help lists commands before options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line up to the command's name."""
        without_pydantic(self.get_params(ctx))
        return super().parse_args(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Find a command by its name or by another of `ALIASES`."""
        return super().get_command(ctx, ALIASES.get(cmd_name, cmd_name))

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """Write one line, `Usage: runner COMMAND [OPTIONS] ...`."""
        formatter.write_usage(ctx.command_path, "COMMAND [OPTIONS] ...", prefix=heading("Usage") + " ")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the table of commands, then the program's own options."""
        others = {name: f"{name}, {other}" for other, name in ALIASES.items()}
        commands = [
            (others.get(name, name), self.commands[name].get_short_help_str(90)) for name in self.list_commands(ctx)
        ]
        commands.append(("help", "Show this, or the help of the command that follows."))
        options = [record for p in self.get_params(ctx) if (record := p.get_help_record(ctx)) is not None]
        write_section(formatter, "Commands", commands)
        write_section(formatter, OPTIONS, options)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The example, with its line breaks."""
        write_epilog(formatter, self.epilog)


def heading(name: str) -> str:
    """Format a heading, `Name:`, bold on a terminal."""
    return paint(f"{name}:", "bold", sys.stdout)


def write_section(formatter: Any, name: str, rows: list[tuple[str, str]]) -> None:
    """Write a heading and two aligned columns; nothing if there are no rows."""
    if not rows:
        return
    formatter.write_paragraph()
    formatter.write(heading(name) + "\n")
    with formatter.indentation():
        formatter.write_dl(rows, col_max=32)


def write_epilog(formatter: Any, epilog: str | None) -> None:
    """Write `Example:` and its lines, unwrapped: they are there to be copied."""
    title, _, lines = (epilog or "").partition(":\n")
    formatter.write(f"\n{heading(title)}\n{lines}\n")
