"""Stopping the runs of lines in a real Redis: all choices of each, and those that had ended are named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.queue.local.redis_server import RedisServer
from penstock.queue.readers import Readers
from penstock.queue.records import PriorityClass, new_request_id, now_ms
from penstock.queue.redis_client import connect_async
from penstock.queue.settings import RedisSettings
from penstock.serving.batches.backend import InnerBackend
from penstock.serving.batches.runner import LineRequest
from tests.support.batch_server import CHAT

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]


def asked(stream_id: str, n: Any) -> LineRequest:
    return LineRequest(
        stream_id=stream_id,
        external_id="x",
        tenant="t",
        key_id="k",
        path=CHAT,
        body=json.dumps({"model": "m", "messages": [], "n": n}).encode() if n else b"no JSON",
        priority_class=PriorityClass.BATCH,
        deadline_ms=now_ms() + 60_000,
        tags={},
    )


async def test_what_has_not_ended_is_stopped(redis_server: RedisServer) -> None:
    settings = RedisSettings(url=redis_server.url, namespace=f"stop-{new_request_id()}:")
    async with connect_async(settings) as client:
        for ended in ("one", "both:0", "both:1", "half:0"):
            await client.hset(f"{settings.namespace}req:{ended}", "done", 1)  # type: ignore[misc]
        nobody: Any = None
        backend = InnerBackend(nobody, nobody, Readers(client, settings, "ingress:test"), nobody)
        lines = [asked("one", 1), asked("both", 2), asked("half", 2), asked("unknown", 1), asked("bad", None)]
        found = await backend.stop(lines)
        cancelled = {
            name: await client.hexists(f"{settings.namespace}req:{name}", "cancelled")  # type: ignore[misc]
            for name in ("one", "both:0", "both:1", "half:0", "half:1", "unknown")
        }
    assert [each.stream_id for each in found if each.stream_id != "bad"] == ["one", "both"]
    assert {name for name, mark in cancelled.items() if mark} == {"half:1", "unknown"}
