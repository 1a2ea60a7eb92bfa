"""The variable by which a chat template is told that the model is to answer without reasoning, if it reads one."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from runner.errors import TemplateError


@dataclass(frozen=True)
class Switch:
    """A variable of templates, with the values that turn reasoning on and off."""

    name: str
    on: Any
    off: Any


SWITCHES = (
    Switch("enable_thinking", True, False),  # Qwen3, GLM-4.5, SmolLM3, Hunyuan, EXAONE 4, Apertus
    Switch("thinking", True, False),  # Granite 3.2, DeepSeek V3.1, Kimi K2.5
    Switch("reasoning", True, False),  # Command A Reasoning
    Switch("thinking_budget", 512, 0),  # Seed-OSS: a number of tokens
    Switch("reasoning_effort", "high", "none"),  # where "none" is one of the efforts: not so in gpt-oss
)
"""The names that published templates have for it, the most telling first."""


def thinking_off(
    source: str, reads: Collection[str], render: Callable[[Mapping[str, Any]], str]
) -> dict[str, Any] | None:
    """Return the variable that turns reasoning off and its value; None if the template has no such switch.

    A variable counts if it makes a difference: a template may name one that a later version no longer obeys.

    Args:
        source: the template.
        reads: the names of the variables that it reads.
        render: renders a short chat with some variables; a `TemplateError` says that the template refuses them.
    """
    for switch in SWITCHES:
        if switch.name not in reads:
            continue
        # A template that prints any effort it gets would only tell the model a word that it was not trained on: the
        # value must stand beside the variable, in one tag.
        known = rf"\b{switch.name}\b[^%{{}}]*['\"]{switch.off}['\"]"
        if isinstance(switch.off, str) and re.search(known, source) is None:
            continue
        try:
            if render({switch.name: switch.off}) != render({switch.name: switch.on}):
                return {switch.name: switch.off}
        except TemplateError:
            continue
    return None
