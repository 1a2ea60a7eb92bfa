"""Options shared by several commands: declared once, and spread into each command's signature."""

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

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A directory, a .gguf file, or a hub id: org/name or org/name@revision.")
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System message for the chat template.")]
DType = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    typer.Option(metavar="NAME", help="Compute in float32, float16 or bfloat16, whatever the checkpoint stores."),
]
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH[=WEIGHT]",
        help="Add a LoRA or DoRA adapter of PEFT or mlx-lm, from a directory or hub id; may be repeated.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Thinking = Annotated[
    Literal["show", "hide"] | None,
    typer.Option(
        metavar="show|hide",
        help="Show the model's reasoning, dimmed, before its answer, or hide it. Default: show on a terminal.",
        rich_help_panel=OUTPUT,
    ),
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Print speed and peak memory on stderr at the end.", rich_help_panel=OUTPUT),
]


def _sampling(metavar: str, text: str) -> Any:
    return typer.Option(metavar=metavar, help=text, rich_help_panel=SAMPLING)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options for picking the next token. None: the model's default, or the preset's value if a preset is named."""

    preset: Annotated[str | None, _sampling("NAME", "Start from a preset of these options.")] = None
    temperature: Annotated[
        float | None, _sampling("T", "Divide the logits by T; 0 always picks the most likely token.")
    ] = None
    top_k: Annotated[int | None, _sampling("K", "Keep the K most likely tokens; 0 keeps all.")] = None
    top_p: Annotated[float | None, _sampling("P", "Keep the most likely tokens that add up to probability P.")] = None
    min_p: Annotated[float | None, _sampling("P", "Keep tokens at least P times as likely as the likeliest.")] = None
    repetition_penalty: Annotated[float | None, _sampling("X", "Above 1: make tokens seen before less likely.")] = None
    presence_penalty: Annotated[float | None, _sampling("X", "Subtract X from the logits of tokens seen before.")] = (
        None
    )
    frequency_penalty: Annotated[float | None, _sampling("X", "Subtract X for each time a token was seen.")] = None
    seed: Annotated[int | None, _sampling("N", "Same seed, same tokens; default: random.")] = None

    def keywords(self, logprobs: int | None = None) -> dict[str, Any]:
        """Make the keyword arguments for `LanguageModel.stream`; raises UsageError before a model is loaded in vain."""
        from runner.engine.sampling import SamplingParams

        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        preset = given.pop("preset", None)
        if logprobs is not None:
            given["logprobs"] = logprobs
        checked = SamplingParams() if preset is None else SamplingParams.preset(preset)
        # Without a preset, only the given values are passed: the model's defaults, still unknown here, fill the rest.
        checked = checked.replace(**given)
        if preset is None:
            return given
        return {field.name: getattr(checked, field.name) for field in dataclasses.fields(checked)}


@dataclass(frozen=True, kw_only=True)
class LengthOptions:
    """Options for the end of an answer."""

    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Stop after N tokens; default: what is left of the context.",
            show_default=False,
            rich_help_panel=LENGTH,
        ),
    ] = None
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Hold N tokens, prompt and answer together; default: the model's own.",
            show_default=False,
            rich_help_panel=LENGTH,
        ),
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Stop before this text; may be repeated ($'\\n' is a line break).",
            rich_help_panel=LENGTH,
        ),
    ] = None

    def keywords(self) -> dict[str, Any]:
        """Make the keyword arguments for `LanguageModel.stream`."""
        return {"max_tokens": self.max_tokens, "stop": tuple(self.stop) if self.stop else None}


def spread(function: Callable[..., None]) -> Callable[..., None]:
    """Replace every parameter of `function` that is a dataclass of options by the fields of the dataclass.

    `f(model, *, sampling: SamplingOptions)` becomes, for typer, `f(model, *, preset=None, temperature=None, ...)`.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    # The signature that typer reads: options in the order in which they were declared.
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

    # Typer calls with one value per option: put them back together into the dataclasses.
    @functools.wraps(function)
    def command(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        function(**values)

    # `wraps` copied the annotations of `function`, and typer reads signature and annotations both: set each.
    command.__dict__["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command
