"""Stored requests and idempotency keys, in a real Redis."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from penstock.queue.local.redis_server import RedisServer
from penstock.queue.readers import Readers
from penstock.queue.records import PriorityClass, new_request_id
from penstock.queue.redis_client import connect_async
from penstock.queue.settings import RedisSettings
from penstock.serving.durable.store import RequestStore
from penstock.serving.errors import IdempotencyKeyReused, NotFound
from penstock.serving.request import ClientRequest

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]


def request(tenant: str = "acme", body: bytes = b"{}") -> ClientRequest:
    return ClientRequest(
        stream_id=new_request_id(),
        tenant=tenant,
        key_id="k",
        path="/v1/chat/completions",
        body=body,
        external_id=new_request_id(),
        priority_class=PriorityClass.STANDARD,
        accepted_ms=1,
        deadline_ms=2,
    )


@pytest.fixture
def settings(redis_server: RedisServer) -> RedisSettings:
    return RedisSettings(url=redis_server.url, namespace=f"st{uuid.uuid4().hex[:8]}:")


@pytest_asyncio.fixture
async def store(settings: RedisSettings) -> AsyncIterator[RequestStore]:
    async with connect_async(settings) as client:
        yield RequestStore(client, settings)


@pytest_asyncio.fixture
async def readers(settings: RedisSettings) -> AsyncIterator[Readers]:
    """Another ingress."""
    async with connect_async(settings) as client:
        yield Readers(client, settings, "ingress:b")


@pytest.mark.parametrize("size", [2, 100_000, 1_000_000])
async def test_what_was_saved_is_found_by_each_of_its_names(store: RequestStore, size: int) -> None:
    saved = request(body=b"x" * size)
    await store.save(saved)
    names = (saved.stream_id, f"resp_{saved.stream_id}", saved.external_id, f"chatcmpl-{saved.external_id}")
    for name in names:
        assert await store.find("acme", name) == saved


async def test_nobody_finds_what_is_anothers(store: RequestStore) -> None:
    saved = request()
    await store.save(saved)
    for name in (saved.stream_id, saved.external_id):
        with pytest.raises(NotFound):
            await store.find("blue", name)


async def test_a_key_is_claimed_once(store: RequestStore) -> None:
    requests = [request() for _ in range(20)]
    claims = await asyncio.gather(*(store.claim(each, "key", "digest") for each in requests))
    firsts = [each for each, earlier in zip(requests, claims, strict=True) if earlier is None]
    assert len(firsts) == 1
    assert all(earlier == firsts[0] for earlier in claims if earlier is not None)


async def test_a_key_is_for_one_request(store: RequestStore) -> None:
    await store.claim(request(), "key", "digest")
    with pytest.raises(IdempotencyKeyReused):
        await store.claim(request(), "key", "other")


async def test_each_tenant_has_its_own_keys(store: RequestStore) -> None:
    assert await store.claim(request(), "key", "digest") is None
    assert await store.claim(request("blue"), "key", "other") is None


async def test_a_released_key_is_free(store: RequestStore) -> None:
    refused = request()
    await store.claim(refused, "key", "digest")
    await store.release(refused, "key")
    assert await store.claim(request(), "key", "other") is None
    with pytest.raises(NotFound):
        await store.find("acme", refused.external_id)


async def test_a_key_stays_while_another_post_counts_on_it(store: RequestStore) -> None:
    first = request()
    await store.claim(first, "key", "digest")
    assert await store.claim(request(), "key", "digest") == first
    assert not await store.release(first, "key")
    assert await store.find("acme", first.stream_id) == first
    assert await store.release(first, "key"), "the other one was refused as well"
    assert await store.claim(request(), "key", "other") is None


@pytest.mark.parametrize("key", ["key", None])
async def test_what_others_read_is_not_released(store: RequestStore, readers: Readers, key: str | None) -> None:
    refused = request()
    await (store.save(refused) if key is None else store.claim(refused, key, "digest"))
    await readers.attach(refused.record_ids)
    assert not await store.release(refused, key)
    assert await store.find("acme", refused.external_id) == refused


async def test_an_error_for_all_frees_the_key(store: RequestStore, readers: Readers) -> None:
    failed = request()
    await store.claim(failed, "key", "digest")
    await store.claim(request(), "key", "digest")
    await readers.attach(failed.record_ids)
    assert await store.release(failed, "key", ended=True)
    assert await store.claim(request(), "key", "other") is None


async def test_a_late_release_leaves_the_keys_next_request(store: RequestStore) -> None:
    late, next_one = request(), request()
    await store.claim(late, "key", "digest")
    await store.release(late, "key")
    await store.claim(next_one, "key", "digest")
    assert not await store.release(late, "key", ended=True)
    assert await store.claim(request(), "key", "digest") == next_one


async def test_a_key_ends_with_its_request(store: RequestStore) -> None:
    first = request()
    await store.claim(first, "key", "digest")
    await store.delete(first)
    assert await store.claim(request(), "key", "other") is None
