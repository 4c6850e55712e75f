"""Answers asked for again: ``/v1/streams/{id}`` and ``/v1/responses/{id}``, at any ingress.

The id is that of the stream (``x-stream-id``), the ``x-request-id``, or the id the answer itself shows.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import msgspec

from penstock.queue.readers import Readers
from penstock.serving.context import Seen
from penstock.serving.durable.bodies import as_stream
from penstock.serving.durable.responses import Responses
from penstock.serving.durable.store import RequestStore
from penstock.serving.edge.asgi import App, Receive, Scope, Send, header, send_json
from penstock.serving.edge.durable import Durable
from penstock.serving.edge.event_ids import parse_event_id
from penstock.serving.edge.exchange import exchange_of
from penstock.serving.errors import InvalidField, NotFound
from penstock.serving.request import RESPONSES, ClientRequest

RESPONSES_PREFIX = "/v1/responses/"
STREAMS_PREFIX = "/v1/streams/"


class Kept(NamedTuple):
    """Where stored requests and their tokens are found."""

    store: RequestStore
    readers: Readers


class Streams:
    """Serves what is kept; passes everything else on."""

    def __init__(self, app: App, durable: Durable, kept: Kept, responses: Responses) -> None:
        self._app = app
        self._durable = durable
        self._store = kept.store
        self._readers = kept.readers
        self._responses = responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path.startswith(STREAMS_PREFIX):
            await self._stream(path.removeprefix(STREAMS_PREFIX), scope, receive, send)
        elif path.startswith(RESPONSES_PREFIX):
            await self._response(path.removeprefix(RESPONSES_PREFIX), scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _stream(self, rest: str, scope: Scope, receive: Receive, send: Send) -> None:
        name, _, action = rest.partition("/")
        what = (scope["method"], action)
        if what == ("GET", ""):
            stored = await self._find(scope, name)
            last = header(scope, b"last-event-id") or _query(scope, "last_event_id") or ""
            await self._durable.render_again(stored, parse_event_id(last), scope, receive, send)
        elif what == ("POST", "cancel"):
            stored = await self._find(scope, name)
            stopped = await self._readers.cancel(stored.record_ids, final=True)
            await _answer(send, {"id": stored.stream_id, "object": "stream", "cancelled": stopped > 0})
        else:
            raise NotFound(f"Unknown path: {scope['method']} {scope['path']}")

    async def _response(self, rest: str, scope: Scope, receive: Receive, send: Send) -> None:
        name, _, action = rest.partition("/")
        actions = {("POST", "cancel"): self._responses.cancel, ("DELETE", ""): self._responses.delete}
        what = (scope["method"], action)
        if what == ("GET", ""):
            await self._retrieve(await self._find(scope, name), scope, receive, send)
        elif what in actions:
            await _answer(send, await actions[what](await self._find(scope, name)))
        else:
            raise NotFound(f"Unknown path: {scope['method']} {scope['path']}")

    async def _retrieve(self, stored: ClientRequest, scope: Scope, receive: Receive, send: Send) -> None:
        if stored.path != RESPONSES:
            raise NotFound(f"Stream {stored.stream_id} is no response.")
        if _query(scope, "stream") != "true":
            return await _answer(send, await self._responses.retrieve(stored))
        after = _query(scope, "starting_after") or "-1"
        if not after.removeprefix("-").isdecimal():
            raise InvalidField("starting_after must be an event's sequence_number.", "starting_after")
        stream = msgspec.structs.replace(stored, body=as_stream(stored.body), stream=True)
        return await self._durable.render_again(stream, Seen((int(after) + 1,)), scope, receive, send)

    def _find(self, scope: Scope, name: str) -> Awaitable[ClientRequest]:
        caller = exchange_of(scope).caller
        assert caller is not None
        return self._store.find(caller.tenant, name)


def _query(scope: Scope, name: str) -> str | None:
    values = parse_qs(scope.get("query_string", b"").decode("latin-1")).get(name)
    return values[-1] if values else None


async def _answer(send: Send, document: dict[str, Any]) -> None:
    await send_json(send, 200, msgspec.json.encode(document))
