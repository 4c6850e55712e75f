"""The ASGI types, and the two things every layer does with them: read a header and send a JSON answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


def header(scope: Scope, name: bytes) -> str | None:
    """The first header called ``name`` (lower case), or None."""
    for key, value in scope["headers"]:
        if key == name:
            return str(value, "latin-1").strip()
    return None


def is_json(scope: Scope) -> bool:
    """Whether the body says it is JSON. vLLM refuses other types in its own words."""
    return (header(scope, b"content-type") or "").lower().startswith("application/json")


def is_event_stream(start: Message) -> bool:
    """Whether a ``http.response.start`` opens a stream of server-sent events."""
    return any(
        key.lower() == b"content-type" and value.startswith(b"text/event-stream") for key, value in start["headers"]
    )


def with_headers(headers: Headers, extra: Headers) -> Headers:
    """``headers`` with those of ``extra`` set, replacing what has the same name."""
    names = {name for name, _ in extra}
    return [*(pair for pair in headers if pair[0].lower() not in names), *extra]


async def send_json(send: Send, status: int, body: bytes, headers: Headers | None = None) -> None:
    """Send a whole response."""
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": fixed + (headers or [])})
    await send({"type": "http.response.body", "body": body, "more_body": False})
