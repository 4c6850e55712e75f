"""What the ingress offers: an allow-list in front of vLLM's app, and the two probes.

vLLM's app also has routes that steer the engine, load adapters, call into workers or generate without
rendering (``/pause``, ``/scale_elastic_ep``, ``/v1/load_lora_adapter``, ``/inference/v1/generate``,
``/invocations``, ...). Every release adds some, so nothing is offered that is not named here. The probes
and ``/metrics`` need no API key.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from enum import Enum, auto
from typing import NamedTuple

import msgspec

from penstock.serving.edge.asgi import App, Receive, Scope, Send, send_json
from penstock.serving.errors import NotFound


class Dialect(Enum):
    """Whose error shapes a route speaks."""

    OPENAI = auto()
    RESPONSES = auto()
    ANTHROPIC = auto()


class Route(NamedTuple):
    """One offered path. ``label`` is its name in metrics and logs."""

    label: str
    dialect: Dialect = Dialect.OPENAI
    public: bool = False


ROUTES = {
    route.label: route
    for route in (
        Route("/v1/chat/completions"),
        Route("/v1/completions"),
        Route("/v1/responses", Dialect.RESPONSES),
        Route("/v1/messages", Dialect.ANTHROPIC),
        Route("/v1/messages/count_tokens", Dialect.ANTHROPIC),
        Route("/v1/files"),
        Route("/v1/batches"),
        Route("/v1/models"),
        Route("/tokenize"),
        Route("/detokenize"),
        Route("/version"),
        Route("/metrics", public=True),
        Route("/health", public=True),
        Route("/ready", public=True),
    )
}
_PATTERNS = (
    (re.compile(r"/v1/files/[^/]+"), Route("/v1/files/{id}")),
    (re.compile(r"/v1/files/[^/]+/content"), Route("/v1/files/{id}/content")),
    (re.compile(r"/v1/batches/[^/]+"), Route("/v1/batches/{id}")),
    (re.compile(r"/v1/batches/[^/]+/cancel"), Route("/v1/batches/{id}/cancel")),
    (re.compile(r"/v1/responses/[^/]+"), Route("/v1/responses/{id}", Dialect.RESPONSES)),
    (re.compile(r"/v1/responses/[^/]+/cancel"), Route("/v1/responses/{id}/cancel", Dialect.RESPONSES)),
    (re.compile(r"/v1/streams/[^/]+"), Route("/v1/streams/{id}")),
    (re.compile(r"/v1/streams/[^/]+/cancel"), Route("/v1/streams/{id}/cancel")),
)
"""Routes with ids in them."""
_UNKNOWN = "other"

Missing = Callable[[], Awaitable[dict[str, str]]]
"""Finds out what is missing to serve a request: part -> why. Empty means ready."""


def route_of(path: str) -> Route:
    """The route of a path; of an unknown one, a label that cannot grow the metrics and the right error
    shape.
    """
    dialect = Dialect.ANTHROPIC if path.startswith("/v1/messages") else Dialect.OPENAI
    named = ROUTES.get(path) or next((route for pattern, route in _PATTERNS if pattern.fullmatch(path)), None)
    return named or Route(_UNKNOWN, dialect)


class Routes:
    """Answers the probes and lets only :data:`ROUTES` through. ``/health``: alive; ``/ready``: could serve
    now.
    """

    def __init__(self, app: App, missing: Missing) -> None:
        self._app = app
        self._missing = missing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path == "/health":
            await send_json(send, 200, b'{"status":"ok"}')
        elif path == "/ready":
            await self._ready(send)
        elif route_of(path).label != _UNKNOWN:
            await self._app(scope, receive, send)
        else:
            raise NotFound(f"Unknown path: {scope['method']} {path}")

    async def _ready(self, send: Send) -> None:
        missing = await self._missing()
        body = msgspec.json.encode({"status": "unavailable" if missing else "ready", "missing": missing})
        await send_json(send, 503 if missing else 200, body)
