"""Records that cannot run: kept with their reason, and long prompts beside the broker."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from penstock.queue.dead_letters import DeadLetter
from penstock.queue.errors import InvalidRecord, UnknownVersion
from penstock.queue.messages import Finish
from penstock.queue.payloads import GRACE_S
from penstock.queue.protocol import RequestQueue
from penstock.queue.records import encode_record
from penstock.queue.token_log import RequestLog
from tests.contract.queue.harness import NOTHING, PLENTY, Harness, ids, publish_all, pull_all

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]


async def test_dead_letters_keep_record_and_reason(harness: Harness) -> None:
    queue = harness.open()
    record = harness.record()
    await queue.publish(record)
    (delivery,) = await queue.pull(PLENTY)
    await queue.dead_letter(delivery, "the engine broke on it")
    (letter,) = await queue.dead_letters(10)
    assert letter.record() == record
    assert letter.reason == "the engine broke on it"
    assert letter.at_ms >= record.accepted_ms
    assert (await queue.depth()) == NOTHING


async def test_dead_letters_are_dropped_one_by_one(harness: Harness) -> None:
    """Out of order, from another process, and not twice."""
    queue, operator = harness.open(), harness.open()
    records = [harness.record() for _ in range(4)]
    await publish_all(queue, records)
    for delivery in await pull_all(queue, 4):
        await queue.dead_letter(delivery, "no")
    letters = {letter.record().id: letter.id for letter in await operator.dead_letters(10)}
    assert sorted(letters) == sorted(ids(records))
    gone = [letters[record.id] for record in records[1:3]]
    assert await operator.drop_dead_letters(gone) == 2
    assert await operator.drop_dead_letters([gone[0], "0-999999"]) == 0
    left = {letter.record().id for letter in await harness.open().dead_letters(10)}
    assert left == {records[0].id, records[3].id}
    assert len(await operator.dead_letters(1)) == 1
    await operator.drop_dead_letters(list(letters.values()))
    assert await queue.dead_letters(10) == []


async def test_an_unknown_version_is_dead_lettered(harness: Harness) -> None:
    queue = harness.open()
    good = harness.record()
    await queue.ping()
    await harness.publish_raw(encode_record(harness.record(v=99)))
    await queue.publish(good)
    assert ids(await pull_all(queue, 1)) == [good.id]
    (letter,) = await dead_letters(queue, 1)
    assert letter.reason.startswith("unknown_record_version")
    with pytest.raises(UnknownVersion):
        letter.record()


async def test_junk_is_dead_lettered(harness: Harness) -> None:
    queue = harness.open()
    junk = [b"\xff\x00 not msgpack", b"", msgspec.msgpack.encode({"v": 1, "id": 7})]
    await queue.ping()
    for data in junk:
        await harness.publish_raw(data)
    good = harness.record()
    await queue.publish(good)
    assert ids(await pull_all(queue, 1)) == [good.id]
    letters = await dead_letters(queue, len(junk))
    assert sorted(letter.data for letter in letters) == sorted(junk)
    for letter in letters:
        assert letter.reason.startswith("invalid_record")
        with pytest.raises(InvalidRecord):
            letter.record()


async def dead_letters(queue: RequestQueue, count: int) -> list[DeadLetter]:
    """Pull goes on while records are found unreadable, so they may arrive after the good ones."""
    pull = asyncio.create_task(queue.pull(PLENTY))
    letters: list[DeadLetter] = []
    while len(letters) < count:
        letters = await queue.dead_letters(count + 1)
    pull.cancel()
    await asyncio.gather(pull, return_exceptions=True)
    return letters


async def test_a_long_prompt_travels_on_the_broker(harness: Harness) -> None:
    queue = harness.open()
    record = harness.record(tokens=128 * 1024)
    await queue.publish(record)
    (delivery,) = await queue.pull(PLENTY)
    assert delivery.record == record
    assert await payloads(harness) == []


async def test_a_record_over_the_limit_is_stored_beside(harness: Harness) -> None:
    queue = harness.open(max_record_bytes=2000)
    record = harness.record(tokens=1000)
    await queue.publish(record)
    (delivery,) = await queue.pull(PLENTY)
    assert msgspec.structs.replace(delivery.record, payload_ref=None) == record
    (key,) = await payloads(harness)
    assert 0 < await harness.redis.ttl(key) <= harness.redis_settings.lifetime_s
    await queue.complete([delivery])
    assert 0 < await harness.redis.ttl(key) <= GRACE_S


async def test_a_dead_letter_keeps_its_payload(harness: Harness) -> None:
    queue = harness.open(max_record_bytes=2000)
    await queue.publish(harness.record(tokens=1000))
    (delivery,) = await queue.pull(PLENTY)
    await queue.dead_letter(delivery, "no")
    (letter,) = await queue.dead_letters(1)
    assert [letter.record().payload_ref] == await payloads(harness)


async def test_a_missing_payload_is_dead_lettered(harness: Harness) -> None:
    queue = harness.open(max_record_bytes=2000)
    lost, good = harness.record(tokens=1000), harness.record()
    await queue.publish(lost)
    await harness.redis.delete(*await payloads(harness))
    await queue.publish(good)
    assert ids(await pull_all(queue, 1)) == [good.id]
    (letter,) = await dead_letters(queue, 1)
    assert "payload" in letter.reason
    assert letter.record().id == lost.id


async def test_the_request_of_a_lost_payload_ends(harness: Harness) -> None:
    """[I5]"""
    queue = harness.open(max_record_bytes=2000)
    lost = harness.record(tokens=1000)
    await queue.publish(lost)
    await harness.redis.delete(*await payloads(harness))
    await dead_letters(queue, 1)
    assert await error_of(harness, lost.id) == ("invalid_record", True)


async def test_the_request_of_an_unknown_version_ends(harness: Harness) -> None:
    """[I5]"""
    queue, newer = harness.open(), harness.record()
    await queue.ping()
    unknown = {"v": 99, "id": newer.id, "reply_to": newer.reply_to, "prompt": {"of": "another kind"}}
    await harness.publish_raw(msgspec.msgpack.encode(unknown))
    await dead_letters(queue, 1)
    assert await error_of(harness, newer.id) == ("unknown_record_version", True)


async def test_a_payload_that_cannot_be_read_is_dead_lettered(harness: Harness) -> None:
    queue = harness.open(max_record_bytes=2000)
    await queue.publish(harness.record(tokens=1000))
    (key,) = await payloads(harness)
    await harness.redis.set(key, b"junk")
    (letter,) = await dead_letters(queue, 1)
    assert "payload" in letter.reason


async def error_of(harness: Harness, request_id: str) -> tuple[str, bool]:
    """Code of the error that is all the request's log holds, and whether to try again."""
    (frame,) = await RequestLog(harness.redis, harness.redis_settings).read(request_id)
    assert frame.finish is Finish.ERROR
    assert frame.error is not None
    return frame.error.code, frame.error.retryable


async def payloads(harness: Harness) -> list[str]:
    """Keys of stored payloads."""
    return [key.decode() for key in await harness.redis.keys(f"{harness.redis_settings.namespace}payload:*")]
