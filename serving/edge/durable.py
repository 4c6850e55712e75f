"""Gives generating requests a life of their own: stored, numbered, and run once under an idempotency key.

What can be asked for again is stored: event streams, requests with an ``Idempotency-Key``, and responses. Storing a
stream runs beside vLLM's rendering and is waited for before the request is published.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import msgspec

from penstock.queue.errors import StoreUnavailable
from penstock.serving.context import NOTHING_SEEN, RequestContext, Seen, current
from penstock.serving.durable.bodies import GENERATING, for_handler
from penstock.serving.durable.inner import render
from penstock.serving.durable.responses import Responses
from penstock.serving.durable.store import RequestStore
from penstock.serving.edge.asgi import App, Receive, Scope, Send, header, is_json
from penstock.serving.edge.event_ids import parse_event_id
from penstock.serving.edge.exchange import Exchange, exchange_of
from penstock.serving.errors import InvalidField, NotFound
from penstock.serving.request import RESPONSES, ClientRequest, digest_of
from penstock.serving.settings import IngressSettings

EVENT_IDS = b"x-event-ids"
"""``none`` leaves the events of this answer without ids, for clients that take every line of an event for data."""
MAX_KEY = 255
"""Letters in an idempotency key, as Stripe has it."""


class Durable:
    """In front of vLLM's application and behind :class:`Intake`."""

    def __init__(self, app: App, store: RequestStore, responses: Responses, settings: IngressSettings) -> None:
        self._app = app
        self._store = store
        self._responses = responses
        self._settings = settings
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST" or scope["path"] not in GENERATING or not is_json(scope):
            return await self._app(scope, receive, send)
        request, key = current().request, idempotency_key(scope)
        if key is None and not request.resumable:
            return await self._app(scope, receive, send)
        stored = self._stored(request, keyed=key is not None)
        if stored.path == RESPONSES:
            stored = await self._responses.prepare(stored, request.body)
        if key is not None:
            return await self._once(stored, key, digest_of(request.path, request.body), scope, receive, send)
        return await self._run(stored, None, self._saving(stored), scope, receive, send)

    async def _once(
        self, stored: ClientRequest, key: str, digest: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Run it, or give the answer of the first request with this key, wherever that one is."""
        skip = parse_event_id(header(scope, b"last-event-id") or "")
        first = await self._store.claim(stored, key, digest)
        if first is not None:
            try:
                return await self.render_again(first, skip, scope, receive, send)
            finally:
                self._forget_if_refused(first, key, None, exchange_of(scope))
        if any(skip.counts):
            await self._store.release(stored, key)
            raise NotFound("Nothing is kept under this Idempotency-Key; send it without Last-Event-ID to start anew.")
        return await self._run(stored, key, None, scope, receive, send)

    async def _run(
        self,
        stored: ClientRequest,
        key: str | None,
        saved: asyncio.Task[None] | None,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        exchange = exchange_of(scope)
        skip = None if header(scope, EVENT_IDS) == "none" else NOTHING_SEEN
        context = self._context(stored, exchange, skip, attach=False)
        context.saved = saved
        try:
            if stored.background and not stored.stream:
                await self._responses.begin(context, send)
            else:
                await render(self._app, context, scope, receive, send)
        finally:
            self._forget_if_refused(stored, key, saved, exchange)

    async def render_again(self, stored: ClientRequest, skip: Seen, scope: Scope, receive: Receive, send: Send) -> None:
        """The answer of a request that was accepted before, without the events the client has."""
        exchange = exchange_of(scope)
        exchange.speak_for(stored.path)
        exchange.priority_class, exchange.model = stored.priority_class, stored.model
        context = self._context(stored, exchange, skip, attach=True)
        await render(self._app, context, scope, receive, send)

    @staticmethod
    def _stored(request: ClientRequest, *, keyed: bool) -> ClientRequest:
        body = for_handler(request.path, request.body, request.stream_id, background=request.background)
        return msgspec.structs.replace(request, body=body, keyed=keyed)

    def _context(self, stored: ClientRequest, exchange: Exchange, skip: Seen | None, *, attach: bool) -> RequestContext:
        grace_s = self._settings.keyed_grace_s if stored.keyed else self._settings.resume_grace_s
        return RequestContext(stored, exchange.outcome, attach, skip, grace_s=None if stored.background else grace_s)

    def _saving(self, stored: ClientRequest) -> asyncio.Task[None]:
        return self._start(self._store.save(stored))

    def _forget_if_refused(
        self, stored: ClientRequest, key: str | None, saved: asyncio.Task[None] | None, exchange: Exchange
    ) -> None:
        accepted, error = exchange.outcome.accepted.is_set(), exchange.outcome.error
        failed_before_start = error is not None and error.retryable and exchange.status >= 500
        if not accepted or failed_before_start:
            self._start(self._forget(stored, key, saved, ended=accepted))

    async def _forget(
        self, stored: ClientRequest, key: str | None, saved: asyncio.Task[None] | None, *, ended: bool
    ) -> None:
        """Nobody gets an answer of it: the next request with this key is the first. If Redis is away, it expires."""
        if saved is not None:
            await asyncio.wait({saved})
        with suppress(StoreUnavailable):
            await self._store.release(stored, key, ended=ended)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits for it is told; a request refused meanwhile needs nothing stored


def idempotency_key(scope: Scope) -> str | None:
    """The client's key. Raises :class:`InvalidField` for an unusable one."""
    key = header(scope, b"idempotency-key")
    if key is not None and not 0 < len(key) <= MAX_KEY:
        raise InvalidField(f"Idempotency-Key must have 1 to {MAX_KEY} letters.", "idempotency-key")
    return key
