"""Files and batches over real HTTP and a real Redis, in front of a stand-in for vLLM's handlers.

The stand-in answers like a fleet with a token log does: a stream id that was asked before gets the same answer without
another run, also when the one who asked first is gone.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import uvicorn

from penstock.queue.errors import PenstockError
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.records import new_request_id
from penstock.queue.redis_client import connect_async
from penstock.queue.settings import RedisSettings
from penstock.serving.batches.answers import Reply
from penstock.serving.batches.runner import LineRequest
from penstock.serving.batches.service import BatchService
from penstock.serving.batches.settings import BatchSettings
from penstock.serving.edge.asgi import App
from penstock.serving.edge.layers import wrap
from penstock.serving.files.settings import FilesSettings
from penstock.serving.settings import IngressSettings
from penstock.serving.tenants import KeyStore, open_authenticator
from tests.support.waiting import eventually_async
from tests.unit.serving.apps import Recorder

MODEL = "m"
CHAT = "/v1/chat/completions"


def line(custom_id: str, content: str = "hi", **changes: Any) -> dict[str, Any]:
    """One request of a batch; ``changes`` are made to the envelope."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body} | changes


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    """A file of these lines."""
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def chat_reply(text: str = "ok") -> Reply:
    """An answer as vLLM's handler gives it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    body = {"id": "chatcmpl-1", "object": "chat.completion", "model": MODEL, "choices": [choice], "usage": usage}
    return Reply(200, {"x-request-id": "r"}, json.dumps(body).encode())


@dataclass
class Fleet:
    """Runs requests. ``answer`` may wait and fail; what it raises is a refusal, which leaves nothing. ``runs`` counts
    how often each stream was begun, ``missed`` those that ran already and were not looked for.
    """

    answer: Callable[[LineRequest], Awaitable[Reply]] | None = None
    runs: Counter[str] = field(default_factory=Counter)
    log: dict[str, asyncio.Task[Reply]] = field(default_factory=dict)
    asked: list[LineRequest] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    urged: set[str] = field(default_factory=set)

    async def respond(self, request: LineRequest) -> Reply:
        """Attach to the run there is, or begin it."""
        self.asked.append(request)
        name = request.stream_id
        if name not in self.log:
            self.runs[name] += 1
            self.log[name] = asyncio.create_task(self._run(request))
        elif request.fresh:
            self.missed.append(name)
        reply = await asyncio.shield(self.log[name])
        return reply._replace(records=reply.records or (name,))

    async def urge(self, requests: Sequence[LineRequest]) -> None:
        """Note that these are wanted sooner."""
        self.urged.update(request.stream_id for request in requests)

    async def stop(self, requests: Sequence[LineRequest]) -> list[LineRequest]:
        """End these runs; those that are not known never run."""
        self.stopped += [request.stream_id for request in requests]
        runs = [(request, self.log.get(request.stream_id)) for request in requests]
        return [request for request, run in runs if run is not None and not run.cancel()]

    async def _run(self, request: LineRequest) -> Reply:
        try:
            return chat_reply() if self.answer is None else await self.answer(request)
        except PenstockError:
            del self.log[request.stream_id], self.runs[request.stream_id]
            raise


@dataclass
class BatchServer:
    """One ingress as far as files and batches go; several may share Redis, store and fleet."""

    redis: RedisSettings
    root: str
    fleet: Any = field(default_factory=Fleet)
    files: dict[str, Any] = field(default_factory=dict)
    batches: dict[str, Any] = field(default_factory=dict)
    url: str = ""
    model: str = MODEL

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[openai.AsyncOpenAI]:
        """The server is up and works on batches; gives OpenAI's own client."""
        files = FilesSettings.model_validate({"root": self.root} | self.files)
        async with connect_async(self.redis) as client:
            service = BatchService(client, self.redis, files, BatchSettings.model_validate(self.batches))
            authenticator = await open_authenticator(KeyStore(client, self.redis), "127.0.0.1")
            app = wrap(
                Recorder(),
                settings=IngressSettings(),
                authenticator=authenticator,
                missing=_nothing,
                beside=service.wrap,
            )
            working = asyncio.create_task(service.run(self.fleet, self.model))
            async with _listening(app) as self.url:
                try:
                    async with openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0) as api:
                        yield api
                finally:
                    working.cancel()
                    await asyncio.wait([working])
                    if not working.cancelled():
                        working.result()


def new_server(redis_server: RedisServer, folder: Path, **settings: Any) -> BatchServer:
    """A server with a namespace and a store of its own."""
    redis = RedisSettings(url=redis_server.url, namespace=f"b-{new_request_id()}:")
    return BatchServer(redis, str(folder / "files"), **settings)


async def submit(api: openai.AsyncOpenAI, content: bytes, **options: Any) -> openai.types.Batch:
    """Upload and create."""
    uploaded = await api.files.create(file=("in.jsonl", content), purpose="batch")
    asked = {"endpoint": CHAT, "completion_window": "24h"} | options
    return await api.batches.create(input_file_id=uploaded.id, **asked)


async def until(api: openai.AsyncOpenAI, batch_id: str, *statuses: str, within_s: float = 60) -> openai.types.Batch:
    """The batch, once it has one of these statuses."""

    async def arrived() -> bool:
        return (await api.batches.retrieve(batch_id)).status in statuses

    await eventually_async(arrived, within_s, f"{batch_id} is {' or '.join(statuses)}")
    return await api.batches.retrieve(batch_id)


async def rows(api: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of a result file."""
    if file_id is None:
        return []
    content = (await api.files.content(file_id)).content
    return [json.loads(row) for row in content.splitlines()]


def ids(found: list[dict[str, Any]]) -> list[str]:
    """Which lines these rows answer."""
    return [row["custom_id"] for row in found]


async def _nothing() -> dict[str, str]:
    return {}


@asynccontextmanager
async def _listening(app: App) -> AsyncIterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        running = asyncio.create_task(server.serve(sockets=[listening]))
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        await running
