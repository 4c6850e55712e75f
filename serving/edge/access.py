"""The outermost layer: one request id, one log line and the edge's metrics for every request."""

from __future__ import annotations

import re
import time

from prometheus_client import Counter, Gauge
from structlog.contextvars import bind_contextvars

from penstock.queue.logs import get_logger
from penstock.queue.records import new_request_id
from penstock.serving.edge.asgi import (
    App,
    Message,
    Receive,
    Scope,
    Send,
    header,
    is_event_stream,
    with_headers,
)
from penstock.serving.edge.exchange import Exchange, attach
from penstock.serving.edge.routes import route_of

REQUESTS = Counter(
    "penstock_http_requests_total",
    "HTTP requests by route, status and priority class (empty: none); status 499: the client went away.",
    ["route", "status", "priority_class"],
)
STREAMS = Gauge("penstock_http_streams_in_flight", "Server-sent event streams that are open.")
AUTH_FAILURES = Counter("penstock_http_auth_failures_total", "Requests with a missing or unknown API key.")

CLIENT_CLOSED = 499
"""nginx' status for a request whose client did not wait for the answer."""
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_log = get_logger()


class Access:
    """Begins and ends the :class:`Exchange`. The request id is the client's ``X-Request-Id`` if it is a
    sane one.
    """

    def __init__(self, app: App, lifespan: App) -> None:
        self._app = app
        self._lifespan = lifespan

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "no WebSocket routes are offered"})
        else:
            await self._observe(dict(scope), receive, send)

    async def _observe(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        exchange = _begin(scope)
        done = False

        async def watched_receive() -> Message:
            message = await receive()
            exchange.disconnected |= message["type"] == "http.disconnect" and not done
            return message

        async def watched_send(message: Message) -> None:
            nonlocal done
            if message["type"] == "http.response.start":
                _started(exchange, message)
            done = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, watched_receive, watched_send)
        finally:
            _finished(exchange, scope, time.monotonic() - started)


def _begin(scope: Scope) -> Exchange:
    given = header(scope, b"x-request-id")
    request_id = given if given and _SANE_ID.fullmatch(given) else new_request_id()
    scope["headers"] = with_headers(list(scope["headers"]), [(b"x-request-id", request_id.encode())])
    bind_contextvars(request_id=request_id)  # on whatever is logged for this request, also by vLLM
    exchange = Exchange(request_id, route_of(scope["path"]))
    attach(scope, exchange)
    return exchange


def _started(exchange: Exchange, start: Message) -> None:
    exchange.status = start["status"]
    if is_event_stream(start):
        exchange.streaming = True
        STREAMS.inc()


def _finished(exchange: Exchange, scope: Scope, duration_s: float) -> None:
    if exchange.streaming:
        STREAMS.dec()
    if exchange.status == 401:
        AUTH_FAILURES.inc()
    status = CLIENT_CLOSED if exchange.disconnected else exchange.status or 500
    priority = exchange.priority_class or ""
    REQUESTS.labels(exchange.route.label, str(status), str(priority)).inc()
    if exchange.route.public:
        return  # probes and scrapes come every few seconds and would drown the log
    _log.info(
        "request",
        request_id=exchange.request_id,
        tenant=exchange.caller.tenant if exchange.caller else None,
        key_id=exchange.caller.id if exchange.caller else None,
        priority_class=priority or None,
        model=exchange.model,
        method=scope["method"],
        path=scope["path"],
        status=status,
        stream=exchange.streaming,
        error=exchange.outcome.error.code if exchange.outcome.error else None,
        duration_s=round(duration_s, 4),
    )
