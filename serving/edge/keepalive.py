"""Keeps silent streams open.

Balancers cut a stream on which nothing moves, some after 50 s; queueing and prefill can take longer. A
keep-alive is ONE comment line without a blank line after it: the official SDKs fail on an event that has no
data, and ``: ...`` followed by a blank line is one once an event carried an ``id:``. It goes between whole
events only.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from penstock.serving.edge.asgi import App, Message, Receive, Scope, Send, is_event_stream

COMMENT = b": keep-alive\n"
_EVENT_END = (b"\n\n", b"\r\n\r\n", COMMENT)


class KeepAlive:
    """Sends :data:`COMMENT` whenever an event stream was silent for ``interval_s``, from its start on."""

    def __init__(self, app: App, interval_s: float) -> None:
        self._app = app
        self._interval_s = interval_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = _Stream(send, self._interval_s)
        try:
            await self._app(scope, receive, stream.send)
        finally:
            await stream.stop()


class _Stream:
    def __init__(self, send: Send, interval_s: float) -> None:
        self._send = send
        self._interval_s = interval_s
        self._turn = asyncio.Lock()
        self._between_events = True
        self._sent_at = 0.0
        self._beat: asyncio.Task[None] | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._send(message)
            if is_event_stream(message):
                self._sent_at = asyncio.get_running_loop().time()
                self._beat = asyncio.create_task(self._beats())
            return
        if not message.get("more_body", False):
            await self.stop()
        async with self._turn:  # a keep-alive that waits for a slow client must not land inside an event
            await self._pass(message)

    async def stop(self) -> None:
        """No keep-alives any more. Idempotent."""
        if self._beat is not None:
            self._beat.cancel()
            await asyncio.wait([self._beat])

    async def _pass(self, message: Message) -> None:
        if body := message.get("body", b""):
            self._between_events = body.endswith(_EVENT_END)
        await self._send(message)
        self._sent_at = asyncio.get_running_loop().time()

    async def _beats(self) -> None:
        with suppress(OSError):  # the client is gone; the application is told by its own send
            await self._beat_on()

    async def _beat_on(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(max(self._sent_at + self._interval_s - clock(), 0.0))
            if clock() < self._sent_at + self._interval_s:
                continue
            async with self._turn:
                if self._between_events:
                    await self._pass({"type": "http.response.body", "body": COMMENT, "more_body": True})
                else:
                    self._sent_at = clock()
