"""Options that change what a chat template writes: `--thinking off` and `--template-arg KEY=VALUE`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from runner.cli import terminal
from runner.errors import UsageError

if TYPE_CHECKING:
    from runner.text.tokenizer import Tokenizer

TemplateArg = Annotated[
    list[str] | None,
    typer.Option(
        "--template-arg",
        metavar="KEY=VALUE",
        help="Set a variable of the chat template, in JSON or as text (enable_thinking=false); may be repeated.",
    ),
]


def parsed(given: Sequence[str] | None) -> dict[str, Any]:
    """Return variables by name: `["enable_thinking=false", "date=1 May"]` -> `{"enable_thinking": False, ...}`.

    A value that is not JSON is text. Raises UsageError: there is no `=`, or a name comes twice.
    """
    found: dict[str, Any] = {}
    for argument in given or ():
        name, equals, text = argument.partition("=")
        if not equals or not name:
            raise UsageError(f"--template-arg takes KEY=VALUE, as in enable_thinking=false, not {argument!r:.80}")
        if name in found:
            raise UsageError(f"--template-arg sets {name!r} twice")
        try:
            found[name] = json.loads(text, parse_constant=_no_json)
        except (ValueError, RecursionError):
            found[name] = text
    return found


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def template_kwargs(tokenizer: Tokenizer, given: Mapping[str, Any], thinking: str | None) -> dict[str, Any]:
    """Return the variables for the model's chat template: those `given`, and with `thinking` "off" the one that is it.

    Raises:
        UsageError: the template does not read a variable, gets it from elsewhere, or cannot turn reasoning off.
    """
    variables = tokenizer.template_kwargs(given)
    if variables:
        readable = tokenizer.template_variables()
        for name in variables:
            if name not in readable:
                listed = f"it reads {', '.join(sorted(readable))}" if readable else "it reads none"
                raise UsageError(f"--template-arg {name}: the model's chat template has no such variable ({listed})")
    if thinking != "off":
        return variables
    off = tokenizer.thinking_off()
    if off is None:
        word = "/no_think" if "/no_think" in tokenizer.template_sources.get("default", "") else None
        hint = "--thinking hide shows the answer alone" if word is None else f"it asks for {word} in the system message"
        raise UsageError(f"--thinking off: the model's chat template has no switch for it ({hint})")
    for name in off:
        if name in variables:
            raise UsageError(f"--thinking off sets {name} of the template: leave out --template-arg {name}")
    return {**variables, **off}


def checked_system(tokenizer: Tokenizer, text: str, variables: Mapping[str, Any], *, name: str) -> str:
    """Return a system message that the model's chat template writes.

    Args:
        variables: those for the template.
        name: what gave the message, for errors.

    Raises:
        UsageError: the template leaves it out, or `text` is not UTF-8.
        TemplateError: the template refuses it.
    """
    text = terminal.checked_utf8(text, name)
    question = [{"role": "user", "content": "?"}]
    asked = [{"role": "system", "content": text}, *question]
    written = tokenizer.apply_chat_template(asked, tokenize=False, **variables)
    # A template may have this very text for where no message is given, or write it in another form.
    if text.strip() not in written and written == tokenizer.apply_chat_template(question, tokenize=False, **variables):
        raise UsageError(f"{name}: the model's chat template leaves system messages out: say it in the prompt")
    return text
