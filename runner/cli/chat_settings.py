"""What `/set` changes in a chat: how tokens are picked, when an answer ends, and what is shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from runner.cli import terminal
from runner.cli.chat_model import ChatModel
from runner.errors import UsageError

SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "penalty_window", "seed",
)  # fmt: skip
LENGTH = ("max_tokens", "stop")
SWITCHES = ("verbose", "wrap", "history")
NAMES = ("preset", *SAMPLING, *LENGTH, "thinking", *SWITCHES)
SPELLINGS = {
    "temp": "temperature",
    "num_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "repeat_last_n": "penalty_window",
    "wordwrap": "wrap",
}
"""ollama's and llama.cpp's names."""
WORDS = {
    "verbose": "verbose on",
    "quiet": "verbose off",
    "wordwrap": "wrap on",
    "nowordwrap": "wrap off",
    "history": "history on",
    "nohistory": "history off",
    "think": "thinking default",
    "nothink": "thinking off",
}
"""Settings that ollama takes without a value."""
DEFAULT = "default"


class ChatSettings:
    """The settings of a chat, from the command line's options and then from `/set`.

    Attributes:
        thinking: "show", "hide", "off" or None: what is shown of reasoning, or that there is to be none.
        verbose: whether timings follow each answer.
        history: whether typed lines and the conversation are kept for later chats.
        output: where answers go.
    """

    def __init__(
        self,
        model: ChatModel,
        given: Mapping[str, Any],
        *,
        variables: Mapping[str, Any],
        thinking: str | None,
        verbose: bool,
        wrap: bool,
        history: bool,
    ) -> None:
        """Take the keywords `given` for answers and the `variables` for the template.

        Raises:
            UsageError: the template does not know a variable, or cannot turn reasoning off.
        """
        self.model = model
        self.given = {name: value for name, value in given.items() if value is not None}
        self.variables = variables
        self.thinking = thinking
        self.verbose = verbose
        self.history = history
        self.output = terminal.Output(wrap=wrap)
        self.wrap = wrap
        self.template_kwargs = model.variables(variables, thinking)

    def keywords(self) -> tuple[dict[str, Any], str | None]:
        """Make the keywords for an answer, and a note where nothing says how to sample."""
        return self.model.keywords(self.given)

    @property
    def max_tokens(self) -> int | None:
        """The most tokens of an answer that were asked for."""
        limit: int | None = self.given.get("max_tokens")
        return limit

    def repeats(self) -> str | None:
        """Why the same question gets the same answer; None if it does not."""
        params = self.model.shown(self.given)
        if params["temperature"] == 0:
            return "the temperature is 0"
        return f"the seed is {params['seed']}" if isinstance(params["seed"], int) else None

    def set(self, text: str) -> str:
        """Change a setting, as in `temperature 0.7`, `preset creative` or `top_k default`; returns what now holds.

        Without a value it only says what holds. ollama's spellings do too: `parameter num_predict 50`, `quiet`.

        Raises:
            UsageError: there is no such setting, or it does not take the value.
        """
        name, _, value = text.removeprefix("parameter ").strip().partition(" ")
        value = value.strip()
        if not value and name in WORDS:
            name, value = WORDS[name].split()
        name = SPELLINGS.get(name, name.replace("-", "_"))
        if name in ("num_ctx", "context"):
            raise UsageError("the context is laid out when a model is loaded: start again with --context N")
        if name not in NAMES:
            raise UsageError(f"/set {name}: no such setting; there are {', '.join(NAMES)}")
        if value:
            self._change(name, value)
        return f"{name} {self.shown()[name]}"

    def _change(self, name: str, value: str) -> None:
        if name in SWITCHES:
            self._switch(name, value)
        elif name == "thinking":
            self._think(None if value == DEFAULT else value)
        elif name == "preset":
            self._preset(value)
        elif value == DEFAULT:
            self.given.pop(name, None)
        elif name == "stop":
            self.given[name] = (_text(value),)
        else:
            self.given[name] = self._checked(name, value)

    def _switch(self, name: str, value: str) -> None:
        if value not in ("on", "off"):
            raise UsageError(f"/set {name} takes on or off, not {value!r}")
        on = value == "on"
        if name == "wrap":
            self.wrap = on
            self.output = terminal.Output(wrap=on)
        elif name == "verbose":
            self.verbose = on
        else:
            self.history = on

    def _think(self, value: str | None) -> None:
        if value not in (None, "show", "hide", "off"):
            raise UsageError(f"/set thinking takes show, hide, off or {DEFAULT}, not {value!r}")
        self.template_kwargs = self.model.variables(self.variables, value)
        self.thinking = value

    def _preset(self, value: str) -> None:
        from runner.engine.sampling import SamplingParams

        preset = {} if value == DEFAULT else vars(SamplingParams.preset(value))
        for name in SAMPLING:
            self.given.pop(name, None)
        self.given |= {name: number for name, number in preset.items() if name in SAMPLING and number is not None}

    def _checked(self, name: str, value: str) -> float:
        from runner.engine.sampling import SamplingParams

        number: float | None = None
        for read in (int, float):
            try:
                number = read(value)
                break
            except ValueError:
                continue
        if number is None:
            raise UsageError(f"/set {name} takes a number or {DEFAULT}, not {value!r:.40}")
        if name != "max_tokens":
            SamplingParams().replace(**{name: number})
        elif not isinstance(number, int) or number < 1:
            raise UsageError(f"/set max_tokens takes a whole number of at least 1, or {DEFAULT}, not {value!r:.40}")
        return number

    def shown(self) -> dict[str, str]:
        """Every setting by name, as text, with what holds where nothing was asked for."""
        params = self.model.shown(self.given)
        values: dict[str, Any] = {name: params[name] for name in (*SAMPLING, "max_tokens")}
        values |= {"seed": "random" if params["seed"] is None else params["seed"]}
        values |= {"stop": ", ".join(json.dumps(text, ensure_ascii=False) for text in params["stop"]) or "none"}
        values |= {"thinking": self.thinking or "show on a terminal"}
        values |= {name: "on" if getattr(self, name) else "off" for name in SWITCHES}
        values |= {"preset": self._preset_name() or "none"}
        return {name: str(values[name]) for name in NAMES}

    def _preset_name(self) -> str | None:
        """The preset that has the values of now, if one has."""
        from runner import resources
        from runner.engine.sampling import SamplingParams

        now = self.model.shown(self.given)
        for preset in resources.names("sampling"):
            values = vars(SamplingParams.preset(preset))
            if all(values[name] == now[name] for name in SAMPLING if name != "seed"):
                return preset
        return None


def _text(value: str) -> str:
    """A text as it is, or as a JSON string where it begins with a quote: `"\\n"`."""
    if not value.startswith('"'):
        return value
    try:
        text = json.loads(value)
    except ValueError:
        text = None
    if not isinstance(text, str) or not text:
        raise UsageError(f'/set stop takes a text, or a JSON string such as "\\n", not {value!r:.40}')
    return text
