"""Which tokens only the template of a chat may write, whatever the texts of the chat spell."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from runner.text.chat_inputs import ChatInputs
from runner.text.special_tokens import AddedToken, TokenScanner

_OWN = "assistant"
_CONTROL = re.compile(r"<[|｜].*>|<.*[|｜]>", re.S)
_TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]|◁[^◁▷\s]+▷")


class Guard:
    """The tokens that control a model, and the texts of a chat that must not become one.

    Besides the special ones these are added tokens that the files call ordinary and the template uses like special
    ones: DeepSeek V3's marks of turns, Qwen 3's `<tool_response>`. The assistant's own messages may spell these, since
    the model wrote them so; no other text may.

    Attributes:
        scanner: finds all of these tokens.
    """

    def __init__(self, special: TokenScanner, added: Iterable[tuple[AddedToken, int]], source: str) -> None:
        """Find out the tokens.

        Args:
            special: finds the special tokens.
            added: the other added tokens, and their ids.
            source: the template's Jinja text.
        """
        control = [(token, index) for token, index in added if _controls(token.content, source)]
        self._special = special
        self.scanner = TokenScanner([*special.tokens, *control]) if control else special

    def touches(self, inputs: ChatInputs) -> bool:
        """Whether any text of the caller's spells such a token, or part of one at either end."""
        rest = [inputs.tools, inputs.extra]
        return self.scanner.touches(rest) or any(self._for(each).touches(each) for each in inputs.messages)

    def mark(self, inputs: ChatInputs, markers: tuple[str, str]) -> ChatInputs:
        """Return the inputs with each such spelling put between the two markers."""
        return dataclasses.replace(
            inputs,
            messages=[self._for(each).mark(each, markers) for each in inputs.messages],
            tools=self.scanner.mark(inputs.tools, markers),
            extra=self.scanner.mark(inputs.extra, markers),
        )

    def _for(self, message: dict[str, Any]) -> TokenScanner:
        """What finds the tokens that a message must not write."""
        return self._special if message["role"] == _OWN else self.scanner


def _controls(content: str, source: str) -> bool:
    """Whether an added token is for the template: one look is for nothing else, other tags are if it writes them."""
    return bool(_CONTROL.fullmatch(content) or (_TAG.fullmatch(content) and content in source))
