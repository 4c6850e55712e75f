"""Cancelling responses, against a real Redis; what renders them is a small application that notes how it is asked."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio

from penstock.queue.local.redis_server import RedisServer
from penstock.queue.messages import TERMINAL, Finish, Frame
from penstock.queue.readers import Readers
from penstock.queue.records import PriorityClass
from penstock.queue.redis_client import connect_async
from penstock.queue.settings import RedisSettings
from penstock.queue.token_log import RequestLog
from penstock.serving.durable.inner import Inner
from penstock.serving.durable.responses import Responses
from penstock.serving.durable.store import RequestStore
from penstock.serving.edge.asgi import Receive, Scope, Send
from penstock.serving.request import RESPONSES, ClientRequest

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]

CREATED = {"type": "response.created", "response": {"status": "in_progress", "output": []}}
COMPLETED = {"type": "response.completed", "response": {"status": "completed", "output": ["all of it"]}}


class Scene:
    """``engine_asked`` counts the renderings that went beyond the first event, which attach to the request."""

    def __init__(self, settings: RedisSettings) -> None:
        self.client = connect_async(settings)
        self.log = RequestLog(self.client, settings)
        self.engine_asked = 0
        store, readers = RequestStore(self.client, settings), Readers(self.client, settings, "ingress:a")
        self.responses = Responses(Inner(self._render), store, readers)
        self.stored = ClientRequest(
            tenant="acme",
            key_id="k",
            path=RESPONSES,
            body=b"{}",
            external_id="x",
            priority_class=PriorityClass.STANDARD,
            deadline_ms=1,
        )

    async def _render(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send(event(CREATED))
        await self.log.read(self.stored.stream_id)  # whoever wants the first event only is gone by now
        self.engine_asked += 1
        await send(event(COMPLETED))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def ends(self, finish: Finish) -> None:
        await self.log.finish([(self.stored.stream_id, "ingress:a", Frame(TERMINAL, [], finish=finish))])


def event(document: object) -> dict[str, object]:
    body = b"data: " + msgspec.json.encode(document) + b"\n\n"
    return {"type": "http.response.body", "body": body, "more_body": True}


@pytest_asyncio.fixture
async def scene(redis_server: RedisServer) -> AsyncIterator[Scene]:
    opened = Scene(RedisSettings(url=redis_server.url, namespace=f"rc{uuid.uuid4().hex[:8]}:"))
    yield opened
    await opened.client.aclose()


async def test_one_that_nobody_read_is_cancelled_and_not_taken_up_again(scene: Scene) -> None:
    await scene.ends(Finish.ABORT)
    assert (await scene.responses.cancel(scene.stored))["status"] == "cancelled"
    assert scene.engine_asked == 0


async def test_a_complete_one_stays_complete(scene: Scene) -> None:
    await scene.ends(Finish.STOP)
    cancelled = await scene.responses.cancel(scene.stored)
    assert (cancelled["status"], cancelled["output"]) == ("completed", ["all of it"])


async def test_one_that_waits_is_cancelled(scene: Scene) -> None:
    assert (await scene.responses.cancel(scene.stored))["status"] == "cancelled"
    assert scene.engine_asked == 0
