"""OpenAI's `/v1/completions`: texts or ids to continue, with the prompt's log-probabilities if asked for."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, ClassVar

from starlette.requests import Request
from starlette.responses import Response

from runner.engine.sampler import Token
from runner.server import inert
from runner.server.answering import Answering, Delta, merged
from runner.server.errors import invalid, openai_form
from runner.server.inert import Table
from runner.server.model import Prepared, Served
from runner.server.openai_fields import Common, usage_of
from runner.server.operations import Handler
from runner.server.request import MAX_TOP_LOGPROBS, Ask, Text
from runner.server.serving import Running, Serving
from runner.server.streaming import Stream, data, json, while_there
from runner.server.structure import Format, StructuredOutputs, constraint_of
from runner.server.token_texts import TokenTexts, bounded

MAX_PROMPTS = 1024


class Body(Common, kw_only=True):
    """Body of a request."""

    prompt: str | list[Any]
    suffix: str | None = None
    logprobs: int | None = None
    echo: bool | None = None
    response_format: Format | None = None
    structured_outputs: StructuredOutputs | None = None
    inert: ClassVar[Table] = inert.COMPLETIONS

    def prompts(self) -> list[str | list[int]]:
        """The prompts: a text, several, ids, or several lists of ids."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if given and all(type(each) is int for each in given):
            return [given]
        if not 1 <= len(given) <= MAX_PROMPTS:
            raise invalid(f"prompt: from 1 to {MAX_PROMPTS} prompts in a request", "prompt")
        for index, each in enumerate(given):
            if not isinstance(each, str) and not (isinstance(each, list) and all(type(one) is int for one in each)):
                raise invalid(f"prompt[{index}]: expected a text or a list of token ids", f"prompt[{index}]")
        return given

    def asks(self) -> list[Ask]:
        """A request for each prompt."""
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise invalid(f"logprobs must be from 0 to {MAX_TOP_LOGPROBS}", "logprobs")
        most = self.max_tokens
        if most == 0 and not self.echo:
            raise invalid("max_tokens must be at least 1, unless echo is true", "max_tokens")
        if self.echo and self.suffix:
            raise invalid("echo: a prompt with a suffix is not one text that an answer could follow", "echo")
        return [
            Ask(
                prompt=Text(prompt=prompt, suffix=self.suffix or None),
                sampling=self.sampling(self.logprobs),
                max_tokens=max(most, 1) if most is not None else None,
                stop=self.stops(),
                choices=1 if self.n is None else self.n,
                constraint=constraint_of(self.response_format, self.structured_outputs),
                ignore_eos=bool(self.ignore_eos),
                priority=self.rank(),
            )
            for prompt in self.prompts()
        ]


def completions(serving: Serving) -> Handler:
    """`POST /v1/completions`."""

    async def answer(request: Request) -> Response:
        body = await serving.read(request, Body)
        usage_asked = body.usage_asked()
        served = serving.model(body.model)
        prepared = [await serving.prepare(request, served, ask) for ask in body.asks()]
        if body.echo and body.stream and body.logprobs is not None:
            raise invalid("echo with logprobs is not streamed: leave stream out", "echo")
        running = await serving.begin(request, *prepared)
        reply = Reply(served, served.name if body.model is None else body.model, running, body)
        if body.stream:
            return Stream(reply.stream(*usage_asked), done=running.close, cut=running.cut)
        with running:
            return json(await while_there(request, reply.whole()))

    return answer


class Pieces:
    """Tokens in the form of completions: texts, their places, and log-probabilities."""

    def __init__(self, texts: TokenTexts, prompt: Sequence[int], offset: int) -> None:
        """`offset` is the place of the first character of the answer to the prompt."""
        self._texts = texts
        self._offset = offset
        self._answer = texts.tokenizer.detokenizer(after=prompt)
        self.tokens: list[str] = []
        self.logprobs: list[float | None] = []
        self.top: list[dict[str, float] | None] = []
        self.offsets: list[int] = []

    def add_prompt(self, prompt: Sequence[Token], text: str) -> None:
        """Add the tokens of a prompt whose text is before the answer's."""
        reads, place = self._texts.tokenizer.detokenizer(skip_special_tokens=False), 0
        for index, token in enumerate(prompt):
            self._add(token, place)
            piece = reads.add(token.id)
            # What is put before a text is no part of it.
            if index or text.startswith(piece):
                place += len(piece)

    def add(self, token: Token) -> None:
        """Add a token of the answer. One that is no whole character begins where the character does."""
        self._add(token, self._offset)
        self._offset += len(self._answer.add(token.id))

    def _add(self, token: Token, place: int) -> None:
        self.tokens.append(self._texts.shown(token.id))
        self.offsets.append(place)
        self.logprobs.append(None if token.logprob is None else bounded(token.logprob))
        if token.logprob is None:
            self.top.append(None)
            return
        # The token itself is always among them; of two with one text the likelier counts.
        top: dict[str, float] = {}
        for index, value in [*(token.top_logprobs or ()), (token.id, token.logprob)]:
            name = self._texts.shown(index)
            top[name] = max(top.get(name, -float("inf")), bounded(value))
        self.top.append(top)

    def take(self) -> dict[str, Any]:
        """What was added since the last time."""
        result = {
            "tokens": self.tokens,
            "token_logprobs": self.logprobs,
            "top_logprobs": self.top,
            "text_offset": self.offsets,
        }
        self.tokens, self.logprobs, self.top, self.offsets = [], [], [], []
        return result


class Reply:
    """The answers to the prompts of one request."""

    def __init__(self, served: Served, model: str, running: Running, body: Body) -> None:
        self._served = served
        self._running = running
        self._answers = running.answers
        self._each = self._answers[0].prepared.ask.choices
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = model
        self._texts = TokenTexts(served.facts.tokenizer) if body.logprobs is not None else None
        self._top = body.logprobs or 0
        self._echo = bool(body.echo)
        self._nothing = body.max_tokens == 0

    def _frame(self, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _usage(self) -> dict[str, Any]:
        usages = [answer.usage for answer in self._answers]
        return usage_of(
            sum(each.prompt_tokens for each in usages),
            sum(each.completion_tokens for each in usages),
            sum(each.cached_tokens for each in usages),
            0,
        )

    def _prompt_text(self, prepared: Prepared) -> str:
        return prepared.text or str(self._served.facts.tokenizer.decode(prepared.ids, skip_special_tokens=False))

    async def _all(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """What comes of all prompts, with the index of the choice in the response."""

        async def one(place: int, answer: Answering) -> AsyncGenerator[tuple[int, Delta], None]:
            async for delta in answer.deltas():
                yield place * self._each + delta.choice, delta

        async for item in merged([one(place, answer) for place, answer in enumerate(self._answers)]):
            yield item

    async def stream(self, usage: bool, usage_always: bool) -> AsyncGenerator[bytes, None]:
        """The events of a stream."""

        def chunk(choices: list[Any]) -> bytes:
            frame = self._frame(choices)
            if usage:
                frame["usage"] = self._usage() if usage_always or not choices else None
            return data(frame)

        def choice(index: int, text: str, logprobs: Any, finish: str | None) -> bytes:
            return chunk([{"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}])

        pieces: dict[int, Pieces] = {}
        try:
            prompts = [self._prompt_text(answer.prepared) if self._echo else "" for answer in self._answers]
            if self._echo:
                for place, text in enumerate(prompts):
                    for index in range(place * self._each, (place + 1) * self._each):
                        yield choice(index, text, None, "length" if self._nothing else None)
            if not self._nothing:
                async for index, delta in self._all():
                    logprobs = None
                    if self._texts is not None:
                        if index not in pieces:
                            place = index // self._each
                            before = self._answers[place].prepared.before
                            pieces[index] = Pieces(self._texts, before, len(prompts[place]))
                        mine = pieces[index]
                        if delta.token is not None and delta.token.id not in self._ends(index):
                            mine.add(delta.token)
                        if delta.text or delta.finish:
                            logprobs = mine.take()
                    if delta.text or delta.finish:
                        yield choice(index, delta.text, logprobs, delta.finish)
            if usage:
                yield chunk([])
            yield b"data: [DONE]\n\n"
        except (Exception, asyncio.CancelledError) as error:
            yield data(openai_form(self._running.failed(error)))

    def _ends(self, index: int) -> frozenset[int]:
        return self._answers[index // self._each].prepared.ends

    async def whole(self) -> dict[str, Any]:
        """The whole response."""
        count = len(self._answers) * self._each
        texts: list[list[str]] = [[] for _ in range(count)]
        tokens: list[list[Token]] = [[] for _ in range(count)]
        reasons = ["length"] * count
        if not self._nothing:
            async for index, delta in self._all():
                texts[index].append(delta.text)
                if delta.token is not None and delta.token.id not in self._ends(index):
                    tokens[index].append(delta.token)
                reasons[index] = delta.finish or reasons[index]
        scored: Sequence[list[Token]] = [[]] * len(self._answers)
        if self._echo and self._texts is not None:
            backend = self._served.backend
            scored = await asyncio.gather(*(backend.score(each.prepared.ids, self._top) for each in self._answers))
        choices = []
        for index in range(count):
            prepared = self._answers[index // self._each].prepared
            prompt = self._prompt_text(prepared) if self._echo else ""
            logprobs = None
            if self._texts is not None:
                pieces = Pieces(self._texts, prepared.before, len(prompt))
                if self._echo:  # nothing stands before the first token
                    pieces.add_prompt([Token(prepared.ids[0]), *scored[index // self._each]], prompt)
                for token in tokens[index]:
                    pieces.add(token)
                logprobs = pieces.take()
            choices.append(
                {
                    "index": index,
                    "text": prompt + "".join(texts[index]),
                    "logprobs": logprobs,
                    "finish_reason": reasons[index],
                }
            )
        return {**self._frame(choices), "usage": self._usage()}
