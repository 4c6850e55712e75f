"""Responses that are kept: retrieval, background, conversations.

A response is the last event of its stream, rendered again when it is asked for. While it is generated, its object is
that of the first event, with the status of the moment.
"""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.queue.errors import RequestError
from penstock.queue.readers import Progress, Readers
from penstock.serving.context import RequestContext
from penstock.serving.durable.bodies import as_stream, following, previous_response
from penstock.serving.durable.inner import Inner
from penstock.serving.durable.store import RESPONSE_PREFIX, RequestStore
from penstock.serving.edge.asgi import Send, send_json
from penstock.serving.edge.event_ids import STREAM_HEADER
from penstock.serving.errors import NotFound
from penstock.serving.request import ClientRequest

Object = dict[str, Any]


class Responses:
    """What ``/v1/responses`` offers beyond the answer to a POST."""

    def __init__(self, inner: Inner, store: RequestStore, readers: Readers) -> None:
        self._inner = inner
        self._store = store
        self._readers = readers

    async def prepare(self, stored: ClientRequest, body: bytes) -> ClientRequest:
        """The request with the conversation it follows before its own input.

        Raises:
            NotFound: there is no such response.
            RequestError: it has not ended yet.
        """
        name = previous_response(body)
        if name is None:
            return stored
        earlier = await self._store.find(stored.tenant, name)
        response = await self.retrieve(earlier)
        if response["status"] in ("queued", "in_progress"):
            raise RequestError(f"previous_response_id: {name} has not ended yet.")
        return msgspec.structs.replace(stored, body=following(stored.body, earlier.body, response["output"]))

    async def begin(self, context: RequestContext, send: Send) -> None:
        """Start a background response and answer with its object."""
        refused = await self._inner.accepted(context)
        if refused is not None:
            await send({"type": "http.response.start", "status": refused.status, "headers": refused.headers})
            await send({"type": "http.response.body", "body": refused.body, "more_body": False})
        else:
            stored = context.request
            name = (STREAM_HEADER, stored.stream_id.encode())
            await send_json(send, 200, msgspec.json.encode(await self.retrieve(stored)), [name])

    async def retrieve(self, stored: ClientRequest) -> Object:
        """The response object as it is now. Raises :class:`NotFound` where there is nothing that could be shown."""
        (progress,) = await self._readers.progress([stored.stream_id])
        again = msgspec.structs.replace(stored, body=as_stream(stored.body), stream=True, background=True)
        if progress.done and not progress.final:
            response = await self._last(again)
        else:
            response = await self._first(again) | {"status": _status(progress)}
        return response | {"background": stored.background}

    async def cancel(self, stored: ClientRequest) -> Object:
        """Stop it for good, also where it was stopped because nobody read it; what has ended stays as it is."""
        await self._readers.cancel(stored.record_ids, final=True)
        return await self.retrieve(stored)

    async def delete(self, stored: ClientRequest) -> Object:
        """Stop and forget it."""
        await self._readers.cancel(stored.record_ids, final=True)
        await self._store.delete(stored)
        return {"id": RESPONSE_PREFIX + stored.stream_id, "object": "response", "deleted": True}

    async def _first(self, stored: ClientRequest) -> Object:
        """The object of ``response.created``, which comes before the engine is asked for anything."""
        events = self._inner.events(stored)
        try:
            async for event in events:
                return _response_in(event)
        finally:
            await events.aclose()  # type: ignore[attr-defined]
        raise NotFound("The response cannot be shown.")

    async def _last(self, stored: ClientRequest) -> Object:
        response: Object = {}
        error: Object | None = None
        async for event in self._inner.events(stored):
            document = _document(event)
            response = document.get("response") or response
            if document.get("type") == "error" or "error" in document:
                error = document.get("error") or document
        if error is not None:
            described = {"code": error.get("code") or "server_error", "message": error.get("message") or ""}
            return response | {"status": "failed", "error": described}
        return response


def _status(progress: Progress) -> str:
    if progress.final:
        return "cancelled"
    return "in_progress" if progress.tokens else "queued"


def _response_in(event: bytes) -> Object:
    response = _document(event).get("response")
    if not isinstance(response, dict):
        raise NotFound("The response cannot be shown.")
    return response


def _document(event: bytes) -> Object:
    """What the event's data holds; of a refusal, its body."""
    data = event[event.find(b"data:") + 5 :] if event.startswith((b"event:", b"data:")) else event
    decoded = msgspec.json.decode(data) if data.strip().startswith(b"{") else {}
    return decoded if isinstance(decoded, dict) else {}
