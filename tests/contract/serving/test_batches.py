"""Batches over real HTTP and Redis, driven by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from penstock.queue.errors import NoCapacity
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.records import PriorityClass, new_request_id
from penstock.queue.redis_client import connect_async
from penstock.queue.settings import RedisSettings
from penstock.serving.batches.answers import Reply
from penstock.serving.batches.runner import LineRequest
from penstock.serving.files.catalog import new_file_id
from penstock.serving.files.orphans import MARKER
from penstock.serving.tenants import KeyStore
from tests.support.batch_server import (
    CHAT,
    BatchServer,
    Fleet,
    chat_reply,
    jsonl,
    line,
    new_server,
    rows,
    submit,
    until,
)
from tests.support.s3_server import S3Server
from tests.support.waiting import eventually_async

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]


@pytest.fixture
def server(redis_server: RedisServer, tmp_path: Path) -> BatchServer:
    return new_server(redis_server, tmp_path)


def ids(found: list[dict[str, Any]]) -> list[str]:
    return [row["custom_id"] for row in found]


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


BAD = [
    (b"", "empty_file", None),
    (b"\n", "invalid_json_line", 1),
    (b"junk", "invalid_json_line", 1),
    (bytes(range(256)) * 5, "invalid_json_line", 1),
    (jsonl([line("a")]) + b"\n" + jsonl([line("b")]), "invalid_json_line", 2),
    (jsonl([line("a")]).decode().encode("utf-16"), "invalid_json_line", 1),
    (jsonl([line("a"), line("b"), line("a")]), "duplicate_custom_id", 3),
    (jsonl([line("a"), line("b", body={"model": "other", "messages": []})]), "model_mismatch", 2),
    (jsonl([line("a", body={"model": "other", "messages": []})]), "model_not_found", 1),
    (jsonl([line("a"), line("b", url="/v1/completions")]), "url_mismatch", 2),
    (jsonl([line("a", url="/v1/completions")]), "url_mismatch", 1),
    (jsonl([line("a", method="GET")]), "invalid_method", 1),
    (jsonl([line("a"), {"custom_id": "b", "method": "POST", "url": CHAT}]), "missing_required_parameter", 2),
    (jsonl([line("a", body={"messages": []})]), "missing_required_parameter", 1),
    (jsonl([line("")]), "missing_required_parameter", 1),
    (jsonl([line("a") | {"custom_id": 7}]), "invalid_type", 1),
    (jsonl([line("a", body={"model": "m", "stream": True})]), "invalid_request", 1),
    (jsonl([line("a"), line("b", body={"model": "m", "temperature": float("nan")})]), "invalid_json_line", 2),
    (jsonl([line("a")]) + b"[" * 100_000 + b"]" * 100_000 + b"\n", "invalid_json_line", 2),
    (
        jsonl([line("a", body={"model": "m", "x": 1})]).replace(b"1", b"[" * 100_000 + b"]" * 100_000),
        "invalid_json_line",
        1,
    ),
    (jsonl([line("a"), line("b", "x" * 20_000_000)]), "line_too_long", 2),
    (b"[1, 2]\n", "invalid_json_line", 1),
    (jsonl([line(f"c{i}") for i in range(31)]), "too_many_tasks", None),
]


@pytest.mark.parametrize(("content", "code", "number"), BAD, ids=[f"{code}-{i}" for i, (_, code, _) in enumerate(BAD)])
async def test_bad_input(
    redis_server: RedisServer, tmp_path: Path, content: bytes, code: str, number: int | None
) -> None:
    server = new_server(redis_server, tmp_path, batches={"max_lines": 30})
    async with server.serving() as api:
        batch = await submit(api, content)
        batch = await until(api, batch.id, "failed")
        good = await submit(
            api, jsonl([line("fine")]).replace(b"\n", b"\r\n")
        )  # also: nobody is down, and CRLF is fine
        await until(api, good.id, "completed")
    assert batch.errors is not None
    assert batch.errors.data is not None
    first = batch.errors.data[0]
    assert (first.code, first.line) == (code, number)
    assert first.message
    assert batch.failed_at is not None
    assert (batch.output_file_id, batch.error_file_id, batch.in_progress_at) == (None, None, None)


async def test_every_problem_has_its_line(server: BatchServer) -> None:
    lines = [line(f"c{i}") for i in range(500)]
    for i in range(0, 500, 7):
        lines[i] = line("same")
    content = jsonl(lines).replace(b'"c1"', b"oops")
    async with server.serving() as api:
        batch = await until(api, (await submit(api, content)).id, "failed")
    assert batch.errors is not None
    assert [(each.code, each.line) for each in batch.errors.data or []] == [
        ("invalid_json_line", 2),
        *(("duplicate_custom_id", i + 1) for i in range(7, 500, 7)),
    ]


async def test_a_file_of_nothing_but_errors_is_given_up_early(server: BatchServer) -> None:
    async with server.serving() as api:
        batch = await until(api, (await submit(api, b"\n" * 50_000_000)).id, "failed")
    assert batch.errors is not None
    codes = Counter(each.code for each in batch.errors.data or [])
    assert codes == {"too_many_tasks": 1, "invalid_json_line": 100}


CREATE = {"endpoint": CHAT, "completion_window": "24h"}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "59m"}, "completion_window"),
        ({"completion_window": "8d"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"metadata": {f"k{i}": "v" for i in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata[...]"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, "output_expires_after.seconds"),
        ({"output_expires_after": {"anchor": "ended_at", "seconds": 3600}}, "output_expires_after.anchor"),
        ({"input_file_id": 7}, "input_file_id"),
    ],
)
async def test_what_is_asked_wrongly(server: BatchServer, changes: dict[str, Any], param: str) -> None:
    async with server.serving() as api:
        uploaded = await api.files.create(file=("a", jsonl([line("a")])), purpose="batch")
        asked: dict[str, Any] = {"input_file_id": uploaded.id} | CREATE | changes
        with pytest.raises(openai.BadRequestError) as refused:
            await api.batches.create(**asked)
        assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")
        assert [batch.id async for batch in await api.batches.list()] == []


async def test_an_input_that_is_none(server: BatchServer) -> None:
    async with server.serving() as api:
        asked: dict[str, Any] = dict(CREATE)
        with pytest.raises(openai.NotFoundError, match="No such File object"):
            await api.batches.create(input_file_id="file-nobody", **asked)
        batch = await until(api, (await submit(api, jsonl([line("a")]))).id, "completed")
        with pytest.raises(openai.BadRequestError, match="purpose must be 'batch'"):
            await api.batches.create(input_file_id=batch.output_file_id or "", **asked)
        with pytest.raises(openai.NotFoundError, match="No batch found"):
            await api.batches.retrieve("batch_nobody")
        with pytest.raises(openai.NotFoundError, match="No batch found"):
            await api.batches.cancel("batch_nobody")


async def test_an_input_file_id_leads_to_nothing_else(server: BatchServer, tmp_path: Path) -> None:
    server.batches = {"coordinate": False}
    kept = [tmp_path / "outside", Path(server.root, "segments", "b", "1")]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    async with server.serving() as api, connect_async(server.redis) as client:
        batch = await submit(api, jsonl([line("a")]))
        kept.append(Path(server.root, batch.input_file_id))
        short, long = batch.input_file_id[:-1], f"{batch.input_file_id}\n"
        elsewhere = ("", ".", "..", "/", "../outside", str(kept[0]), "segments", "segments/b/1", "*", "file-*")
        for name in (*elsewhere, short, long):
            with pytest.raises(openai.NotFoundError, match="No such File object"):
                await api.batches.create(input_file_id=name, endpoint=CHAT, completion_window="24h")
        pins = await client.keys(f"{server.redis.namespace}file-pins:*")
    assert [path for path in kept if not path.exists()] == []
    assert pins == [f"{server.redis.namespace}file-pins:{batch.input_file_id}".encode()]


async def test_what_others_have_stored_is_not_removed(server: BatchServer) -> None:
    """Also between the moment an object is there and the one in which its description is."""
    server.batches = {"coordinate": False}
    async with connect_async(server.redis) as client:
        keys = [(await KeyStore(client, server.redis).create(tenant))[0] for tenant in ("one", "two")]
    async with server.serving() as api:
        one, two = (api.with_options(api_key=key) for key in keys)
        known = (await one.files.create(file=("a", jsonl([line("a")])), purpose="batch")).id
        arriving = new_file_id()
        await asyncio.to_thread(Path(server.root, arriving).write_bytes, b"x")
        for name in (known, arriving):
            with pytest.raises(openai.NotFoundError, match="No such File object"):
                await two.batches.create(input_file_id=name, endpoint=CHAT, completion_window="24h")
        assert set(await asyncio.to_thread(os.listdir, server.root)) >= {known, arriving}


async def test_a_batch_id_leads_to_no_other_key(server: BatchServer) -> None:
    server.batches = {"coordinate": False}
    async with server.serving() as api, connect_async(server.redis) as client:
        batch = await submit(api, jsonl([line("a")]))
        await client.set(f"{server.redis.namespace}batch:{batch.id}:lease", "somebody")
        for call in (api.batches.retrieve, api.batches.cancel):
            with pytest.raises(openai.NotFoundError, match="No batch found"):
                await call(f"{batch.id}:lease")


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


async def test_tenants_share_an_ingress(server: BatchServer) -> None:
    """A tenant with much work does not keep another from its share."""
    order: list[str] = []

    async def answer(request: LineRequest) -> Reply:
        order.append(request.tenant)
        await asyncio.sleep(0.002)
        return chat_reply()

    server.fleet.answer = answer
    server.batches = {"in_flight": 8}
    async with connect_async(server.redis) as client:
        keys = [(await KeyStore(client, server.redis).create(tenant))[0] for tenant in ("big", "small")]
    async with server.serving() as api:
        big, small = (api.with_options(api_key=key) for key in keys)
        await asyncio.gather(*(submit(big, jsonl([line(f"{i}") for i in range(3000)])) for _ in range(3)))
        await eventually_async(_is(lambda: len(order) > 100), 20, "the big tenant is at work")
        begun = len(order)
        batch = await submit(small, jsonl([line(f"{i}") for i in range(200)]))
        await until(small, batch.id, "completed")
        during = order[order.index("small") :]
        last = len(during) - during[::-1].index("small")
    assert begun > 100
    assert during[:last].count("big") <= 2 * 200  # it has three batches, and still about half


async def test_a_closing_window_makes_it_urgent(server: BatchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.serving.batches.routes.window_s", lambda text: 600)
    server.batches = {"urgent_share": 1.0}
    async with server.serving() as api:
        await until(api, (await submit(api, jsonl([line("a")]))).id, "completed")
    assert [asked.priority_class for asked in server.fleet.asked] == [PriorityClass.STANDARD]


async def test_what_waits_in_the_batch_class_moves_up(server: BatchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others fill the engines: what was sent in the batch class is not begun before it is urged."""

    async def answer(request: LineRequest) -> Reply:
        if request.priority_class is PriorityClass.BATCH:
            await eventually_async(_is(lambda: request.stream_id in server.fleet.urged), 60, "it is urged")
        return chat_reply()

    monkeypatch.setattr("penstock.serving.batches.routes.window_s", lambda text: 12)
    monkeypatch.setattr("penstock.serving.batches.runner.URGE_S", 0.05)
    server.fleet.answer = answer
    server.batches = {"urgent_share": 0.5, "in_flight": 4}
    async with server.serving() as api:
        batch = await submit(api, jsonl([line(f"c{i}") for i in range(20)]))
        batch = await until(api, batch.id, "completed", "expired")
    assert batch.status == "completed"
    sent = {asked.stream_id: asked.priority_class for asked in server.fleet.asked}
    assert server.fleet.urged == {name for name, sent_as in sent.items() if sent_as is PriorityClass.BATCH}
    assert len(server.fleet.urged) == 4


async def test_shared_prompts_run_side_by_side(server: BatchServer) -> None:
    systems = [f"You are expert number {i}." for i in range(20)]
    lines = []
    for i in range(400):
        told = [{"role": "system", "content": systems[i * 7919 % 20]}, {"role": "user", "content": f"{i}"}]
        lines.append(line(f"c{i}", body={"model": "m", "messages": told}))
    async with server.serving() as api:
        batch = await until(api, (await submit(api, jsonl(lines))).id, "completed")
    assert batch.request_counts is not None
    assert batch.request_counts.completed == 400
    seen = [json.loads(asked.body)["messages"][0]["content"] for asked in server.fleet.asked]
    assert sum(a != b for a, b in pairwise(seen)) == 19


async def test_on_s3(redis_server: RedisServer, s3_server: S3Server) -> None:
    bucket = s3_server.make_bucket(f"b{new_request_id()}")
    server = BatchServer(RedisSettings(url=redis_server.url, namespace=f"{bucket}:"), bucket)
    server.files = {"storage_options": s3_server.storage_options}
    async with server.serving() as api:
        batch = await submit(api, jsonl([line(f"c{i}") for i in range(1300)]), metadata={"ordered": "true"})
        batch = await until(api, batch.id, "completed")
        assert ids(await rows(api, batch.output_file_id)) == [f"c{i}" for i in range(1300)]
        for file_id in (batch.input_file_id, batch.output_file_id or ""):
            await api.files.delete(file_id)
        await eventually_async(_is(lambda: s3_server.objects(bucket) == [MARKER]), 20, "only its name is left")


async def test_it_waits_for_redis(redis_server: RedisServer, tmp_path: Path) -> None:
    own = RedisServer(tmp_path / "redis")
    own.start()
    try:
        server = new_server(own, tmp_path)
        waiting = asyncio.Event()

        async def answer(request: LineRequest) -> Reply:
            await waiting.wait()
            return chat_reply()

        server.fleet.answer = answer
        async with server.serving() as api:
            batch = await submit(api, jsonl([line(f"c{i}") for i in range(600)]))
            await eventually_async(_is(lambda: len(server.fleet.asked) > 200), 20, "lines are under way")
            await asyncio.to_thread(own.kill)
            waiting.set()
            await eventually_async(_is(lambda: not _open_runs(server.fleet)), 20, "all under way are answered")
            await asyncio.to_thread(own.start)
            patient = api.with_options(max_retries=10)
            batch = await until(patient, batch.id, "completed")
            assert sorted(ids(await rows(api, batch.output_file_id))) == sorted(f"c{i}" for i in range(600))
    finally:
        own.stop()
    assert set(server.fleet.runs.values()) == {1}


def _open_runs(fleet: Fleet) -> bool:
    return any(not task.done() for task in fleet.log.values())


def _is(condition: Any) -> Any:
    async def holds() -> bool:
        return bool(condition())

    return holds


async def _has_finished(api: openai.AsyncOpenAI, batch_id: str, lines: int) -> bool:
    counts = (await api.batches.retrieve(batch_id)).request_counts
    return counts is not None and counts.completed >= lines
