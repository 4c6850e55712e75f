"""Batches over real HTTP and Redis, driven by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from penstock.queue.errors import NoCapacity
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.records import PriorityClass
from penstock.queue.redis_client import connect_async
from penstock.serving.batches.answers import Reply
from penstock.serving.batches.runner import LineRequest
from penstock.serving.tenants import KeyStore
from tests.support.batch_server import (
    CHAT,
    BatchServer,
    chat_reply,
    ids,
    jsonl,
    line,
    new_server,
    rows,
    submit,
    until,
)
from tests.support.waiting import eventually_async

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]


async def test_every_line_is_answered(server: BatchServer) -> None:
    async with server.serving() as api:
        batch = await submit(api, jsonl([line(f"c{i}") for i in range(1200)]), metadata={"job": "night"})
        assert (batch.status, batch.metadata, batch.object) == ("validating", {"job": "night"}, "batch")
        batch = await until(api, batch.id, "completed")
        found = await rows(api, batch.output_file_id)
        output = await api.files.retrieve(batch.output_file_id or "")
    assert sorted(ids(found)) == sorted(f"c{i}" for i in range(1200))
    assert all(row["response"]["status_code"] == 200 and row["error"] is None for row in found)
    assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 1200, "completed": 1200, "failed": 0}
    assert batch.usage is not None
    assert batch.usage.model_dump() == {
        "input_tokens": 8400,
        "input_tokens_details": {"cached_tokens": 4800},
        "output_tokens": 3600,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 12000,
    }
    assert (batch.error_file_id, batch.errors, batch.model) == (None, None, "m")
    assert None not in (batch.in_progress_at, batch.finalizing_at, batch.completed_at, batch.expires_at)
    assert (batch.failed_at, batch.expired_at, batch.cancelling_at, batch.cancelled_at) == (None, None, None, None)
    assert set(server.fleet.runs.values()) == {1}


async def test_a_request_reaches_the_fleet_as_it_was_written(server: BatchServer) -> None:
    async with server.serving() as api:
        batch = await submit(api, jsonl([line("one", "hello")]), completion_window="2h")
        await until(api, batch.id, "completed")
    (asked,) = server.fleet.asked
    assert json.loads(asked.body) == line("one", "hello")["body"]
    assert (asked.path, asked.tenant, asked.priority_class) == (CHAT, "default", PriorityClass.BATCH)
    assert (asked.stream_id, asked.tags) == (f"{batch.id}-0", {"batch_id": batch.id})
    assert asked.deadline_ms // 1000 == batch.expires_at == batch.created_at + 7200


async def test_errors_go_to_the_error_file(server: BatchServer) -> None:
    async def answer(request: LineRequest) -> Reply:
        if b"bad" in request.body:
            return Reply(400, {"x-request-id": "r1"}, b'{"error": {"message": "too long", "code": "invalid_request"}}')
        return chat_reply()

    server.fleet.answer = answer
    async with server.serving() as api:
        batch = await submit(api, jsonl([line("good"), line("wrong", "bad")]))
        batch = await until(api, batch.id, "completed")
        assert ids(await rows(api, batch.output_file_id)) == ["good"]
        (error,) = await rows(api, batch.error_file_id)
    assert (error["custom_id"], error["error"]) == ("wrong", None)
    assert error["response"] == {
        "status_code": 400,
        "request_id": "r1",
        "body": {"error": {"message": "too long", "code": "invalid_request"}},
    }
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 1)


async def test_what_passes_is_tried_again(server: BatchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.serving.batches.runner.FIRST_PAUSE_S", 0.01)
    tries: Counter[str] = Counter()

    async def answer(request: LineRequest) -> Reply:
        name = json.loads(request.body)["messages"][0]["content"]
        tries[name] += 1
        if name == "busy" and tries[name] <= 7:
            raise NoCapacity("no replica")
        if name == "flaky" and tries[name] <= 3:
            return Reply(502, {}, b"not even JSON")
        if name == "poison":
            return Reply(500, {"x-should-retry": "false"}, b"{}")
        return Reply(500, {}, b"{}") if name == "broken" else chat_reply()

    server.fleet.answer = answer
    async with server.serving() as api:
        batch = await submit(api, jsonl([line(name, name) for name in ("busy", "flaky", "broken", "poison")]))
        batch = await until(api, batch.id, "completed")
        assert sorted(ids(await rows(api, batch.output_file_id))) == ["busy", "flaky"]
        assert sorted(ids(await rows(api, batch.error_file_id))) == ["broken", "poison"]
    assert tries == {"busy": 8, "flaky": 4, "broken": 5, "poison": 1}


async def test_results_in_the_order_of_the_input(server: BatchServer) -> None:
    async def answer(request: LineRequest) -> Reply:
        number = int(json.loads(request.body)["messages"][0]["content"])
        await asyncio.sleep(0.001 * (number * 7919 % 50))
        return chat_reply() if number % 10 else Reply(400, {}, b"{}")

    server.fleet.answer = answer
    async with server.serving() as api:
        batch = await submit(api, jsonl([line(f"c{i}", str(i)) for i in range(1500)]), metadata={"ordered": "true"})
        batch = await until(api, batch.id, "completed")
        output, errors = await rows(api, batch.output_file_id), await rows(api, batch.error_file_id)
    assert ids(output) == [f"c{i}" for i in range(1500) if i % 10]
    assert ids(errors) == [f"c{i}" for i in range(1500) if i % 10 == 0]


async def test_a_cancelled_batch_delivers_what_finished(server: BatchServer) -> None:
    async def answer(request: LineRequest) -> Reply:
        if b"slow" in request.body:
            await asyncio.Event().wait()
        return chat_reply()

    server.fleet.answer = answer
    async with server.serving() as api:
        lines = [line(f"q{i}", "a quick one") for i in range(40)] + [line(f"s{i}", "slow") for i in range(300)]
        batch = await submit(api, jsonl(lines))
        await eventually_async(lambda: _has_finished(api, batch.id, 40), 20, "the quick ones are done")
        answers = await asyncio.gather(*(api.batches.cancel(batch.id) for _ in range(2)))
        assert {found.status for found in answers} <= {"cancelling", "cancelled"}
        batch = await until(api, batch.id, "cancelled")
        assert (await api.batches.cancel(batch.id)).status == "cancelled"
        output, errors = await rows(api, batch.output_file_id), await rows(api, batch.error_file_id)
    assert sorted(ids(output)) == sorted(f"q{i}" for i in range(40))
    assert sorted(ids(errors)) == sorted(f"s{i}" for i in range(300))
    assert all(row["response"] is None and row["error"]["code"] == "batch_cancelled" for row in errors)
    assert None not in (batch.cancelling_at, batch.cancelled_at)
    assert len(server.fleet.stopped) == 256  # as many as may be under way: the fleet is free again


async def test_cancelling_before_it_began(redis_server: RedisServer, tmp_path: Path) -> None:
    server = new_server(redis_server, tmp_path, batches={"coordinate": False})
    async with server.serving() as api:
        batch = await submit(api, jsonl([line("a")]))
        assert (await api.batches.cancel(batch.id)).status == "cancelling"
    server.batches = {}
    async with server.serving() as api:
        batch = await until(api, batch.id, "cancelled")
    assert (batch.output_file_id, batch.error_file_id, server.fleet.runs) == (None, None, {})


async def test_an_ended_batch_cannot_be_cancelled(server: BatchServer) -> None:
    async with server.serving() as api:
        batch = await submit(api, jsonl([line("a")]))
        await until(api, batch.id, "completed")
        with pytest.raises(openai.ConflictError, match="status 'completed'"):
            await api.batches.cancel(batch.id)


async def test_an_expired_batch_delivers_what_finished(server: BatchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(request: LineRequest) -> Reply:
        if b"slow" in request.body:
            await asyncio.Event().wait()
        return chat_reply()

    monkeypatch.setattr("penstock.serving.batches.routes.window_s", lambda text: 3)
    server.fleet.answer = answer
    async with server.serving() as api:
        lines = [line(f"q{i}") for i in range(30)] + [line(f"s{i}", "slow") for i in range(30)]
        batch = await submit(api, jsonl(lines))
        batch = await until(api, batch.id, "expired")
        output, errors = await rows(api, batch.output_file_id), await rows(api, batch.error_file_id)
    assert sorted(ids(output)) == sorted(f"q{i}" for i in range(30))
    assert sorted(ids(errors)) == sorted(f"s{i}" for i in range(30))
    assert {row["error"]["code"] for row in errors} == {"batch_expired"}
    assert batch.expired_at is not None
    assert (batch.completed_at, batch.cancelled_at) == (None, None)


async def test_a_sweep_that_fails_stops_no_batch(server: BatchServer) -> None:
    async with connect_async(server.redis) as client:
        await client.set(f"{server.redis.namespace}file:file-x", b"no description")
        await client.zadd(f"{server.redis.namespace}files-expiry", {"file-x": 1})
    async with server.serving() as api:
        await until(api, (await submit(api, jsonl([line("a")]))).id, "completed")


@pytest.mark.parametrize(("window", "seconds"), [("1h", 3600), ("36h", 129_600), ("7d", 604_800), ("168h", 604_800)])
async def test_windows(server: BatchServer, window: str, seconds: int) -> None:
    async with server.serving() as api:
        batch = await submit(api, jsonl([line("a")]), completion_window=window)
    assert batch.expires_at == batch.created_at + seconds
    assert batch.completion_window == window


async def test_output_expires_as_asked(server: BatchServer) -> None:
    async with server.serving() as api:
        policy = {"anchor": "created_at", "seconds": 7200}
        batch = await submit(api, jsonl([line("a")]), output_expires_after=policy)
        batch = await until(api, batch.id, "completed")
        output = await api.files.retrieve(batch.output_file_id or "")
    assert output.expires_at is not None
    assert output.expires_at - output.created_at == 7200


async def test_batches_page_by_page_and_by_tenant(server: BatchServer) -> None:
    async with connect_async(server.redis) as client:
        keys = [(await KeyStore(client, server.redis).create(tenant))[0] for tenant in ("one", "two")]
    async with server.serving() as api:
        one, two = (api.with_options(api_key=key) for key in keys)
        made = [(await submit(one, jsonl([line("a")]))).id for _ in range(5)]
        other = await submit(two, jsonl([line("a")]))
        assert sorted([batch.id async for batch in await one.batches.list(limit=2)]) == sorted(made)
        assert [batch.id async for batch in await two.batches.list()] == [other.id]
        with pytest.raises(openai.NotFoundError):
            await two.batches.retrieve(made[0])
        with pytest.raises(openai.NotFoundError):
            await two.batches.cancel(made[0])


async def test_a_list_of_batches(server: BatchServer) -> None:
    server.batches = {"coordinate": False}
    async with server.serving() as api:
        assert await _page(server) == {
            "object": "list",
            "data": [],
            "first_id": None,
            "last_id": None,
            "has_more": False,
        }
        made = [(await submit(api, jsonl([line("a")]))).id for _ in range(5)][::-1]
        pages = [
            await _page(server, limit=2),
            await _page(server, limit=2, after=made[1]),
            await _page(server, limit=5),
        ]
        for asked in ({"limit": 0}, {"limit": 101}, {"limit": "many"}, {"after": "batch_nobody"}):
            with pytest.raises(openai.BadRequestError) as refused:
                await api.batches.list(**asked)
            assert refused.value.param == next(iter(asked))
        assert len((await api.batches.list(limit=1)).data) == 1
        assert len((await api.batches.list(limit=100)).data) == 5
    assert [[batch["id"] for batch in page["data"]] for page in pages] == [made[:2], made[2:4], made]
    ends = [(page["first_id"], page["last_id"], page["has_more"]) for page in pages]
    assert ends == [(made[0], made[1], True), (made[2], made[3], True), (made[0], made[4], False)]


async def _page(server: BatchServer, **asked: str | int) -> Any:
    async with httpx.AsyncClient(trust_env=False) as http:
        return (await http.get(f"{server.url}/v1/batches", params=asked)).json()


async def test_metadata_at_its_longest(server: BatchServer) -> None:
    server.batches = {"coordinate": False}
    metadata = {f"{i:064}": "🌊" * 512 for i in range(16)}
    async with server.serving() as api:
        batch = await submit(api, jsonl([line("a")]), metadata=metadata)
        assert (await api.batches.retrieve(batch.id)).metadata == metadata


async def test_a_lost_input_ends_the_batch(server: BatchServer) -> None:
    held = asyncio.Event()

    async def answer(request: LineRequest) -> Reply:
        if request.stream_id.endswith("-0"):
            return chat_reply()
        await held.wait()
        return chat_reply()

    server.fleet.answer = answer
    server.batches = {"coordinate": False}
    async with server.serving() as api:
        batch = await submit(api, jsonl([line(f"c{i}") for i in range(5)]))
    await asyncio.to_thread(Path(server.root, batch.input_file_id).unlink)
    server.batches = {}
    async with server.serving() as api:
        batch = await until(api, batch.id, "failed")
    assert batch.errors is not None
    assert [each.code for each in batch.errors.data or []] == ["input_file_lost"]


async def _has_finished(api: openai.AsyncOpenAI, batch_id: str, lines: int) -> bool:
    counts = (await api.batches.retrieve(batch_id)).request_counts
    return counts is not None and counts.completed >= lines
