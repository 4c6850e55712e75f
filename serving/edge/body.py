"""Reads the request's body, within limits, and hands it on as if it had not been read."""

from __future__ import annotations

import asyncio

from penstock.queue.errors import PayloadTooLarge
from penstock.serving.edge.asgi import Message, Receive, Scope, header
from penstock.serving.errors import BodyTimeout

BODY_TIMEOUT_S = 60.0
"""Time for the whole body: 16 MiB at 2.5 Mbit/s. Without it an idle client holds its buffer for ever."""


class DisconnectedError(Exception):
    """The client went away in the middle of its body."""


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        PayloadTooLarge: announced or counted, it is over ``max_bytes``.
        BodyTimeout: it did not arrive within :data:`BODY_TIMEOUT_S`.
        DisconnectedError: the client went away.
    """
    announced = header(scope, b"content-length") or ""
    if announced.isdigit() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await _collect(receive, max_bytes)
    except TimeoutError:
        raise BodyTimeout(f"the request body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None


async def _collect(receive: Receive, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise DisconnectedError
        chunk, more = message.get("body", b""), message.get("more_body", False)
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The request body is over the limit of {max_bytes} bytes.")


def replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that delivers ``body`` once and then what really comes: the news of a disconnect."""
    pending: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def receive_again() -> Message:
        nonlocal pending
        if pending is None:
            return await receive()
        message, pending = pending, None
        return message

    return receive_again
