"""A model as the server has it: a backend, and how its chat template is to be spoken to."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from runner import resources
from runner.constraints import Constraint
from runner.engine.sampling import LARGEST, SamplingParams
from runner.errors import ContextLengthError, TemplateError, UsageError
from runner.guidance import Grammars
from runner.server.backend import Backend, Order
from runner.server.errors import invalid
from runner.server.request import MAX_CHOICES, MAX_STOP_LENGTH, MAX_STOPS, Ask, Chat, Text
from runner.server.roles import Roles
from runner.server.structure import calls_of
from runner.server.tool_calls import CallFinder
from runner.server.tooling import Tooling
from runner.text.answer_text import AnswerText
from runner.text.infill import Infill, infill_of, one_token
from runner.text.separator import PlainText, Separator
from runner.text.stop import StopMatcher

if TYPE_CHECKING:
    from runner.engine.speculation import Guide

UNTOLD = "balanced"
"""The preset for a model whose files say nothing of sampling, as in `runner chat`."""

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True)
class Prepared:
    """A request that was checked, with its prompt in tokens; whatever is wrong with one was said before.

    Attributes:
        ids: the prompt.
        text: the prompt as text; "" where it came as ids.
        ends: ids of the tokens that end an answer.
        turns: positions where the next prompt of a conversation may part from this one.
        separators: for each choice what tells reasoning from content.
        guides: for each choice what says which tokens may come next; None: all may.
        ignored: what of the request has no effect with this model.
    """

    served: Served
    ask: Ask
    ids: list[int]
    text: str
    params: SamplingParams
    budget: int
    stops: Sequence[str]
    ends: frozenset[int]
    separators: Sequence[Separator]
    guides: Sequence[Guide | None] = (None,)
    turns: Sequence[int] = ()
    ignored: tuple[str, ...] = ()

    def order(self, choice: int) -> Order:
        """What the backend is to make for one of the choices."""
        guide = self.guides[choice]
        return Order(
            ids=self.ids,
            params=self.params,
            max_tokens=self.budget,
            choice=choice,
            ends=self.ends,
            priority=self.ask.priority,
            turns=self.turns,
            guide=guide,
        )

    def answer_text(self, choice: int) -> AnswerText:
        """The way of one of the answers from ids to text."""
        detokenizer = self.served.facts.tokenizer.detokenizer(after=self.before)
        return AnswerText(detokenizer, StopMatcher(self.stops), self.separators[choice])

    @property
    def before(self) -> Sequence[int]:
        """The ids whose text the answer goes on with; none where it begins one."""
        return self.ids if isinstance(self.ask.prompt, Text) or self.ask.prompt.continues else ()

    def finder(self) -> CallFinder | None:
        """What finds calls in one answer; None where no function can be called."""
        prompt = self.ask.prompt
        if not isinstance(prompt, Chat) or not prompt.offered:
            return None
        return self.served.tooling.finder(prompt.tools, led=self.led)

    @property
    def led(self) -> bool:
        """Whether a grammar leads the answer."""
        return self.guides[0] is not None

    @property
    def parallel(self) -> bool:
        """Whether an answer goes on behind its first call."""
        return not isinstance(self.ask.prompt, Chat) or self.ask.prompt.parallel


class Served:
    """A backend under its name, and what its chat template understands, which is found out once."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.created = int(time.time())

    @property
    def facts(self) -> Any:
        """What is known of the model."""
        return self.backend.facts

    @property
    def name(self) -> str:
        """The name that clients call it by."""
        return self.backend.facts.name

    def sampling(self, given: Mapping[str, Any]) -> SamplingParams:
        """How it draws, with the options that a request has given.

        Where the model's files say nothing and neither does the request, a preset decides: small models decoded
        greedily repeat themselves for ever.
        """
        defaults = self.backend.facts.defaults
        if defaults.says_sampling or "temperature" in given:
            return defaults.sampling.replace(**given)
        return defaults.sampling.replace(**{**resources.read("sampling", UNTOLD), **given})

    @cached_property
    def tooling(self) -> Tooling:
        """How it is told of functions, and calls them."""
        return Tooling(self.backend.facts.tokenizer)

    @cached_property
    def roles(self) -> Roles:
        """Which messages its template takes."""
        return Roles(self.backend.facts.tokenizer)

    def prepare(self, ask: Ask) -> Prepared:
        """Check a request and make its prompt. Templates and tokens take their time: not for the event loop.

        Raises:
            ApiError: a value is out of range.
            RunnerError: a value is, or the prompt does not fit the context, or the template refuses the messages.
        """
        facts = self.backend.facts
        if not 1 <= ask.choices <= MAX_CHOICES:
            raise invalid(f"n must be from 1 to {MAX_CHOICES}", "n")
        if ask.max_tokens is not None and ask.max_tokens < 1:
            raise ask.wrong("max_tokens", "max_tokens must be at least 1")
        stops = facts.defaults.stop if ask.stop is None else ask.stop
        if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in stops):
            raise ask.wrong("stop", f"stop takes up to {MAX_STOPS} texts of up to {MAX_STOP_LENGTH} characters")
        try:
            StopMatcher(stops)
        except UsageError as error:
            raise ask.wrong("stop", f"stop: {error}") from error
        params = self._params(ask)
        ids, text, ignored = self._prompt(ask.prompt)
        context = facts.context_length if ask.context is None else min(ask.context, facts.context_length)
        room = context - len(ids)
        if room < 1:
            raise ContextLengthError(len(ids), context)
        if not ids:
            raise invalid("the prompt is empty: it must have at least one token", "prompt")
        wanted = facts.defaults.budget(len(ids)) if ask.max_tokens is None else ask.max_tokens
        budget = room if wanted is None else min(wanted, room)
        special = facts.tokenizer.special_tokens
        separator = self._separator(ids, ask.prompt)
        ends = facts.eos_token_ids | {special[token] for token in separator.ends if token in special}
        if isinstance(ask.prompt, Text) and ask.prompt.suffix is not None:
            ends |= self._middle_ends
        constraint, asked = self._constraint(ask)
        if constraint is not None and ask.ignore_eos:
            raise invalid("ignore_eos: a form that the answer must have decides where it ends", "ignore_eos")
        guides: list[Guide | None] = [None] * ask.choices
        if constraint is not None:
            try:
                guides = [self.grammars.guide(constraint, separator) for _ in range(ask.choices)]
            except UsageError:
                if asked:  # else the model calls as it likes: nobody asked for a form
                    raise
        if ask.ignore_eos:
            ends = frozenset()
        turns = [len(ids) - self._opening] if isinstance(ask.prompt, Chat) and len(ids) > self._opening else []
        # Here, since it may render the chat again.
        separators = [copy.deepcopy(separator) for _ in range(ask.choices)]
        if isinstance(ask.prompt, Chat) and ask.prompt.offered:
            separators = [self.tooling.keeping(each) for each in separators]
        return Prepared(self, ask, ids, text, params, budget, stops, ends, separators, guides, turns, ignored)

    @cached_property
    def _opening(self) -> int:
        """How many tokens open the assistant's turn, which the next prompt has too but may go on from otherwise."""
        asked = [{"role": "user", "content": "hi"}]
        tokenizer = self.backend.facts.tokenizer
        whole = tokenizer.apply_chat_template(asked, add_generation_prompt=True)
        return max(0, len(whole) - len(tokenizer.apply_chat_template(asked, add_generation_prompt=False)))

    @cached_property
    def grammars(self) -> Grammars:
        """Compiles what answers must be."""
        facts = self.backend.facts
        return Grammars(facts.tokenizer, facts.eos_token_ids, facts.vocab_size)

    def _constraint(self, ask: Ask) -> tuple[Constraint | None, bool]:
        """What the answer must be, of its own form or calls of functions; and whether that was asked for."""
        chat = ask.prompt
        if not isinstance(chat, Chat) or not (chat.offered or chat.forced):
            return ask.constraint, True
        token_ids = self.backend.facts.tokenizer.special_tokens
        if forced := chat.forced:
            if ask.constraint is not None:
                raise invalid("a form of the answer and a forced call exclude each other", "tool_choice")
            return calls_of(forced, self.tooling.marks_to_write, token_ids, parallel=chat.parallel), True
        if ask.constraint is None and not chat.strict and not self.tooling.json_between_marks:
            return None, False
        marks = self.tooling.marks_to_write
        return calls_of(chat.tools, marks, token_ids, parallel=chat.parallel, instead=ask.constraint or "text"), (
            ask.constraint is not None or chat.strict
        )

    def count(self, chat: Chat) -> int:
        """The number of tokens of a conversation's prompt, whether it fits the context or not."""
        return len(self._prompt(chat)[0])

    def _params(self, ask: Ask) -> SamplingParams:
        given = {name: value for name, value in ask.sampling.items() if value is not None}
        size = self.backend.facts.vocab_size
        biases: Mapping[int, float] = {}
        for name, value in given.items():
            try:
                biases = SamplingParams(**{name: value}).logit_bias or biases  # its ids are numbers there
            except UsageError as error:
                raise ask.wrong(name, str(error)) from error
        if outside := [token for token in biases if not 0 <= token < size]:
            raise ask.wrong("logit_bias", f"logit_bias: token {outside[0]} is not in the vocabulary")
        if ask.ignore_eos:
            ends = {token: -LARGEST for token in self.backend.facts.eos_token_ids if token < size}
            given["logit_bias"] = {**biases, **ends}
        return self.sampling(given)

    def _prompt(self, prompt: Chat | Text) -> tuple[list[int], str, tuple[str, ...]]:
        """Ids and text of a prompt, and what of it has no effect."""
        facts = self.backend.facts
        if isinstance(prompt, Text):
            if not isinstance(prompt.prompt, str):
                if prompt.suffix is not None:
                    raise invalid("suffix: the prompt before it must be a text, not ids", "suffix")
                ids = list(prompt.prompt)
                if ids and not 0 <= min(ids) <= max(ids) < facts.vocab_size:
                    raise invalid(f"token ids must be from 0 to {facts.vocab_size - 1}", "prompt")
                return ids, "", ()
            text = prompt.prompt if prompt.suffix is None else self._form().prompt(prompt.prompt, prompt.suffix)
            self._check_length(text)
            return facts.tokenizer.encode(text, parse_special=prompt.special), text, ()
        arguments, ignored = self._arguments(prompt)
        texts: list[str] = []

        def rendered(text: str) -> None:
            self._check_length(text)
            texts.append(text)

        messages = self._messages(prompt)
        return facts.tokenizer.apply_chat_template(messages, on_rendered=rendered, **arguments), texts[-1], ignored

    @cached_property
    def infill(self) -> Infill | None:
        """How it is asked for what stands between two texts; None: it was not made for that."""
        return infill_of(self.backend.facts.tokenizer)

    def _form(self) -> Infill:
        if self.infill is None:
            raise invalid(
                f"suffix: {self.name} was not made to write what stands between two texts: its vocabulary has no "
                "tokens for that which are known here",
                "suffix",
            )
        return self.infill

    @cached_property
    def _middle_ends(self) -> frozenset[int]:
        """Ids of the tokens that end what stands between two texts, besides those that end all answers."""
        form, tokenizer = self._form(), self.backend.facts.tokenizer
        found = [one_token(tokenizer, text) for text in (*form.marks, *form.ends)]
        return frozenset(token for token in found if token is not None)

    def _messages(self, chat: Chat) -> list[Mapping[str, Any]]:
        """The messages as the template takes them."""
        return self.roles.fit(self.tooling.fit(chat.messages, chat.offered))

    def _check_length(self, text: str) -> None:
        """Refuse a text that is too long by its bytes alone, since splitting megabytes into tokens takes seconds."""
        length = self.backend.facts.context_length
        if len(text) >= 4 * length and (least := self.backend.facts.tokenizer.least_tokens(text)) >= length:
            raise ContextLengthError(least, length, at_least=True)

    def _arguments(self, chat: Chat) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Keywords for the template, and what has no effect on it."""
        tokenizer = self.backend.facts.tokenizer
        variables, ignored = self.effort(chat.effort)
        variables.update(tokenizer.template_kwargs(chat.variables))
        turn = {"continue_final_message": True} if chat.continues else {"add_generation_prompt": True}
        tools = {"tools": chat.offered} if chat.offered and self.tooling.knows_tools else {}
        return {**variables, **turn, **tools}, ignored

    def effort(self, effort: str | None) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The template's variables for an effort in reasoning; and the option's name where the model knows no effort.

        Raises:
            ApiError: the effort is no word that is known, or the model can't answer without reasoning.
        """
        if effort is None:
            return {}, ()
        if effort not in EFFORTS:
            raise invalid(
                f"reasoning_effort must be one of {', '.join(EFFORTS)}, not {effort!r:.60}", "reasoning_effort"
            )
        off, levels = self._switches
        if effort == "none":
            if off is None and levels:
                raise invalid("this model always reasons: its template has no way to turn it off", "reasoning_effort")
            return dict(off or {}), () if off else ("reasoning_effort",)
        if levels:
            return {"reasoning_effort": effort}, ()
        if off is not None and (name := next(iter(off))) in ("enable_thinking", "thinking", "reasoning"):
            return {name: True}, ()
        return {}, ("reasoning_effort",)

    @cached_property
    def reasons(self) -> bool:
        """Whether its template knows reasoning."""
        off, levels = self._switches
        return off is not None or levels or self.backend.facts.tokenizer.reasoning_key() is not None

    @cached_property
    def _switches(self) -> tuple[Mapping[str, Any] | None, bool]:
        """The variables that turn reasoning off, and whether the template reads an effort."""
        tokenizer = self.backend.facts.tokenizer
        try:
            return tokenizer.thinking_off(), "reasoning_effort" in tokenizer.template_variables()
        except TemplateError:
            return None, False

    def _separator(self, ids: Sequence[int], prompt: Chat | Text) -> Separator:
        """What tells reasoning from content in an answer to the prompt `ids`."""
        if isinstance(prompt, Text):
            return PlainText()
        arguments, _ = self._arguments(prompt)
        arguments.pop("add_generation_prompt", None)
        return self.backend.facts.tokenizer.separator(ids, self._messages(prompt), **arguments)
