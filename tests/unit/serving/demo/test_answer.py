"""The demo's own client, against real HTTP."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from rich.console import Console

from penstock.serving.demo.answer import AnswerFailed, curl_line, python_snippet, stream_answer

pytestmark = [pytest.mark.unit, pytest.mark.asyncio]


def _delta(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 3}}\n\n'
DONE = b"data: [DONE]\n\n"


@asynccontextmanager
async def server(status: str, kind: str, body: list[bytes]) -> AsyncIterator[str]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        writer.write(f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n".encode())
        for part in body:
            writer.write(part)
            await writer.drain()
        writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


def _console() -> tuple[Console, Callable[[], str]]:
    out = io.StringIO()
    return Console(file=out), out.getvalue


async def test_tokens_are_printed_and_counted_whatever_the_chunks_and_comments() -> None:
    stream = b": keep-alive\n" + _delta("Hel") + _delta("lo") + b": keep-alive\n" + _delta("!") + USAGE + DONE
    console, printed = _console()
    async with server("200 OK", "text/event-stream", [stream[:20], stream[20:47], stream[47:]]) as url:
        answer = await stream_answer(url, "m", "p", console)
    assert printed() == "Hello!\n"
    assert answer.tokens == 3
    assert answer.ttft_s > 0


@pytest.mark.parametrize(
    ("status", "kind", "body", "reason"),
    [
        ("503 Service Unavailable", "application/json", b'{"error": {"message": "no engine"}}', "no engine"),
        (
            "200 OK",
            "text/event-stream",
            _delta("x") + b'data: {"error": {"message": "engine died"}}\n\n',
            "engine died",
        ),
        ("200 OK", "text/event-stream", _delta("x"), "DONE"),
    ],
)
async def test_failures_are_told(status: str, kind: str, body: bytes, reason: str) -> None:
    async with server(status, kind, [body]) as url:
        with pytest.raises(AnswerFailed, match=reason):
            await stream_answer(url, "m", "p", _console()[0])


async def test_snippets_survive_quotes_in_the_prompt() -> None:
    import shlex

    prompt = 'What\'s "it"?\n$HOME'
    words = shlex.split(curl_line("http://h:1", "m", prompt))
    assert json.loads(words[-1])["messages"][0]["content"] == prompt
    compile(python_snippet("http://h:1", "m", prompt), "snippet", "exec")
