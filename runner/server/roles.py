"""Brings a conversation's roles into an order that the model's template takes, without losing a message.

Clients put instructions anywhere (Claude Code behind the first question, Codex in several messages of the role
`developer`), and many templates know one system message, at the start. What a template takes is found out by rendering
small chats, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from runner.errors import TemplateError
from runner.text.chat_inputs import REASONING, text_of
from runner.text.tokenizer import Tokenizer

_FIRST, _SECOND, _THIRD, _FOURTH = "60174285", "39528160", "84630917", "27951346"
"""Digits: no change of case and no trimming alters them."""

Message = Mapping[str, Any]


class Roles:
    """What one model's template makes of roles."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def _shows(self, *messages: tuple[str, str]) -> bool:
        """Whether the template takes a chat of such messages and shows the text of each."""
        chat = [{"role": role, "content": text} for role, text in messages]
        try:
            shown = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        except TemplateError:
            return False
        return all(text in shown for _role, text in messages)

    @cached_property
    def _developer(self) -> bool:
        return any("developer" in source for source in self._tokenizer.template_sources.values()) and self._shows(
            ("developer", _FIRST), ("user", _SECOND)
        )

    @cached_property
    def _system(self) -> bool:
        return self._shows(("system", _FIRST), ("user", _SECOND))

    @cached_property
    def _later_system(self) -> bool:
        # In both places: templates that have users and assistants take turns count messages, and look at some.
        return self._shows(("user", _FIRST), ("system", _SECOND), ("user", _THIRD)) and self._shows(
            ("user", _FIRST), ("assistant", _SECOND), ("system", _THIRD), ("user", _FOURTH)
        )

    @cached_property
    def _two_users(self) -> bool:
        return self._shows(("user", _FIRST), ("user", _SECOND))

    @cached_property
    def _two_assistants(self) -> bool:
        return self._shows(("user", _FIRST), ("assistant", _SECOND), ("assistant", _THIRD), ("user", _FOURTH))

    def fit(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages in roles and an order that the template takes; most chats are returned as they are."""
        wanted = [message.get("role") for message in messages]
        leading = next((index for index, role in enumerate(wanted) if role not in ("system", "developer")), len(wanted))
        late = {role for role in wanted[leading:] if role in ("system", "developer")}
        developers = "developer" in wanted and not self._developer
        if leading > 1 or late or developers or (leading and not self._system):
            messages = self._instructed(messages, leading, developers)
        twice = {first["role"] for first, second in pairs(messages) if first["role"] == second["role"]}
        if "user" in twice and not self._two_users:
            messages = _joined(messages, "user")
        if "assistant" in twice and not self._two_assistants:
            messages = _joined(messages, "assistant")
        return list(messages)

    def _instructed(self, messages: Sequence[Message], leading: int, developers: bool) -> list[Message]:
        """The leading instructions as one message, later ones where the template takes them, else as the user's."""
        result: list[Message] = []
        first = messages[:leading]
        if len(first) > 1:
            role = "developer" if all(each["role"] == "developer" for each in first) and not developers else "system"
            result.append({"role": role, "content": "\n\n".join(text_of(each) for each in first)})
        else:
            result.extend(first)
        result.extend(messages[leading:])
        fitted = []
        for index, message in enumerate(result):
            role = message["role"]
            if role == "developer" and developers:
                role = "system"
            if role == "system" and not (self._later_system if index else self._system):
                role = "user"
            fitted.append({**message, "role": role} if role != message["role"] else message)
        return fitted


def pairs(messages: Sequence[Message]) -> list[tuple[Message, Message]]:
    """Each message and the next."""
    return list(pairwise(messages))


def _joined(messages: Sequence[Message], role: str) -> list[Message]:
    """Neighbouring messages of the role as one, which has the texts and calls of both."""
    result: list[Message] = []
    for message in messages:
        if result and message["role"] == result[-1]["role"] == role:
            before = result[-1]
            texts = {"content": [text_of(before), text_of(message)]}
            texts |= {key: [str(each.get(key) or "") for each in (before, message)] for key in REASONING}
            calls = [*(before.get("tool_calls") or ()), *(message.get("tool_calls") or ())]
            joined = {key: "\n\n".join(filter(None, parts)) for key, parts in texts.items()}
            result[-1] = {
                "role": role,
                **{key: text for key, text in joined.items() if text or key == "content"},
                **({"tool_calls": calls} if calls else {}),
            }
        else:
            result.append(message)
    return result
