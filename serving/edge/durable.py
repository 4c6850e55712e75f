"""Gives generating requests a life of their own: stored, numbered, and run once under an idempotency key.

What can be asked for again is stored: event streams, requests with an ``Idempotency-Key``, and responses. Storing a
stream runs beside vLLM's rendering and is waited for before the request is published.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from penstock.queue.errors import StoreUnavailable
from penstock.serving.context import NOTHING_SEEN, RequestContext, Seen, current
from penstock.serving.durable.bodies import GENERATING, RESPONSES, for_handler
from penstock.serving.durable.inner import render
from penstock.serving.durable.requests import StoredRequest, context_of, digest_of
from penstock.serving.durable.responses import Responses
from penstock.serving.durable.store import RequestStore
from penstock.serving.edge.asgi import App, Receive, Scope, Send, header
from penstock.serving.edge.event_ids import parse_event_id
from penstock.serving.edge.exchange import exchange_of
from penstock.serving.errors import InvalidField, NotFound
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
        context, key = current(), idempotency_key(scope)
        if key is None and not context.stored:
            return await self._app(scope, receive, send)
        stored = self._stored(context, scope, keyed=key is not None)
        if stored.path == RESPONSES:
            stored = await self._responses.prepare(stored, context.body)
        if key is not None:
            return await self._once(stored, key, digest_of(stored.path, context.body), scope, receive, send)
        return await self._run(stored, None, self._saving(stored), scope, receive, send)

    async def _once(
        self, stored: StoredRequest, key: str, digest: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Run it, or give the answer of the first request with this key, wherever that one is."""
        skip = parse_event_id(header(scope, b"last-event-id") or "")
        first = await self._store.claim(stored, key, digest)
        if first is not None:
            return await self.render_again(first, skip, scope, receive, send)
        if any(skip.counts):
            await self._store.release(stored, key)
            raise NotFound("Nothing is kept under this Idempotency-Key; send it without Last-Event-ID to start anew.")
        return await self._run(stored, key, None, scope, receive, send)

    async def _run(
        self,
        stored: StoredRequest,
        key: str | None,
        saved: asyncio.Task[None] | None,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        exchange = exchange_of(scope)
        context = context_of(
            stored,
            attach=False,
            skip=None if header(scope, EVENT_IDS) == "none" else NOTHING_SEEN,
            saved=saved,
            grace_s=self._grace_s(stored),
            outcome=exchange.outcome,
        )
        try:
            if stored.background and not stored.stream:
                await self._responses.begin(stored, context, send)
            else:
                await render(self._app, stored, context, scope, receive, send)
        finally:
            error = exchange.outcome.error
            failed_before_start = error is not None and error.retryable and exchange.status >= 500
            if not exchange.outcome.accepted.is_set() or failed_before_start:
                self._start(self._forget(stored, key, saved))

    async def render_again(self, stored: StoredRequest, skip: Seen, scope: Scope, receive: Receive, send: Send) -> None:
        """The answer of a request that was accepted before, without the events the client has."""
        exchange = exchange_of(scope)
        exchange.speak_for(stored.path)
        exchange.priority_class, exchange.model = stored.priority_class, stored.model
        context = context_of(stored, skip=skip, grace_s=self._grace_s(stored), outcome=exchange.outcome)
        await render(self._app, stored, context, scope, receive, send)

    def _stored(self, context: RequestContext, scope: Scope, *, keyed: bool) -> StoredRequest:
        return StoredRequest(
            stream_id=context.stream_id,
            tenant=context.tenant,
            key_id=context.key_id,
            path=context.path,
            body=for_handler(context.path, context.body, context.stream_id, background=context.background),
            content_type=header(scope, b"content-type") or "",
            external_id=context.external_id,
            priority_class=context.priority_class,
            accepted_ms=context.accepted_ms,
            deadline_ms=context.deadline_ms,
            stream=context.stream,
            background=context.background,
            model=context.model,
            keyed=keyed,
            n=context.n,
            choices=context.choices,
            tags=context.tags,
            trace=context.trace,
        )

    def _grace_s(self, stored: StoredRequest) -> float:
        return self._settings.keyed_grace_s if stored.keyed else self._settings.resume_grace_s

    def _saving(self, stored: StoredRequest) -> asyncio.Task[None]:
        return self._start(self._store.save(stored))

    async def _forget(self, stored: StoredRequest, key: str | None, saved: asyncio.Task[None] | None) -> None:
        """Nothing was accepted: the next request with this key is the first. If Redis is away, it expires."""
        if saved is not None:
            await asyncio.wait({saved})
        with suppress(StoreUnavailable):
            await self._store.release(stored, key)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits for it is told; a request refused meanwhile needs nothing stored


def is_json(scope: Scope) -> bool:
    """Whether the body says it is JSON. vLLM refuses other types in its own words."""
    return (header(scope, b"content-type") or "").lower().startswith("application/json")


def idempotency_key(scope: Scope) -> str | None:
    """The client's key. Raises :class:`InvalidField` for an unusable one."""
    key = header(scope, b"idempotency-key")
    if key is not None and not 0 < len(key) <= MAX_KEY:
        raise InvalidField(f"Idempotency-Key must have 1 to {MAX_KEY} letters.", "idempotency-key")
    return key
