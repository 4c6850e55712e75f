"""One request against an ASGI application, with every message in sight."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from penstock.serving.edge.asgi import App, Message


class Reply:
    """What the application sent so far; ``changed`` is set with every message."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.changed = asyncio.Condition()

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {key.decode(): value.decode() for key, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def ended(self) -> bool:
        return bool(self.messages) and self.messages[-1].get("more_body") is False

    def json(self) -> Any:
        return json.loads(self.body)

    async def until_body_has(self, expected: bytes) -> None:
        """Return once ``expected`` was sent."""
        async with self.changed:
            await self.changed.wait_for(lambda: expected in self.body)


class Client:
    """A connection: requests go in chunk by chunk, and it can go away."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._gone = asyncio.Event()
        self.reply = Reply()

    def go_away(self) -> None:
        self._gone.set()

    async def request(
        self,
        method: str,
        path: str,
        body: bytes | Sequence[bytes] = b"",
        headers: dict[str, str] | None = None,
        *,
        breaks_off: bool = False,
    ) -> Reply:
        """Send one request and return when the application is done; ``breaks_off`` before the last chunk."""
        chunks = [body] if isinstance(body, bytes) else list(body)
        if breaks_off:
            self.go_away()

        async def receive() -> Message:
            if chunks:
                chunk = chunks.pop(0)
                return {"type": "http.request", "body": chunk, "more_body": bool(chunks) or breaks_off}
            await self._gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            async with self.reply.changed:
                self.reply.messages.append(message)
                self.reply.changed.notify_all()

        raw = {"content-type": "application/json"} | (headers or {})
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(key.encode(), value.encode()) for key, value in raw.items()],
        }
        await self._app(scope, receive, send)
        return self.reply


async def post(app: App, path: str, body: Any, headers: dict[str, str] | None = None) -> Reply:
    """One POST; ``body`` is bytes, or becomes JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await Client(app).request("POST", path, data, headers)


async def get(app: App, path: str, headers: dict[str, str] | None = None) -> Reply:
    """One GET."""
    return await Client(app).request("GET", path, headers=headers)
