"""What Ollama's clients ask about models: `/api/tags`, `/api/ps`, `/api/show`."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from runner.server import inert
from runner.server.errors import ApiError
from runner.server.inert import Table
from runner.server.model import Served
from runner.server.operations import Handler, version_of
from runner.server.serving import Serving
from runner.server.streaming import json

NEVER = 36500 * 86400.0
"""Seconds until a model goes that stays: a hundred years."""


class ShowBody(msgspec.Struct):
    """Body of `/api/show`."""

    model: str | None = None
    name: str | None = None
    inert: ClassVar[Table] = {"verbose": inert.OLLAMA["verbose"], "system": inert.OLLAMA["template"]}


def found(serving: Serving, name: str | None) -> Served:
    """The model of a name, which may have Ollama's tag behind it."""
    if name is None or name in serving.models or name in serving.aliases:
        return serving.model(name)
    return serving.model(name.removesuffix(":latest"))


def written(moment: datetime) -> str:
    """A moment as Ollama writes it: RFC 3339, of UTC."""
    return moment.isoformat().replace("+00:00", "Z")


def _card(served: Served, name: str) -> dict[str, Any]:
    facts = served.backend.facts
    return {
        "name": name,
        "model": name,
        "modified_at": written(datetime.fromtimestamp(served.created, UTC)),
        "size": facts.nbytes,
        "digest": hashlib.sha256(f"{served.name}\n{facts.family}\n{facts.nbytes}".encode()).hexdigest(),
        "details": _details(served),
    }


def _details(served: Served) -> dict[str, Any]:
    facts = served.backend.facts
    return {
        "parent_model": facts.parent or "",
        "format": facts.format,
        "family": facts.family,
        "families": [facts.family],
        "parameter_size": size(facts.forms.total()),
        "quantization_level": max(facts.forms, key=facts.forms.__getitem__, default=""),
    }


def size(parameters: int) -> str:
    """A number of parameters as Ollama writes it: 134.52M, 8.0B; "" for none."""
    if not parameters:
        return ""
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.2f}M"


def _names(serving: Serving) -> list[tuple[str, Served]]:
    return [*serving.models.items(), *((name, serving.model(name)) for name in serving.aliases)]


def tags(serving: Serving) -> Handler:
    """`GET /api/tags`."""

    async def answer(_request: Request) -> Response:
        return json({"models": [_card(served, name) for name, served in _names(serving)]})

    return answer


def ps(serving: Serving) -> Handler:
    """`GET /api/ps`: the models that are loaded, and until when."""

    async def answer(_request: Request) -> Response:
        loaded = []
        for name, served in serving.models.items():
            status = served.backend.status()
            if status.loaded:
                until = datetime.now(UTC) + timedelta(seconds=min(max(status.expires_in, 0.0), NEVER))
                loaded.append(
                    {
                        **_card(served, name),
                        "size_vram": served.backend.facts.nbytes,
                        "expires_at": written(until),
                        "context_length": served.backend.facts.context_length,
                    }
                )
        return json({"models": loaded})

    return answer


def show(serving: Serving) -> Handler:
    """`POST /api/show`."""

    async def answer(request: Request) -> Response:
        body = await serving.read(request, ShowBody)
        served = found(serving, body.model or body.name)
        facts = served.backend.facts
        capabilities = ["completion", "tools"]
        if served.infill is not None:
            capabilities.append("insert")
        if served.reasons:
            capabilities.append("thinking")
        sources = facts.tokenizer.template_sources
        return json(
            {
                "modelfile": f"FROM {served.name}",
                "parameters": "\n".join(
                    f"{name} {value}"
                    for name, value in served.sampling({}).to_dict().items()
                    if value not in (None, {})
                ),
                "template": sources.get("default", ""),
                "license": "",
                "details": _details(served),
                "model_info": {
                    "general.architecture": facts.family,
                    "general.basename": served.name,
                    "general.parameter_count": facts.forms.total(),
                    f"{facts.family}.context_length": facts.context_length,
                    f"{facts.family}.vocab_size": facts.vocab_size,
                },
                "capabilities": capabilities,
                "modified_at": _card(served, served.name)["modified_at"],
            }
        )

    return answer


def version(_serving: Serving) -> Handler:
    """`GET /api/version`."""

    async def answer(_request: Request) -> Response:
        return json({"version": version_of()})

    return answer


def embeddings(_serving: Serving) -> Handler:
    """`POST /api/embed`: there is no model for it."""

    async def answer(_request: Request) -> Response:
        raise ApiError(400, "models here generate text and were not made to embed it")

    return answer
