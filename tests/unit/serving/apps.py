"""Small applications that behave as vLLM's handlers do, and keys that are kept in memory."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from penstock.queue.errors import StoreUnavailable
from penstock.queue.records import PriorityClass
from penstock.serving import context
from penstock.serving.edge.asgi import Message, Receive, Scope, Send, send_json
from penstock.serving.request import ClientRequest
from penstock.serving.tenants import KeyInfo, KeyStore, Lookup

EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


def client_request(**changes: Any) -> ClientRequest:
    """A request as the edge makes it, with these fields changed."""
    fields = {
        "tenant": "acme",
        "key_id": "k",
        "path": "/v1/chat/completions",
        "body": b"{}",
        "external_id": "x",
        "priority_class": PriorityClass.STANDARD,
        "deadline_ms": 0,
    }
    return ClientRequest(**fields | changes)  # type: ignore[arg-type]


class Recorder:
    """Answers 200 and keeps what reached it."""

    def __init__(self) -> None:
        self.requests: list[ClientRequest] = []
        self.bodies: list[bytes] = []
        self.scopes: list[Scope] = []
        self.after_body: list[Message] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        if scope["method"] == "POST":
            self.requests.append(context.current().request)
            self.bodies.append((await receive())["body"])
        await send_json(send, 200, b"{}")

    @property
    def seen(self) -> ClientRequest:
        return self.requests[-1]


class WaitForDisconnect:
    """Reads the body, then listens for the client going away, as a handler that generates does."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.heard = [(await receive())["type"], (await receive())["type"]]


class Streaming:
    """Opens an event stream and sends what ``chunks()`` yields, then the end."""

    def __init__(self, chunks: Callable[[], AsyncIterator[bytes]]) -> None:
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(EVENT_STREAM)})
        async for chunk in self._chunks():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Failing:
    """Raises."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise self._error


class AnswersError:
    """Notes the outcome and answers in its own words, as vLLM does with an exception of the engine client."""

    def __init__(self, error: Exception, status: int) -> None:
        self._error = error
        self._status = status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context.current().outcome.fail(self._error)  # type: ignore[arg-type]
        await send_json(send, self._status, json.dumps({"error": {"message": "vLLM's words"}}).encode())


KEYS = {"sk-a": KeyInfo("key-1", "acme"), "sk-b": KeyInfo("key-2", "blue")}


class MemoryKeys(KeyStore):
    """The store's one method an authenticator calls, and a switch to take Redis away."""

    def __init__(self, keys: dict[str, KeyInfo]) -> None:
        self.keys = keys
        self.away = False
        self.lookups = 0

    async def lookup(self, key: str) -> Lookup:
        if self.away:
            raise StoreUnavailable("Redis is unavailable")
        self.lookups += 1
        return Lookup(self.keys.get(key), bool(self.keys))

    async def has_keys(self) -> bool:
        return bool((await self.lookup("")).any_keys)
