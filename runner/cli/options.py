"""Options shared by several commands: declared once, and spread into each command's signature."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

import typer

from runner.cli import completion, terminal
from runner.cli.settings import VARIABLE, default_model, settings_path
from runner.cli.variables import variable
from runner.errors import UsageError
from runner.local_files import quoted

SAMPLING = "Sampling (default: the model's generation_config.json)"
LENGTH = "Length"
OUTPUT = "Output"
MANY = "Many prompts"
GUESSES = "Guesses (the answer stays the same)"

DTYPES = {
    **{name: "float32" for name in ("float32", "fp32", "f32")},
    **{name: "float16" for name in ("float16", "fp16", "f16")},
    **{name: "bfloat16" for name in ("bfloat16", "bf16")},
}
"""Canonical name of a dtype, by each spelling that hands remember from other programs."""


def dtype_name(text: str) -> str:
    """Return the canonical name of the dtype `text`; raises typer's BadParameter."""
    if text.lower() not in DTYPES:
        raise typer.BadParameter(f"{text!r} is none of float32 (fp32), float16 (fp16) and bfloat16 (bf16)")
    return DTYPES[text.lower()]


Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A directory, a .gguf file, a name as 'runner list' shows it, or a hub id: "
        "org/name[@revision][:Q4_K_M]. Default: what RUNNER_MODEL or the config file says.",
        show_default=False,
        autocompletion=completion.models,
    ),
]
NamedModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="The same as MODEL, by option.",
        autocompletion=completion.models,
    ),
]
GivenPrompt = Annotated[
    str | None, typer.Option("--prompt", "-p", metavar="PROMPT", help="The same as PROMPT, by option.")
]
System = Annotated[
    str | None,
    typer.Option(
        "--system", "-s", metavar="TEXT", help="System message for the chat template.", **variable("--system")
    ),
]
DType = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        parser=dtype_name,
        autocompletion=lambda incomplete: [name for name in DTYPES if name.startswith(incomplete)],
        help="Compute in float32, float16 or bfloat16 (fp32, fp16, bf16), whatever the checkpoint stores.",
        **variable("--dtype"),
    ),
]
Activations = Annotated[
    Literal["exact", "int8"],
    typer.Option(
        metavar="exact|int8",
        help="int8: round what packed weights are multiplied with to 8 bits. Faster with the CPU kernels, above all "
        "for prompts, and less exact: 'runner perplexity' measures by how much.",
        **variable("--activations"),
    ),
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
    Literal["show", "hide", "off"] | None,
    typer.Option(
        metavar="show|hide|off",
        help="Show the model's reasoning, dimmed, before its answer, or hide it, or have the model answer at once. "
        "Default: show on a terminal.",
        rich_help_panel=OUTPUT,
        **variable("--thinking"),
    ),
]
Wrap = Annotated[
    bool,
    typer.Option(
        "--wrap/--no-wrap",
        help="Break lines between words on a terminal; code between ``` lines stays as it is.",
        rich_help_panel=OUTPUT,
        show_default=False,
        **variable("--wrap"),
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Print speed and peak memory on stderr at the end.",
        rich_help_panel=OUTPUT,
        **variable("--verbose"),
    ),
]


def _sampling(name: str, metavar: str, text: str, *shorter: str, **more: Any) -> Any:
    return typer.Option(
        f"--{name}", *shorter, metavar=metavar, help=text, rich_help_panel=SAMPLING, **variable(f"--{name}"), **more
    )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options for picking the next token. None: the model's default, or the preset's value if a preset is named."""

    preset: Annotated[
        str | None,
        _sampling("preset", "NAME", "Start from a preset of these options.", autocompletion=completion.presets),
    ] = None
    temperature: Annotated[
        float | None,
        _sampling("temperature", "T", "Divide the logits by T; 0 always picks the most likely token.", "--temp"),
    ] = None
    top_k: Annotated[int | None, _sampling("top-k", "K", "Keep the K most likely tokens; 0 keeps all.")] = None
    top_p: Annotated[
        float | None, _sampling("top-p", "P", "Keep the most likely tokens that add up to probability P.")
    ] = None
    min_p: Annotated[
        float | None, _sampling("min-p", "P", "Keep tokens at least P times as likely as the likeliest.")
    ] = None
    repetition_penalty: Annotated[
        float | None, _sampling("repetition-penalty", "X", "Above 1: make tokens seen before less likely.")
    ] = None
    presence_penalty: Annotated[
        float | None, _sampling("presence-penalty", "X", "Subtract X from the logits of tokens seen before.")
    ] = None
    frequency_penalty: Annotated[
        float | None, _sampling("frequency-penalty", "X", "Subtract X for each time a token was seen.")
    ] = None
    seed: Annotated[int | None, _sampling("seed", "N", "Same seed, same tokens; default: random.")] = None

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
            "--max-tokens",
            "-n",
            metavar="N",
            min=1,
            help="Stop after N tokens; default: what is left of the context.",
            show_default=False,
            rich_help_panel=LENGTH,
            **variable("--max-tokens"),
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
            **variable("--context"),
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


@dataclass(frozen=True, kw_only=True)
class GuessOptions:
    """Options for guessing tokens ahead, which changes no token of an answer."""

    lookup: Annotated[
        bool,
        typer.Option(
            "--lookup",
            help="Guess tokens by what followed the same words before: faster where an answer repeats its prompt.",
            rich_help_panel=GUESSES,
        ),
    ] = False
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            autocompletion=completion.models,
            help="Guess tokens by a smaller model with the same vocabulary.",
            rich_help_panel=GUESSES,
        ),
    ] = None

    mtp: Annotated[
        bool,
        typer.Option(
            "--mtp",
            help="Guess tokens by the model's own layer for multi-token prediction.",
            rich_help_panel=GUESSES,
        ),
    ] = False

    def check(self) -> None:
        """Refuse several at once, before a model is loaded in vain; raises UsageError."""
        ways = {"--lookup": self.lookup, "--draft": self.draft is not None, "--mtp": self.mtp}
        given = [name for name, used in ways.items() if used]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} guess in different ways: choose one")

    def keywords(self, dtype: str | None, activations: str) -> dict[str, Any]:
        """Make the keyword arguments for `LanguageModel.stream`; loads the draft model, with the two options."""
        from runner.cli.engine import open_model

        return {
            "lookup": self.lookup or None,
            "draft": None if self.draft is None else open_model(self.draft, dtype, activations=activations),
        }


def named_model(argument: str | None, option: str | None) -> str:
    """Return the model that a command was given, as an argument or with -m, or the default.

    Raises:
        UsageError: two are named, or none and there is no default.
        UserFileError: the default is no model, or the file that sets it is damaged.
    """
    if argument is not None and option is not None:
        raise UsageError(f"two models are named, {argument!r} and -m {option!r}: leave one out")
    model = option if argument is None else argument
    if model is not None:
        return model
    default = default_model()
    if default is None:
        raise UsageError(
            f"no model is named: put MODEL first, use -m MODEL, or set {VARIABLE} ('runner list' shows what is here)"
        )
    return default.checked()


def model_and_text(
    words: Sequence[str | None], model: str | None, text: str | None, *, option: str
) -> tuple[str, str | None]:
    """Return the model and the text that a command with the arguments [MODEL] [TEXT] was given.

    Args:
        words: the arguments in order; after `-m MODEL` the first is the text, and so is a single one that names no
            model where there is a default.
        model: the value of -m, or None.
        text: the value of the option that gives the text, or None.
        option: the short name of that option.

    Raises:
        UsageError: no model is named, or an argument and an option say the same thing.
        UserFileError: the default is no model, or the file that sets it is damaged.
    """
    given = [word for word in words if word is not None]
    if model is None:
        first = given[0] if given and _says_model(given, text) else None
        model = named_model(first, None)
        given = given[first is not None :]
    if text is not None and given:
        raise UsageError(f"{given[0]!r} and {option} {text!r} were given: leave one out")
    if len(given) > 1:
        raise UsageError(
            f"unexpected argument {given[1]!r}: -m has named the model, and a text of several words needs quotes"
        )
    return model, given[0] if given else text


def _says_model(words: Sequence[str], text: str | None) -> bool:
    """Whether the first word is the model, and not the text for the default model.

    Raises:
        UsageError: it is neither.
    """
    from runner.checkpoint.names import names_model, near_name

    if text is not None or (len(words) == 1 and words[0] == "-"):
        return words[0] != "-"
    if names_model(words[0]):  # asked first: a mistake in the file of the default concerns nobody who names a model
        return True
    default = default_model()
    if len(words) == 1 and default is None and " " in words[0]:
        raise UsageError(
            f"{quoted(words[0], 60)} is no model: name one before the text, or set a default "
            f'({VARIABLE}, or model = "..." in {settings_path()})'
        )
    if default is None:
        return True
    if len(words) > 1:
        raise UsageError(
            f'no model is called {quoted(words[0])}: a text of several words needs quotes, as in "{" ".join(words)}"'
        )
    near = near_name(words[0])
    if near is not None:
        terminal.note(f"(the prompt for {default.name} is {quoted(words[0])}: no model is called so; {near} is one)")
    return False


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
