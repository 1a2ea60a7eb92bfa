"""A backend whose answers are written down, behind the server's real HTTP layer; and a server on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import socket
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from runner.engine.defaults import GenerationDefaults
from runner.engine.sampler import Token
from runner.language_model import LanguageModel
from runner.server.backend import Facts, Order, Status, Step
from runner.server.limits import Options
from runner.server.local import LocalBackend
from runner.server.log import LOG
from runner.server.model import Served
from runner.server.pool import Lease, Pool
from runner.server.process import address_of, listening, serve_on
from runner.server.serving import Serving
from runner.text.tokenizer import Tokenizer
from runner.weights.plan import count_by_form

END = "<|im_end|>"
CHATML = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
SPECIAL = ("<|im_start|>", END)

Script = Callable[[str, Order], str]
"""Makes the answer to an order; it is given the prompt as text, special tokens spelled."""


@cache
def tokenizer(template: str = CHATML, special: Sequence[str] = SPECIAL, added: Sequence[str] = ()) -> Tokenizer:
    """A tokenizer of single bytes, special tokens and added ones."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place)
        library = tokenizers.Tokenizer(
            models.BPE({letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
        )
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        library.add_special_tokens(list(special))
        library.add_tokens(list(added))
        library.save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "chat_template": template}))
        return Tokenizer.from_directory(path)


def spaced_tokenizer(to: Path) -> Tokenizer:
    """A tokenizer of words with the space before them, the first of which a text loses, as Llama 2's."""
    words = ["?", "▁", "user", "assistant", *(f"▁{word}" for word in ("user", "assistant", "Paris", "is", "big"))]
    library = tokenizers.Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "?"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.add_special_tokens(list(SPECIAL))
    library.save(str(to / "tokenizer.json"))
    (to / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML.replace("\n", " ")}))
    return Tokenizer.from_directory(to)


class ToldBackend:
    """Answers what `script` makes of each order.

    Attributes:
        orders: what was ordered, in order.
        begun: answers that have begun.
        open: answers under way.
        held_by: requests that hold it.
        kept: for how long each wanted it to stay.
        fails: raised by the next token; the backend is dead then.
        cached: tokens of each prompt that were read before.
        pause: seconds before each token.
        gate: where it is set, no token comes before it is set to true.
    """

    def __init__(self, script: Script, *, name: str = "told", context: int = 4096, facts: Any = None) -> None:
        self.script = script
        made = tokenizer() if facts is None else facts
        end = made.special_tokens[END]
        self.facts = Facts(
            name=name, family="told", tokenizer=made, defaults=GenerationDefaults.read({"do_sample": True, "top_k": 0}),
            eos_token_ids=frozenset({end}), context_length=context, vocab_size=made.vocab_size,
        )  # fmt: skip
        self.orders: list[Order] = []
        self.open = 0
        self.held_by = 0
        self.kept: list[float | None] = []
        self.made = 0
        self.moments: list[float] = []
        self.fails: Exception | None = None
        self.dead = False
        self.pause = 0.0
        self.cached = 0
        self.held = threading.Event()
        self.held.set()

    async def hold(self, keep: float | None = None) -> Lease:
        """It is there."""
        self.held_by += 1
        self.kept.append(keep)

        def release() -> None:
            self.held_by -= 1

        return Lease(release)

    async def tokens(self, order: Order) -> AsyncGenerator[Step, None]:
        """Tell the answer."""
        self.orders.append(order)
        self.open += 1
        try:
            if self.cached:
                yield Step(None, self.cached)
            made = self.facts.tokenizer
            prompt = made.decode(order.ids, skip_special_tokens=False)
            answer = self.script(prompt, order)
            ids = made.encode(answer, add_special_tokens=False, parse_special=True)
            ids.append(next(iter(self.facts.eos_token_ids)))
            for count, token in enumerate(ids if order.guide is None else self._led(ids, order)):
                while not self.held.is_set():
                    await asyncio.sleep(0.002)
                await asyncio.sleep(self.pause)
                if self.fails is not None:
                    self.dead = True
                    raise self.fails
                if count == order.max_tokens:
                    return
                self.made += 1
                self.moments.append(time.perf_counter())
                top = order.params.logprobs
                if top is None:
                    yield Step(Token(token), self.cached)
                else:
                    likeliest = [(token, -0.25), *((index, -2.0 - index) for index in range(top - 1))][:top]
                    yield Step(Token(token, -0.25, likeliest), self.cached)
        finally:
            self.open -= 1

    def _led(self, ids: Sequence[int], order: Order) -> Iterator[int]:
        """The script where the order's guide allows it, else drawn by the seed from what it allows."""
        chance, place = random.Random(order.params.seed), 0
        (end,) = self.facts.eos_token_ids
        closers = self.facts.tokenizer.encode('"}],', add_special_tokens=False)
        assert order.guide is not None
        while True:
            bits = order.guide.allowed()
            assert bits is not None
            allowed = [index for index in range(self.facts.vocab_size) if bits[index // 32] >> index % 32 & 1]
            if place < len(ids) and ids[place] in allowed:
                token, place = ids[place], place + 1
            else:
                closing = [index for index in closers if index in allowed]
                token = (
                    end if end in allowed else chance.choice(closing if closing and chance.random() < 0.4 else allowed)
                )
            yield token
            order.guide.add(token)

    async def score(self, ids: Sequence[int], top: int) -> list[Token]:
        """Every token has the logarithm -1 but for its place."""
        return [Token(each, -1.0 - place, [(each, -1.0 - place)] * bool(top)) for place, each in enumerate(ids[1:])]

    def status(self) -> Status:
        """How it fares."""
        return Status(alive=not self.dead, running=self.open)

    def restart(self) -> None:
        """Alive again."""
        self.dead, self.fails = False, None

    def close(self) -> None:
        """Nothing is held."""


def facts_of(name: str, lm: LanguageModel) -> Facts:
    """What is known of a loaded model."""
    return Facts(
        name=name,
        family=lm.config.model_type,
        tokenizer=lm.tokenizer,
        defaults=lm.defaults,
        eos_token_ids=lm.eos_token_ids,
        context_length=lm.context_length,
        vocab_size=lm.config.vocab_size,
        nbytes=lm.nbytes,
        forms=count_by_form(lm.engine.layout),
    )


def local(lm: LanguageModel, name: str, *, memory: int = 1 << 40) -> LocalBackend:
    """A loaded model behind an engine, as the server has it."""
    pool = Pool(memory)
    slot = pool.add(name, lm.nbytes, lambda: lm)
    pool.load(slot)
    return LocalBackend(facts_of(name, lm), slot, pool)


class Running:
    """A server in a thread of this process."""

    def __init__(self, backends: Sequence[Any], aliases: Mapping[str, str] | None = None, **options: Any) -> None:
        self.options = Options(**{"port": 0, **options})
        self.serving = Serving([Served(each) for each in backends], self.options, aliases)
        made = listening(self.options)
        self.url = address_of(made, self.options)
        self.address: tuple[str, int] = made.getsockname()
        self._made = made
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.lines: list[dict[str, Any]] = []
        self.code: int | None = None
        self.end: Callable[[], None] = lambda: None

    def _run(self) -> None:
        def started(_address: str, end: Callable[[], None]) -> None:
            self.end = end
            self._ready.set()

        self.code = serve_on(self._made, self.serving, started)

    def __enter__(self) -> Running:
        handler = logging.Handler()
        handler.emit = lambda record: self.lines.append(  # type: ignore[method-assign]
            json.loads(record.getMessage()) if record.getMessage().startswith("{") else {"text": record.getMessage()}
        )
        self._handler = handler
        logging.getLogger(LOG).addHandler(handler)
        logging.getLogger(LOG).setLevel("INFO")
        logging.getLogger(LOG).propagate = False
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        if self._thread.is_alive():
            self.end()
        self._thread.join(20)
        logging.getLogger(LOG).removeHandler(self._handler)
        assert not self._thread.is_alive()

    def raw(self, data: bytes, *, timeout: float = 10.0) -> bytes:
        """Send bytes, and return all that comes back until the server closes."""
        with socket.create_connection(self.address, timeout) as connection:
            connection.sendall(data)
            pieces = []
            with contextlib.suppress(TimeoutError, ConnectionError):
                while piece := connection.recv(65536):
                    pieces.append(piece)
            return b"".join(pieces)


def waited(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether the condition comes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return condition()


def events(text: str) -> Iterator[dict[str, Any]]:
    """The data of server-sent events."""
    for line in text.splitlines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])
