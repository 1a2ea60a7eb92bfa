"""Options that several commands share: declared once, spread into each command's signature."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

import typer

SAMPLING = "Sampling (default: the model's generation_config.json)"
LENGTH = "Length"
OUTPUT = "Output"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A directory, or a hub id: org/name, org/name@revision.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="The system message of the chat.")]
DType = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    typer.Option(metavar="NAME", help="Compute in float32, float16 or bfloat16, whatever the checkpoint's own."),
]
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH[=WEIGHT]", help="A LoRA or DoRA adapter in PEFT's format: a directory or hub id; may be repeated."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Speed and peak memory on stderr, afterwards.", rich_help_panel=OUTPUT)
]


def _sampling(metavar: str, text: str) -> Any:
    return typer.Option(metavar=metavar, help=text, rich_help_panel=SAMPLING)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen. None is the model's own default; `preset` changes those defaults."""

    preset: Annotated[str | None, _sampling("NAME", "Named settings to start from.")] = None
    temperature: Annotated[float | None, _sampling("T", "0 always takes the likeliest token.")] = None
    top_k: Annotated[int | None, _sampling("K", "Among the K likeliest; 0 is all.")] = None
    top_p: Annotated[float | None, _sampling("P", "Among the likeliest that hold P of the probability.")] = None
    min_p: Annotated[float | None, _sampling("P", "Among those at least P times as likely as the first.")] = None
    repetition_penalty: Annotated[float | None, _sampling("X", "Above 1: tokens seen already weigh less.")] = None
    presence_penalty: Annotated[float | None, _sampling("X", "Taken off a token's logit once it appeared.")] = None
    frequency_penalty: Annotated[float | None, _sampling("X", "Taken off for every time it appeared.")] = None
    seed: Annotated[int | None, _sampling("N", "Same seed, same tokens.")] = None

    def keywords(self, logprobs: int | None = None) -> dict[str, Any]:
        """The keyword arguments for `LanguageModel.stream`; raises UsageError before a model is loaded for nothing."""
        from runner.engine.sampling import SamplingParams

        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        preset = given.pop("preset", None)
        if logprobs is not None:
            given["logprobs"] = logprobs
        checked = SamplingParams() if preset is None else SamplingParams.preset(preset)
        checked = checked.replace(**given)
        if preset is None:
            return given
        return {field.name: getattr(checked, field.name) for field in dataclasses.fields(checked)}


@dataclass(frozen=True, kw_only=True)
class LengthOptions:
    """Where an answer ends."""

    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Default: what is left of the context.", show_default=False, rich_help_panel=LENGTH
        ),
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="End before this text; may be repeated ($'\\n' is a line end).", rich_help_panel=LENGTH
        ),
    ] = None

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments for `LanguageModel.stream`."""
        return {"max_tokens": self.max_tokens, "stop": tuple(self.stop or ())}


def spread(function: Callable[..., None]) -> Callable[..., None]:
    """`function` with every parameter that is a dataclass of options replaced by that dataclass's fields.

    `f(model, *, sampling: SamplingOptions)` becomes, for typer, `f(model, *, preset=None, temperature=None, ...)`.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name not in groups:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
            continue
        group = groups[parameter.name]
        group_hints = get_type_hints(group, include_extras=True)
        for field in dataclasses.fields(group):
            kind = inspect.Parameter.KEYWORD_ONLY
            annotation = group_hints[field.name]
            parameters.append(inspect.Parameter(field.name, kind, default=field.default, annotation=annotation))

    @functools.wraps(function)
    def command(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        function(**values)

    command.__dict__["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command
