"""The official SDKs, over real HTTP, against what the edge sends."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anthropic
import openai
import pytest
import uvicorn

from penstock.queue.errors import QueueUnavailable
from penstock.queue.messages import StreamError
from penstock.serving import context
from penstock.serving.edge.asgi import App, Receive, Scope, Send
from tests.unit.serving.apps import Recorder, Streaming

pytestmark = [pytest.mark.unit, pytest.mark.asyncio]
Edge = Callable[..., App]


@asynccontextmanager
async def serving(app: App) -> AsyncIterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listening:  # takes connections before the server is up
        running = asyncio.create_task(server.serve(sockets=[listening]))
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        await running


def _chunk(text: str) -> bytes:
    delta = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    event = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [delta]}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


async def _text(url: str, retries: int = 0) -> str:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="sk-a", max_retries=retries) as client:
        stream = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x"}], stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def test_keep_alives_are_invisible(edge: Edge) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for text in ("a", "b", "c"):
            await asyncio.sleep(0.03)  # several keep-alives long
            yield _chunk(text)
        yield b"data: [DONE]\n\n"

    async with serving(edge(Streaming(chunks), keepalive_s=0.005)) as url:
        assert await _text(url) == "abc"


async def test_stream_refused_before_its_first_event_is_retried_by_the_sdk(edge: Edge) -> None:
    attempts = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            context.current().outcome.fail(QueueUnavailable("no broker"))
            yield b'data: {"error": {"code": 503}}\n\n'
        yield _chunk("late")
        yield b"data: [DONE]\n\n"

    async with serving(edge(Streaming(chunks))) as url:
        assert await _text(url, retries=1) == "late"
    assert attempts == 2


async def test_failure_in_the_middle_raises_with_our_code(edge: Edge) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield _chunk("a")
        context.current().outcome.fail(StreamError("stream_interrupted", "engine died", 502))
        yield b'data: {"error": {"code": 500}}\n\n'

    async with serving(edge(Streaming(chunks))) as url:
        with pytest.raises(openai.APIError, match="engine died") as caught:
            await _text(url)
    assert caught.value.code == "stream_interrupted"


async def test_client_that_goes_away_cancels_the_application(edge: Edge) -> None:
    heard = asyncio.Event()

    async def listens(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": _chunk("a"), "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            continue
        heard.set()

    async with serving(edge(listens)) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="sk-a") as client:
        stream = await client.chat.completions.create(model="m", messages=[], stream=True)
        await anext(aiter(stream))
        await stream.close()
        await heard.wait()


async def test_strangers_raise_the_right_class_in_both_sdks(edge: Edge) -> None:
    async with serving(edge(Recorder())) as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="sk-z") as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                await client.models.list()
            assert caught.value.code == "invalid_api_key"
        async with anthropic.AsyncAnthropic(base_url=url, api_key="sk-z") as claude:
            with pytest.raises(anthropic.AuthenticationError, match="Incorrect API key"):
                await claude.messages.create(model="m", max_tokens=1, messages=[{"role": "user", "content": "x"}])
