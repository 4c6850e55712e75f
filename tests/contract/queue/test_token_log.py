"""The token log's scripts against a real Redis: fencing, idempotence, ends, events, expiry."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
import redis
import redis.asyncio

from penstock.queue.errors import StoreUnavailable
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.messages import (
    TERMINAL,
    Event,
    EventKind,
    Finish,
    Frame,
    Logprobs,
    Run,
    Stage,
    Usage,
    decode_delivered,
    decode_events,
    encode,
    lua_string,
)
from penstock.queue.registry import Lease
from penstock.queue.settings import RedisSettings
from penstock.queue.token_log import (
    Append,
    AppendStatus,
    Dispatch,
    DispatchStatus,
    TokenWriter,
)
from tests.contract.queue.logs import ADOPTED, CANCELLED, OK, Store, Wire, entry, hand_over
from tests.contract.servers import start
from tests.support.earlier import Earlier

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]


async def test_appends_are_read_back_whole(store: Store) -> None:
    """Every field of a frame survives the scripts, bytes included."""
    await store.dispatch("r", "a")
    logprobs = Logprobs(2, bytes(range(256)), b"\xff\x00" * 8, b"\xdb\xc4")
    first = entry("r", 1, 0, [1, 2_000_000], usage=Usage(9, 4, 2), logprobs=logprobs, prompt_logprobs=logprobs)
    last = entry("r", 1, 2, [3], Finish.STOP, stop_reason="\n")
    assert store.writer.append([first, last]) == [AppendStatus.OK, AppendStatus.OK]
    assert await store.log.read("r") == [
        Frame(0, [1, 2_000_000], usage=Usage(9, 4, 2), logprobs=logprobs, prompt_logprobs=logprobs),
        Frame(2, [3], finish=Finish.STOP, stop_reason="\n"),
    ]
    assert await store.log.read("r", skip=1) == [Frame(2, [3], finish=Finish.STOP, stop_reason="\n")]


async def test_stale_attempt_is_refused(store: Store) -> None:
    await store.dispatch("r", "a")
    store.writer.append([entry("r", 1, 0, [1])])
    assert (await store.dispatch("r", "b", expect=1, force=True))[:2] == (OK, 2)
    assert store.writer.append([entry("r", 1, 1, [9])]) == [AppendStatus.STALE]
    assert store.writer.append([entry("r", 1, TERMINAL, [], Finish.ABORT)]) == [AppendStatus.STALE]
    assert store.writer.append([entry("r", 2, 1, [2])]) == [AppendStatus.OK]
    assert await store.tokens("r") == [1, 2]


async def test_gap_is_refused(store: Store) -> None:
    await store.dispatch("r", "a")
    assert store.writer.append([entry("r", 1, 1, [9]), entry("r", 1, 0, [1])]) == ["gap", "ok"]
    assert await store.tokens("r") == [1]


async def test_middle_of_an_unknown_request_is_refused(store: Store) -> None:
    assert store.writer.append([entry("nobody", 1, 5, [9])]) == [AppendStatus.GAP]
    assert not store.blocking.exists(store.key("tok:nobody"), store.key("req:nobody"))


async def test_gap_goes_back_to_the_dispatcher(store: Store, wire: Wire) -> None:
    """The log lost what nobody can append again: it has to be generated again."""
    await store.dispatch("r", "a")
    assert store.writer.append([entry("r", 1, 3, [9])]) == [AppendStatus.GAP]
    assert [decode_events(data) for channel, data in wire.read() if channel == "d1"] == [
        [Event("r", EventKind.LOST, 1)]
    ]
    assert (await store.dispatch("r", "b", attempt=1))[:3] == (OK, 2, 0)


async def test_request_given_back_is_dispatched_again(store: Store, wire: Wire) -> None:
    """A decode replica too gives back, under the attempt it was handed."""
    await store.dispatch("r", "a")
    store.writer.append([hand_over(entry("r", 1, 0, [5]), "b")])
    back = Append("r", 1, 1, 0, lua_string(b""), False, back="failed")
    assert store.writer.append([back, back]) == [AppendStatus.LOST] * 2
    events = [event for channel, data in wire.read() if channel == "d1" for event in decode_events(data)]
    assert [event.kind for event in events] == [EventKind.PREFILLED, EventKind.FAILED]
    assert (await store.dispatch("r", "b", expect=1, attempt=1))[5] == 1
    assert (await store.dispatch("r", "b", expect=1, attempt=2, deaths=1))[:2] == (OK, 3)


async def test_attempts_rise_over_a_loss(store: Store) -> None:
    """Redis forgot two attempts: the dispatcher did not, and no number comes twice."""
    await store.dispatch("r", "a")
    store.blocking.delete(store.key("req:r"))
    assert [state.kind for state in await store.log.states({"r": 3})] == [EventKind.GONE]
    assert (await store.dispatch("r", "b", attempt=3))[:2] == (OK, 4)


async def test_attempt_that_redis_forgot_takes_over(store: Store) -> None:
    """Its dispatch was in the lost second: newer than what is stored, so it is the valid one."""
    await store.dispatch("r", "b")
    writer = TokenWriter(store.blocking, store.settings, "a")
    assert writer.append([entry("r", 2, 1, [8])]) == [AppendStatus.GAP]
    assert writer.append([entry("r", 2, 0, [7])]) == [AppendStatus.OK]
    assert store.writer.append([entry("r", 1, 0, [9])]) == [AppendStatus.STALE]
    assert (await store.dispatch("r", "b", attempt=2))[:4] == (ADOPTED, 2, 1, "a")
    assert await store.tokens("r") == [7]
    writer.close()


async def test_attempt_given_twice_is_told_apart(store: Store) -> None:
    """Redis forgot a dispatch, and a dispatcher that never knew of it gave the same number again."""
    await store.dispatch("r", "a")
    (first,) = store.inbox("a")
    store.blocking.delete(store.key("req:r"), store.key("inbox:a"))
    while not (again := store.inbox("b")) or again[0].fence == first.fence:
        store.blocking.delete(store.key("req:r"), store.key("inbox:b"))
        await store.dispatch("r", "b")
    assert (first.attempt, again[0].attempt) == (1, 1)
    old, new = (msgspec.structs.replace(entry("r", 1, 0, [t]), fence=i.fence) for t, i in ((8, first), (9, again[0])))
    assert store.writer.append([old, new, old]) == [AppendStatus.STALE, AppendStatus.OK, AppendStatus.STALE]
    assert await store.tokens("r") == [9]


async def test_deaths_are_counted_until_it_gets_on(store: Store, wire: Wire) -> None:
    await store.dispatch("r", "a")
    store.bury("a")
    assert (await store.dispatch("r", "b", attempt=1))[0::5] == (DispatchStatus.EMITTED, 1)
    assert (await store.dispatch("r", "b", attempt=2, deaths=1, probation=2))[0::5] == (OK, 1)
    store.writer.append([entry("r", 3, 0, [5])])
    assert store.blocking.hget(store.key("req:r"), "deaths") == b"1"
    store.writer.append([entry("r", 3, 1, [6])])
    assert store.blocking.hget(store.key("req:r"), "deaths") is None
    assert [decode_events(data) for channel, data in wire.read() if channel == "d1"] == [
        [Event("r", EventKind.CLEARED, 3)]
    ]


async def test_a_replica_that_said_goodbye_did_not_die(store: Store) -> None:
    await store.dispatch("r", "a")
    Lease(store.blocking, store.settings, "a").end()
    assert (await store.dispatch("r", "b", attempt=1))[0::5] == (OK, 0)


async def test_a_redis_that_lost_its_last_second_is_filled_again(tmp_path: Path) -> None:
    """Killed, and back with the data of an earlier moment: the writer restores what was appended since."""
    server = RedisServer(tmp_path / "redis")
    start(server)
    store = Store(RedisSettings(url=server.url, namespace="x:"))
    store.lease("a", "b")
    await store.dispatch("r", "a")
    await store.dispatch("s", "a")
    store.writer.append([entry("r", 1, 0, [1])])
    moment = await asyncio.to_thread(Earlier, server)
    store.writer.append([entry("r", 1, 1, [2]), entry("s", 1, 0, [4, 5])])
    store.writer.append([entry("r", 1, 2, [3], Finish.STOP), hand_over(entry("s", 1, 2, [6]), "b")])
    await asyncio.to_thread(moment.restore)
    await store.client.connection_pool.disconnect()
    store.lease("a", "b")
    assert await store.tokens("r") == [1]
    assert store.writer.append([]) == []
    assert (await store.tokens("r"), await store.tokens("s")) == ([1, 2, 3], [4, 5, 6])
    assert [got.work.stage for got in store.inbox("b") if isinstance(got.work, Run)] == [Stage.DECODE]
    await store.close()
    server.stop()


async def test_step_sent_twice_is_stored_once(store: Store, wire: Wire) -> None:
    await store.dispatch("r", "a")
    steps = [entry("r", 1, 0, [1]), entry("r", 1, 1, [2, 3]), entry("r", 1, 3, [4], Finish.LENGTH)]
    store.writer.append(steps[:2])
    assert store.writer.append(steps) == [AppendStatus.OK] * 3
    assert store.writer.append(steps) == [AppendStatus.DONE] * 3
    assert await store.tokens("r") == [1, 2, 3, 4]
    assert [channel for channel, _ in wire.read()] == ["ingress", "ingress", "d1"]


@pytest.mark.parametrize("first_token", [[5], []], ids=["with its token", "without"])
async def test_hand_over_sent_twice_happens_once(store: Store, first_token: list[int]) -> None:
    await store.dispatch("r", "a")
    step = entry("r", 1, 0, first_token)
    if not first_token:
        step = Append("r", 1, 0, 0, lua_string(b""), False)
    step = hand_over(step, "b")
    assert store.writer.append([step]) == store.writer.append([step]) == [AppendStatus.OK]
    assert [(got.attempt, got.work.stage) for got in store.inbox("b") if isinstance(got.work, Run)] == [(1, "decode")]
    assert await store.tokens("r") == first_token
    assert store.writer.append([entry("r", 1, len(first_token), [6])]) == [AppendStatus.OK]


async def test_hand_over_tells_the_dispatcher_where_to(store: Store, wire: Wire) -> None:
    await store.dispatch("r", "a")
    store.writer.append([hand_over(entry("r", 1, 0, [5]), "b")])
    event = Event("r", EventKind.PREFILLED, 1, "b")
    assert [decode_events(data) for channel, data in wire.read() if channel == "d1"] == [[event]]
    assert await store.log.states({"r": 1}) == [event]


async def test_hand_over_to_the_dead_is_lost(store: Store, wire: Wire) -> None:
    """The token is kept, the dispatcher is told, and the next dispatch takes it from the living prefill replica."""
    await store.dispatch("r", "a")
    store.bury("b")
    step = hand_over(entry("r", 1, 0, [5]), "b")
    assert store.writer.append([step]) == [AppendStatus.LOST]
    assert store.writer.append([step]) == [AppendStatus.OK]
    event = Event("r", EventKind.LOST, 1)
    assert [decode_events(data) for channel, data in wire.read() if channel == "d1"] == [[event]]
    assert [(state.kind, state.attempt) for state in await store.log.states({"r": 1})] == [("lost", 1)]
    assert store.inbox("b") == []
    assert (await store.dispatch("r", "a", expect=1))[:3] == (OK, 2, 1)
    assert [state.kind for state in await store.log.states({"r": 1})] == [EventKind.PREFILLED]


async def test_final_hand_over_releases_the_cache(store: Store, wire: Wire) -> None:
    await store.dispatch("r", "a")
    step = hand_over(entry("r", 1, 0, [5], Finish.STOP), "b", Stage.RELEASE)
    assert store.writer.append([step]) == [AppendStatus.OK]
    assert [got.work.stage for got in store.inbox("b") if isinstance(got.work, Run)] == [Stage.RELEASE]
    assert [decode_events(data) for channel, data in wire.read() if channel == "d1"] == [
        [Event("r", EventKind.DONE, 1)]
    ]


async def test_final_hand_over_to_the_dead_still_ends(store: Store) -> None:
    await store.dispatch("r", "a")
    store.bury("b")
    step = hand_over(entry("r", 1, 0, [5], Finish.STOP), "b", Stage.RELEASE)
    assert store.writer.append([step]) == [AppendStatus.OK]
    assert (await store.dispatch("r", "a")).status == DispatchStatus.DONE


async def test_memory_is_bounded(store: Store) -> None:
    """Whatever is stored for a request carries an expiry from its first byte on."""
    lifetime, retention = store.settings.lifetime_s * 1000, store.settings.retention_s * 1000

    def expiry(name: str) -> int:
        return int(store.blocking.pttl(store.key(name)))

    await store.log.cancel(["early"])
    assert retention < expiry("req:early") <= lifetime
    await store.dispatch("r", "a")
    assert retention < expiry("req:r") <= lifetime
    store.writer.append([entry("r", 1, 0, [1])])
    assert retention < expiry("tok:r") <= lifetime
    store.writer.append([entry("r", 1, 1, [2], Finish.STOP)])
    await store.log.finish([("early", "ingress", CANCELLED)])
    for name in ("req:r", "tok:r", "req:early", "tok:early"):
        assert 0 < expiry(name) <= retention


async def test_one_message_per_reader_and_step(store: Store, wire: Wire) -> None:
    """A thousand streams of two ingresses and two dispatchers, in one call."""
    requests = [f"r{k}" for k in range(1000)]
    for number in (0, 1):
        work = lua_string(encode(Run("r", Stage.WHOLE, msgspec.Raw(encode({"v": 1})))))
        batch = [Dispatch(r, 0, f"ingress{number}", "a", work, "acme") for r in requests[number::2]]
        answers = await store.log.dispatch(f"d{number}", batch)
        assert {answer.status for answer in answers} == {OK}
    assert set(store.writer.append([entry(r, 1, 0, [1]) for r in requests])) == {AppendStatus.OK}
    assert set(store.writer.append([entry(r, 1, 1, [2], Finish.STOP) for r in requests])) == {AppendStatus.OK}
    read = wire.read()
    assert sorted(channel for channel, _ in read) == sorted(["ingress0", "ingress1"] * 2 + ["d0", "d1"])
    assert all(len(decode_events(data)) == 500 for channel, data in read if channel.startswith("d"))
    assert [item.id for item in decode_delivered(dict(read)["ingress1"])] == requests[1::2]


async def test_large_frames(store: Store) -> None:
    """Prompt log probabilities of a long prompt: megabytes in one frame."""
    await store.dispatch("r", "a")
    big = Logprobs(20, bytes(1_600_000), bytes(1_600_000), bytes(80_000))
    store.writer.append([entry("r", 1, 0, [1], prompt_logprobs=big)])
    frames = await store.log.read("r")
    assert frames[0].prompt_logprobs == big


async def test_refused_writes_are_an_outage(tmp_path: Path) -> None:
    """A Redis that is full or has lost its replicas takes the same step later, whole."""
    server = RedisServer(tmp_path, appendonly=False)
    start(server)
    store = Store(RedisSettings(url=server.url))
    store.lease("a")
    await store.dispatch("r", "a")
    for name, refusing, accepting in (("maxmemory", "1mb", "0"), ("min-replicas-to-write", "1", "0")):
        store.blocking.config_set(name, refusing)
        with pytest.raises(StoreUnavailable):
            store.writer.append([entry("r", 1, 0, [1])])
        with pytest.raises(StoreUnavailable):
            await store.log.cancel(["r"])
        store.blocking.config_set(name, accepting)
    assert store.writer.append([entry("r", 1, 0, [1])]) == [AppendStatus.OK]
    assert await store.tokens("r") == [1]
    await store.close()
    server.stop()


async def test_an_absent_redis_is_told() -> None:
    store = Store(RedisSettings(url="redis://127.0.0.1:9/0"))
    with pytest.raises(StoreUnavailable):
        await asyncio.to_thread(store.writer.append, [entry("r", 1, 0, [1])])
    with pytest.raises(StoreUnavailable):
        await store.log.read("r")
    await store.close()


async def test_a_programming_error_is_not_an_outage(redis_server: RedisServer, settings: RedisSettings) -> None:
    client = redis.Redis.from_url(redis_server.url)
    client.set(f"{settings.namespace}req:r", b"not a hash")
    writer = TokenWriter(client, settings)
    with pytest.raises(redis.ResponseError):
        writer.append([entry("r", 1, 0, [1])])
    writer.close()
    client.close()
