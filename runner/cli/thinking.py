"""An answer on its way out: content to stdout, and the model's reasoning shown dimmed, or hidden."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from runner.cli import terminal

if TYPE_CHECKING:
    from runner.answer import Chunk


class AnswerOutput:
    """Writes the chunks of one answer.

    On a terminal the reasoning comes before the content, dimmed or, without colours, between two lines that say so.
    Where stdout is no terminal it holds the content alone, and reasoning that was asked for goes to stderr. Of hidden
    reasoning the status line counts the tokens.
    """

    def __init__(self, output: terminal.Output, status: terminal.Status, thinking: str | None) -> None:
        """Begin an answer; `thinking` is "show", "hide" or None (show it on a terminal)."""
        self.output = output
        self.status = status
        self.beside: terminal.Output | None = None
        if output.safe and thinking != "hide":
            self.beside = output
        elif thinking == "show":
            self.beside = terminal.Output(sys.stderr)
        self.marked = self.beside is not None and not terminal.colours(self.beside.stream)
        self.tokens = 0
        self.thinks = False
        self.said = False

    @property
    def unanswered(self) -> bool:
        """Whether there was reasoning but nothing for the reader."""
        return self.tokens > 0 and not self.said

    def write(self, chunk: Chunk) -> None:
        """Write what a token brought."""
        if chunk.reasoning:
            self.reason(chunk.reasoning)
        if chunk.text:
            self.status.clear()
            self.end_reasoning(more=True)
            self.output.write(chunk.text)
            self.said = True

    def reason(self, text: str) -> None:
        """Write a piece of reasoning, or count it."""
        self.tokens += 1
        if self.beside is None:
            self.status.show(f"thinking  {self.tokens} tokens")
            return
        self.status.clear()
        if not self.thinks:
            self.beside.end_line()
            if self.marked:
                self.beside.line("(thinking)")
        self.thinks = True
        self.beside.write(text, "dim")

    def end_reasoning(self, *, more: bool) -> None:
        """End the lines of reasoning, if it was shown; with `more`, content follows."""
        if not self.thinks or self.beside is None:
            return
        self.thinks = False
        self.beside.end_line()
        if more and self.beside is self.output:
            self.beside.line("(answer)" if self.marked else "")

    def end(self) -> None:
        """End the answer's last line."""
        self.status.clear()
        self.end_reasoning(more=False)
        self.output.end_line()
