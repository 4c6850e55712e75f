"""Answers generating requests by vLLM's serving objects, without the rest of vLLM's application.

Everything else is the application's: other paths, what is no JSON, requests from browsers of other origins, and the
words for whatever is wrong with a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from penstock.serving.context import RequestContext, current_or_none
from penstock.serving.edge.asgi import App, Receive, Scope, Send, header, is_json, send_json
from penstock.serving.edge.body import DisconnectedError, replay
from penstock.serving.handlers import Answer, Events, Handlers

EVENT_STREAM = (b"content-type", b"text/event-stream; charset=utf-8")
T = TypeVar("T")


class Direct:
    """In front of vLLM's application."""

    def __init__(self, app: App, handlers: Handlers) -> None:
        self._app = app
        self._handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = current_or_none()
        if context is None or not self._takes(scope, context):
            return await self._app(scope, receive, send)
        try:
            await self._answer(context, scope, receive, send)
        except DisconnectedError:
            return None

    def _takes(self, scope: Scope, context: RequestContext) -> bool:
        asked = scope["method"] == "POST" and scope["path"] == context.request.path
        return asked and self._handlers.know(scope["path"]) and is_json(scope) and header(scope, b"origin") is None

    async def _answer(self, context: RequestContext, scope: Scope, receive: Receive, send: Send) -> None:
        request = context.request
        answer = await _while_connected(receive, self._handlers.answer(request, scope))
        if isinstance(answer, Answer):
            await send_json(send, answer.status, answer.body)
        elif answer is not None:
            await _while_connected(receive, _stream(answer, send))
        else:
            context.attach |= context.outcome.accepted.is_set()  # it runs: the application is to follow it
            await self._app(scope, replay(request.body, receive), send)


async def _stream(events: Events, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [EVENT_STREAM]})
    async with aclosing(events):
        async for event in events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client goes away.

    Raises:
        DisconnectedError: it has.
    """
    running, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({running, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not running.done():
            running.cancel()
            await asyncio.wait({running})
    if running.cancelled():
        raise DisconnectedError
    return running.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
