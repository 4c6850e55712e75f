"""Whose lines run when: shares of tenants, urgency, neighbours with one prompt."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from itertools import pairwise

import pytest

from penstock.queue.records import PriorityClass
from penstock.queue.redis_client import connect_async
from penstock.serving.batches.answers import Reply
from penstock.serving.batches.runner import LineRequest
from penstock.serving.batches.shares import Shares
from penstock.serving.tenants import KeyStore
from tests.support.batch_server import (
    BatchServer,
    chat_reply,
    jsonl,
    line,
    submit,
    until,
)
from tests.support.waiting import until_true

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]


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
        await until_true(lambda: len(order) > 100, 20, "the big tenant is at work")
        begun = len(order)
        batch = await submit(small, jsonl([line(f"{i}") for i in range(200)]))
        await until(small, batch.id, "completed")
        during = order[order.index("small") :]
        last = len(during) - during[::-1].index("small")
    assert begun > 100
    assert during[:last].count("big") <= 2 * 200  # it has three batches, and still about half


async def test_tenants_share_all_ingresses(server: BatchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant with batches at two ingresses has no more than one whose only batch is at one of them."""
    order: list[str] = []

    async def answer(request: LineRequest) -> Reply:
        order.append(request.tenant)
        await asyncio.sleep(0.05)
        return chat_reply()

    monkeypatch.setattr("penstock.serving.batches.coordinators.LOOK_S", 0.1)
    server.fleet.answer = answer
    server.batches = {"in_flight": 8, "max_per_tenant": 2}
    other = replace(server)
    async with connect_async(server.redis) as client:
        keys = [(await KeyStore(client, server.redis).create(tenant))[0] for tenant in ("big", "small")]
    async with server.serving() as api, other.serving():
        big, small = (api.with_options(api_key=key) for key in keys)
        await asyncio.gather(*(submit(big, jsonl([line(f"{i}") for i in range(3000)])) for _ in range(4)))
        await until_true(lambda: len(order) > 100, 20, "the big tenant is at work")
        batch = await submit(small, jsonl([line(f"{i}") for i in range(400)]))
        await until(small, batch.id, "completed")
    during = order[order.index("small") :]
    last = len(during) - during[::-1].index("small")
    assert during[:last].count("big") <= 2 * 400  # three times as many if each ingress shared by itself


async def test_what_an_ingress_told_is_forgotten_with_it(server: BatchServer) -> None:
    async with connect_async(server.redis) as client:
        shares = Shares(client, server.redis)
        assert await shares.exchange("one", {"a": 3, "b": 1}) == {}
        assert await shares.exchange("two", {"a": 2}) == {"a": 3, "b": 1}
        assert await shares.exchange("three", {}) == {"a": 5, "b": 1}
        await client.delete(f"{server.redis.namespace}batch-slots:one")  # as it expires
        assert await shares.exchange("three", {}) == {"a": 2}
        assert await client.smembers(f"{server.redis.namespace}batch-slots") == {b"two", b"three"}


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
            await until_true(lambda: request.stream_id in server.fleet.urged, 60, "it is urged")
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
