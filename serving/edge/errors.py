"""Turns whatever goes wrong below into an answer the client's SDK understands.

Three ways lead here. An exception that escapes (the edge's own refusals among them). A response vLLM made
of an error the engine client noted in the request's :class:`~penstock.serving.context.Outcome`: its body is
replaced by ours. And a stream that fails before its first event: vLLM has said "200" by then, but an event
stream's headers are kept back until there is something to stream, so the client still gets the status that
makes its SDK retry.
"""

from __future__ import annotations

from penstock.queue.errors import PenstockError, TransientError
from penstock.queue.logs import get_logger
from penstock.queue.messages import StreamError
from penstock.serving.edge.asgi import (
    App,
    Headers,
    Message,
    Receive,
    Scope,
    Send,
    is_event_stream,
    send_json,
    with_headers,
)
from penstock.serving.edge.exchange import Exchange, exchange_of
from penstock.serving.edge.routes import Dialect
from penstock.serving.edge.shapes import error_body, error_event
from penstock.serving.errors import INTERNAL

_ERROR_EVENTS = (b'data: {"error"', b"event: error\n")
_DONE = b"data: [DONE]\n\n"
_NO_RETRY = (b"x-should-retry", b"false")
_RETRY_AFTER = (b"retry-after", str(TransientError.retry_after).encode())
_log = get_logger()


class Errors:
    """Renders errors and puts ``x-request-id``, ``retry-after`` and ``x-should-retry`` on responses."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = exchange_of(scope)
        response = _Response(exchange, send)
        try:
            await self._app(scope, receive, response.send)
        except PenstockError as error:
            exchange.outcome.fail(error)
            await response.fail(getattr(error, "param", None))
        except Exception:
            if exchange.disconnected:
                return  # nobody is there to be told, and a broken pipe is no fault of ours
            _log.exception("unhandled", request_id=exchange.request_id, path=scope["path"])
            exchange.outcome.fail(INTERNAL)
            await response.fail()


class _Response:
    """One response on its way out: nothing sent, start kept back, under way, or ended."""

    def __init__(self, exchange: Exchange, send: Send) -> None:
        self._exchange = exchange
        self._send = send
        self._held: Message | None = None
        self._started = False
        self._ended = False
        self._streaming = False

    async def send(self, message: Message) -> None:
        """Pass a message of the application on, or what belongs in its place."""
        if self._ended:
            return
        if message["type"] == "http.response.start":
            await self._start(message)
        elif not self._started and self._error is not None:
            await self._refuse(self._error)
        else:
            await self._body(message)

    async def fail(self, param: str | None = None) -> None:
        """End the response with the outcome's error, as far as it can still be told."""
        error = self._error
        if self._ended or error is None:
            return
        if not self._started:
            await self._refuse(error, param)
        elif self._streaming:
            await self._end_stream(error)
        else:
            raise ConnectionError("the response broke off")  # closes the connection: visibly short, not whole

    @property
    def _error(self) -> StreamError | None:
        return self._exchange.outcome.error

    async def _start(self, message: Message) -> None:
        self._streaming = is_event_stream(message)
        self._held = message
        if not self._streaming and self._error is None:
            await self._release()

    async def _release(self) -> None:
        if self._held is not None:
            start, self._held = self._held, None
            self._started = True
            retry = [_RETRY_AFTER] if start["status"] == 503 and not _has(start, b"retry-after") else []
            start["headers"] = with_headers(list(start["headers"]), [self._id, *retry])
            await self._send(start)

    async def _body(self, message: Message) -> None:
        await self._release()
        more = message.get("more_body", False)
        failed = not more or message.get("body", b"").startswith(_ERROR_EVENTS)
        if self._streaming and self._error is not None and failed:
            await self._end_stream(self._error)
        else:
            self._ended = not more
            await self._send(message)

    async def _end_stream(self, error: StreamError) -> None:
        self._ended = True
        dialect = self._exchange.route.dialect
        event = error_event(dialect, error, self._exchange.request_id)
        body = event + _DONE if dialect is Dialect.OPENAI else event
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _refuse(self, error: StreamError, param: str | None = None) -> None:
        self._held, self._started, self._ended = None, True, True
        body = error_body(self._exchange.route.dialect, error, self._exchange.request_id, param)
        await send_json(self._send, error.status, body, [self._id, *_advice(error)])

    @property
    def _id(self) -> tuple[bytes, bytes]:
        return b"x-request-id", self._exchange.request_id.encode()


def _advice(error: StreamError) -> Headers:
    """What the SDKs should do next: they retry 409, 429 and 5xx by themselves unless told otherwise."""
    if error.retryable:
        return [_RETRY_AFTER]
    return [_NO_RETRY] if error.code != INTERNAL.code else []


def _has(start: Message, name: bytes) -> bool:
    return any(key.lower() == name for key, _ in start["headers"])
