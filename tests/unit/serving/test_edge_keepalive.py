"""Keep-alives: one comment line, between whole events, only in silence, and never after the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from penstock.serving.edge.asgi import App, Message
from penstock.serving.edge.keepalive import COMMENT
from tests.unit.serving.apps import EVENT_STREAM, Recorder, Streaming
from tests.unit.serving.asgi_client import Client

pytestmark = [pytest.mark.unit, pytest.mark.asyncio]
AUTH = {"authorization": "Bearer sk-a"}
CHAT = "/v1/chat/completions"
Edge = Callable[..., App]
EVENT = b'data: {"n": 1}\n\n'


class Paused:
    """A stream that sends each part and waits to be let on."""

    def __init__(self, *parts: bytes) -> None:
        self._parts = parts
        self.go_on = asyncio.Event()

    async def chunks(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            if part:
                yield part
            await self.go_on.wait()


async def test_silent_stream_gets_comment_lines_without_a_blank_line(edge: Edge) -> None:
    source = Paused(EVENT)
    client = Client(edge(Streaming(source.chunks), keepalive_s=0.01))
    request = asyncio.create_task(client.request("POST", CHAT, b"{}", AUTH))
    await client.reply.until_body_has(EVENT + COMMENT * 2)
    source.go_on.set()
    reply = await request
    assert reply.body.replace(COMMENT, b"") == EVENT
    assert reply.ended


async def test_keep_alives_start_before_the_first_event_and_release_the_headers(edge: Edge) -> None:
    source = Paused(b"", EVENT)
    client = Client(edge(Streaming(source.chunks), keepalive_s=0.01))
    request = asyncio.create_task(client.request("POST", CHAT, b"{}", AUTH))
    await client.reply.until_body_has(COMMENT)
    assert client.reply.status == 200
    source.go_on.set()
    assert (await request).body.endswith(COMMENT + EVENT)


async def test_nothing_is_put_inside_an_event(edge: Edge) -> None:
    half, rest = EVENT[:9], EVENT[9:]
    beats = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal beats
        yield half
        for beats in range(5):  # noqa: B007 - five intervals pass within the event
            await asyncio.sleep(0.02)
        yield rest

    reply = await Client(edge(Streaming(chunks), keepalive_s=0.01)).request("POST", CHAT, b"{}", AUTH)
    assert beats == 4
    assert EVENT in reply.body


async def test_keep_alive_held_up_by_a_slow_client_does_not_split_an_event(edge: Edge) -> None:
    """The client stops reading while a keep-alive is on its way; half an event follows it."""
    sent: list[bytes] = []
    blocked, unblock = asyncio.Event(), asyncio.Event()

    async def slow_send(message: Message) -> None:
        body = message.get("body", b"")
        assert isinstance(body, bytes)
        if body == COMMENT and not blocked.is_set():
            blocked.set()
            await unblock.wait()
        sent.append(body)

    async def chunks() -> AsyncIterator[bytes]:
        await blocked.wait()
        asyncio.get_running_loop().call_soon(unblock.set)
        yield EVENT[:5]
        yield EVENT[5:]

    app = edge(Streaming(chunks), keepalive_s=0.01)
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [(b"authorization", b"Bearer sk-a")]}

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    await app(scope, receive, slow_send)
    assert EVENT in b"".join(sent)


async def test_no_keep_alives_in_other_responses_and_none_after_the_end(edge: Edge) -> None:
    reply = await Client(edge(Recorder(), keepalive_s=0.001)).request("POST", CHAT, b"{}", AUTH)
    assert reply.body == b"{}"

    async def chunks() -> AsyncIterator[bytes]:
        yield EVENT

    reply = await Client(edge(Streaming(chunks), keepalive_s=0.001)).request("POST", CHAT, b"{}", AUTH)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not others
    assert reply.messages[-1]["more_body"] is False


async def test_cancelled_request_leaves_no_task_behind(edge: Edge) -> None:
    source = Paused(EVENT)
    client = Client(edge(Streaming(source.chunks), keepalive_s=0.01))
    request = asyncio.create_task(client.request("POST", CHAT, b"{}", AUTH))
    await client.reply.until_body_has(EVENT)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_client_that_is_gone_ends_the_beat(edge: Edge) -> None:
    broken = asyncio.Event()

    async def send(message: Message) -> None:
        if message.get("body") == COMMENT:
            broken.set()
            raise OSError("broken pipe")

    async def app(scope: object, receive: object, send: Callable[..., object]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(EVENT_STREAM)})  # type: ignore[misc]
        await broken.wait()

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [(b"authorization", b"Bearer sk-a")]}
    await edge(app, keepalive_s=0.01)(scope, receive, send)
    assert asyncio.all_tasks() == {asyncio.current_task()}
