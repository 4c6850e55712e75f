"""A request that waits in one class of the queue is published again in a better one."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.queue.factory import open_queue
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.mailbox import Mailbox, TokenReader
from penstock.queue.protocol import Budget
from penstock.queue.readers import Readers
from penstock.queue.records import PriorityClass, new_request_id, now_ms
from penstock.queue.redis_client import connect_async
from penstock.queue.settings import ModelSettings, QueueSettings, RedisSettings
from penstock.queue.token_log import RequestLog
from penstock.serving.context import RequestContext
from penstock.serving.request import CHAT, ClientRequest
from tests.support.requests import make_record

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]
BATCH, STANDARD = PriorityClass.BATCH, PriorityClass.STANDARD


def stream(stream_id: str, accepted: bool) -> Any:
    from penstock.serving.engine_client import _Stream  # imports vLLM

    request = ClientRequest(
        tenant="t",
        key_id="k",
        path=CHAT,
        body=b"",
        external_id="x",
        priority_class=BATCH,
        deadline_ms=now_ms() + 60_000,
        stream_id=stream_id,
    )
    context = RequestContext(request)
    if accepted:
        context.outcome.accepted.set()
    return _Stream(make_record(id=stream_id, priority_class=BATCH), context, None)  # type: ignore[arg-type]


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports
async def test_it_is_published_again_once(redis_server: RedisServer) -> None:
    from penstock.serving.engine_client import QueueClient

    settings = RedisSettings(url=redis_server.url, namespace=f"u-{new_request_id()}:")
    async with connect_async(settings) as redis:
        queue = open_queue(QueueSettings(), settings, "p")
        readers = Readers(redis, settings, "ingress:test")
        reader = TokenReader(Mailbox(redis, settings, readers.channel), RequestLog(redis, settings), readers)
        client = QueueClient(queue, reader, readers, ModelSettings(path="none"))
        client._streams = {name: stream(name, name != "refused") for name in ("waiting", "another", "refused")}
        for _ in range(2):
            await client.urge({"waiting", "refused"}, STANDARD)
        pulled = await queue.pull(Budget(10, 1000))
        await queue.close()
    assert [(each.record.id, each.record.priority_class) for each in pulled] == [("waiting", STANDARD)]
