"""Options of `runner chat` for a model behind a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runner.errors import UsageError

if TYPE_CHECKING:
    from runner.cli.chat_server import ServerModel

SERVER = "A server"


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where the model is, if not on this machine."""

    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Chat with a model of this server (OpenAI's API), as http://127.0.0.1:8080; MODEL is one that it "
            "lists. Default: its first.",
            rich_help_panel=SERVER,
        ),
    ] = None
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Show the server the key in this file (or in RUNNER_API_KEY); a key is never an argument.",
            rich_help_panel=SERVER,
        ),
    ] = None

    def check(self) -> None:
        """Refuse a key where there is no server; raises UsageError."""
        if self.api_key_file is not None:
            raise UsageError("--api-key-file needs a server: --url http://127.0.0.1:8080")

    def opened(
        self, words: Sequence[str | None], named: str | None, text: str | None, here: Mapping[str, Any]
    ) -> tuple[ServerModel, str | None]:
        """The model, and the text to ask it.

        Args:
            words: the arguments [MODEL] [PROMPT]; a single one that is no model of the server's is the prompt.
            named: the model of -m.
            text: the prompt of -p.
            here: options for models of this machine, by name; None: not given.

        Raises:
            UsageError: one of `here` is given, or the words do not go together, or as `ServerModel`.
        """
        from runner.cli.chat_server import ServerModel
        from runner.cli.serve_options import api_key

        for name, value in here.items():
            if value is not None:
                raise UsageError(f"{name} is for models of this machine: leave it out, or --url")
        assert self.url is not None
        given = [word for word in words if word is not None]
        model = ServerModel(self.url, api_key(self.api_key_file), named)
        if named is None and given and (len(given) > 1 or given[0] in model.models):
            model = ServerModel(self.url, api_key(self.api_key_file), given.pop(0))
        if len(given) > 1 or (given and text is not None):
            raise UsageError(f"unexpected argument {given[-1]!r}: the prompt is given already")
        return model, given[0] if given else text
