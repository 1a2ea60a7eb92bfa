"""OpenAI's list of models, and what a model makes of a text: ids, and back."""

from __future__ import annotations

import asyncio
import time
from typing import ClassVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from runner.server.errors import ApiError, invalid
from runner.server.inert import Table
from runner.server.model import Served
from runner.server.operations import Handler
from runner.server.serving import Serving
from runner.server.streaming import json, while_there


class Tokenize(msgspec.Struct):
    """Body of `/tokenize`."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False
    inert: ClassVar[Table] = {}


class Detokenize(msgspec.Struct):
    """Body of `/detokenize`."""

    tokens: list[int]
    model: str | None = None
    inert: ClassVar[Table] = {}


def card(served: Served, name: str) -> dict[str, object]:
    """A model in OpenAI's form, with Anthropic's fields and the context in vLLM's."""
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "display_name": name,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(served.created)),
        "created": served.created,
        "owned_by": "runner",
        "root": served.backend.facts.parent or served.name,
        "parent": served.backend.facts.parent,
        "max_model_len": served.backend.facts.context_length,
        "loaded": served.backend.status().loaded,
    }


def models(serving: Serving) -> Handler:
    """`GET /v1/models`."""

    async def answer(_request: Request) -> Response:
        cards = [card(served, name) for name, served in serving.models.items()]
        cards += [card(serving.model(name), name) for name in serving.aliases]
        ends = {"first_id": cards[0]["id"], "last_id": cards[-1]["id"]} if cards else {}
        return json({"object": "list", "data": cards, "has_more": False, **ends})

    return answer


def model(serving: Serving) -> Handler:
    """`GET /v1/models/{id}`; an id may have slashes."""

    async def answer(request: Request) -> Response:
        name = request.path_params["id"]
        return json(card(serving.model(name), name))

    return answer


def tokenize(serving: Serving) -> Handler:
    """`POST /tokenize`: the ids of a text, special tokens spelled in it included."""

    async def answer(request: Request) -> Response:
        body = await serving.read(request, Tokenize)
        facts = serving.model(body.model).backend.facts

        def work() -> Response:
            ids = facts.tokenizer.encode(body.prompt, body.add_special_tokens, parse_special=True)
            result: dict[str, object] = {"count": len(ids), "max_model_len": facts.context_length, "tokens": ids}
            if body.return_token_strs:
                result["token_strs"] = [facts.tokenizer.piece(index) for index in ids]
            return json(result)

        # All of it elsewhere: of millions of tokens, texts and JSON take seconds, too.
        return await while_there(request, asyncio.to_thread(work))

    return answer


def detokenize(serving: Serving) -> Handler:
    """`POST /detokenize`: the text of ids."""

    async def answer(request: Request) -> Response:
        body = await serving.read(request, Detokenize)
        facts = serving.model(body.model).backend.facts
        if body.tokens and not 0 <= min(body.tokens) <= max(body.tokens) < facts.vocab_size:
            raise invalid(f"tokens must be from 0 to {facts.vocab_size - 1}", "tokens")
        text = await asyncio.to_thread(facts.tokenizer.decode, body.tokens, False)
        return json({"prompt": text})

    return answer


def embeddings(_serving: Serving) -> Handler:
    """`POST /v1/embeddings`: there is no model for it."""

    async def answer(_request: Request) -> Response:
        raise ApiError(
            400,
            "models here generate text and were not made to embed it: no embeddings are given, since numbers from "
            "such a model would look right and be of no use",
            code="unsupported_endpoint",
        )

    return answer
