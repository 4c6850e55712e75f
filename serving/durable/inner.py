"""Runs a stored request through vLLM's application as if its client had just sent it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

from penstock.serving.context import NOTHING_SEEN, RequestContext, enter
from penstock.serving.edge.asgi import App, Message, Receive, Scope, Send
from penstock.serving.edge.body import replay
from penstock.serving.edge.errors import Errors
from penstock.serving.edge.exchange import Exchange, attach
from penstock.serving.edge.routes import route_of
from penstock.serving.request import ClientRequest, scope_of

_BASE: Scope = {
    "asgi": {"version": "3.0"},
    "http_version": "1.1",
    "scheme": "http",
    "root_path": "",
    "client": None,
    "server": ("inner", 0),
}


class InnerResponse(NamedTuple):
    """A whole answer."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


def attached(stored: ClientRequest) -> RequestContext:
    """The context in which the answer is rendered without a client, who may come later."""
    return RequestContext(stored, attach=True, skip=NOTHING_SEEN, grace_s=None)


async def render(app: App, context: RequestContext, base: Scope, receive: Receive, send: Send) -> None:
    """Have ``app`` answer the context's request on an open exchange."""
    enter(context)
    await app(scope_of(context.request, base), replay(context.request.body, receive), send)


class Inner:
    """Answers of stored requests, without a client: each attaches to the run there is, or starts it."""

    def __init__(self, app: App) -> None:
        self._app = Errors(app)

    async def respond(self, context: RequestContext) -> InnerResponse:
        """The whole answer, errors included. Cancelling this does not stop a ``background`` request."""
        messages: list[Message] = []
        await self._start(context, messages.append)
        return _whole(messages)

    async def accepted(self, context: RequestContext) -> InnerResponse | None:
        """Start a request and leave it to itself once the queue has it; its answer, if it was refused."""
        messages: list[Message] = []
        running = self._start(context, messages.append)
        waiting = asyncio.create_task(context.outcome.accepted.wait())
        await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        running.cancel()
        await asyncio.wait({running})
        return None if context.outcome.accepted.is_set() else _whole(messages)

    async def events(self, stored: ClientRequest) -> AsyncIterator[bytes]:
        """The blocks of its event stream, or the body of its refusal. Closing it early stops nothing of a
        ``background`` request."""
        arrived: asyncio.Queue[Message | None] = asyncio.Queue()
        running = self._start(attached(stored), arrived.put_nowait)
        running.add_done_callback(lambda _: arrived.put_nowait(None))
        try:
            while (message := await arrived.get()) is not None:
                if body := message.get("body"):
                    yield body
        finally:
            running.cancel()
            await asyncio.wait({running})

    def _start(self, context: RequestContext, take: Callable[[Message], None]) -> asyncio.Task[None]:
        async def send(message: Message) -> None:
            take(message)

        base, request = dict(_BASE), context.request
        attach(base, Exchange(request.external_id, route_of(request.path), outcome=context.outcome))
        return asyncio.create_task(render(self._app, context, base, _nothing_more, send))


def _whole(messages: list[Message]) -> InnerResponse:
    start, *bodies = messages
    return InnerResponse(start["status"], start["headers"], b"".join(each.get("body", b"") for each in bodies))


async def _nothing_more() -> Message:
    await asyncio.Event().wait()
    raise AssertionError("nobody sets this event")
