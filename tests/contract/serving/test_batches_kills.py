"""A coordinator that dies at any write: whoever takes over ends the batch with every line once.

A "kill" lets one write of the coordinator fail, just before or just after it took effect, and every later one as well:
a dead process writes nothing. Its lease is taken away as its running out would.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from penstock.queue.errors import QueueUnavailable
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.records import new_request_id, now_ms
from penstock.queue.redis_client import connect_async
from penstock.queue.settings import RedisSettings
from penstock.serving.batches.answers import Reply
from penstock.serving.batches.coordinator import Coordinator, StoreMissing
from penstock.serving.batches.model import Batch, BatchSpec, Status
from penstock.serving.batches.runner import LineRequest
from penstock.serving.batches.settings import BatchSettings
from penstock.serving.batches.store import KEPT_S, LeaseLost
from tests.contract.serving.bench import LINES, Bench, Killer
from tests.support.batch_server import chat_reply
from tests.support.waiting import eventually_async

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]


@pytest_asyncio.fixture
async def bench(redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr("penstock.serving.batches.results.SEGMENT_LINES", 25)
    monkeypatch.setattr("penstock.serving.batches.results.FLUSH_S", 0.01)
    monkeypatch.setattr("penstock.serving.batches.coordinator.DURABLE_S", 0.01)
    settings = RedisSettings(url=redis_server.url, namespace=f"kills-{new_request_id()}:")
    async with connect_async(settings) as client:
        yield Bench(client, settings, tmp_path)


async def writes_of_a_whole_life(bench: Bench, **options: Any) -> int:
    killer = Killer(None)
    await bench.begin(**options)
    await bench.coordinate(killer)
    return killer.writes


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
async def test_killed_at_every_write(bench: Bench, after: bool, ordered: bool) -> None:
    options = {"metadata": {"ordered": "true"} if ordered else None}
    writes = await writes_of_a_whole_life(bench, **options)
    assert writes > 12
    for at in range(writes):
        await bench.begin(**options)
        await bench.coordinate(Killer(at, after))
        await bench.coordinate()
        await bench.check_all_answered()


async def test_killed_again_and_again(bench: Bench) -> None:
    chance = random.Random(6)
    for _ in range(15):
        await bench.begin()
        for _ in range(chance.randint(2, 8)):
            await bench.coordinate(Killer(chance.randint(0, 12), chance.random() < 0.5))
        await bench.coordinate()
        await bench.check_all_answered()


async def test_refused_first_then_killed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal leaves no run: whoever takes over finds that of the next try."""
    monkeypatch.setattr("penstock.serving.batches.runner.FIRST_PAUSE_S", 0.001)
    for after in (False, True):
        for at in range(3, 9):  # around the commits
            await bench.begin()
            bench.fleet.answer = _refused_once()
            await bench.coordinate(Killer(at, after))
            await bench.coordinate()
            await bench.check_all_answered()
            assert len(bench.fleet.runs) == LINES
            assert not bench.fleet.missed


def _refused_once() -> Callable[[LineRequest], Awaitable[Reply]]:
    refused = set()

    async def answer(request: LineRequest) -> Reply:
        line_id, _, _ = request.stream_id.partition("-r")
        if line_id not in refused:
            refused.add(line_id)
            raise QueueUnavailable("a blip")
        return chat_reply()

    return answer


async def test_cancelled_and_killed(bench: Bench) -> None:
    """Every line ends once, as an answer or as cancelled, wherever the kill hits."""
    chance = random.Random(7)
    for _ in range(25):
        await bench.begin()
        slow = asyncio.Event()
        bench.fleet.answer = _until(slow, chance.randint(0, LINES))
        first = asyncio.create_task(bench.coordinate(Killer(chance.randint(3, 14), chance.random() < 0.5)))
        await asyncio.wait([first], timeout=chance.random() * 0.1)
        store = bench.parts().store
        had = await store.transition(bench.spec.id, (Status.VALIDATING, Status.IN_PROGRESS), Status.CANCELLING)
        assert had in (Status.VALIDATING, Status.IN_PROGRESS)
        await asyncio.wait([first], timeout=chance.random() * 2)
        first.cancel()
        await asyncio.wait([first])
        await bench.coordinate(Killer(chance.randint(0, 10), chance.random() < 0.5))
        await bench.coordinate()
        await _check_ended_once(bench, Status.CANCELLED, "batch_cancelled")


async def test_expired_and_killed(bench: Bench) -> None:
    chance = random.Random(8)
    for _ in range(10):
        await bench.begin(window_ms=300)
        bench.fleet.answer = _until(asyncio.Event(), chance.randint(0, LINES))
        await bench.coordinate(Killer(chance.randint(0, 25), chance.random() < 0.5))
        await bench.coordinate(Killer(chance.randint(0, 10), chance.random() < 0.5))
        await bench.coordinate()
        await _check_ended_once(bench, Status.EXPIRED, "batch_expired")


async def test_two_who_both_think_it_is_theirs(bench: Bench) -> None:
    """One is paused until its lease has run out; what it still writes counts for nothing."""
    await bench.begin()
    gate = asyncio.Event()
    bench.fleet.answer = _until(gate, 40)
    paused = bench.parts()
    held = asyncio.Event()
    commit = paused.store.commit

    async def late_commit(*args: Any) -> None:
        await held.wait()
        await commit(*args)

    paused.store.commit = late_commit  # type: ignore[method-assign]
    assert await paused.store.acquire(bench.spec.id, "paused")
    first = asyncio.create_task(Coordinator(bench.spec.id, "paused", paused).run())
    await eventually_async(bench.has_asked(40), 10, "the paused one is at work")
    gate.set()
    await bench.coordinate()
    held.set()
    await asyncio.wait([first])
    error = first.exception()
    assert isinstance(error, BaseExceptionGroup)
    assert error.split(LeaseLost)[1] is None
    await bench.check_all_answered()


def _until(event: asyncio.Event, quick: int) -> Any:
    """The first ``quick`` lines are answered at once, the others when the event is set."""

    async def answer(request: Any) -> Any:
        line_id, _, _ = request.stream_id.partition("-r")
        if int(line_id.rpartition("-")[2]) >= quick:
            await event.wait()
        return chat_reply()

    return answer


async def _check_ended_once(bench: Bench, status: Status, code: str) -> None:
    batch = await bench.batch()
    output, errors = await bench.rows(batch.output_file_id), await bench.rows(batch.error_file_id)
    assert batch.status is status
    names = [row["custom_id"] for row in output + errors]
    if batch.total:
        assert sorted(names) == sorted(f"c{i}" for i in range(LINES))
    assert {row["error"]["code"] for row in errors} <= {code}
    assert (batch.counters.completed, batch.counters.failed) == (len(output), len(errors))
    assert set(bench.fleet.runs.values()) <= {1}
    await bench.check_clean(batch)


async def test_no_slot_is_lost_however_it_ends(bench: Bench) -> None:
    """Slots are shared by all batches of an ingress: one that is cancelled gives back all it had."""
    chance = random.Random(9)
    parts = bench.parts()
    for _ in range(20):
        await bench.begin()
        bench.fleet.answer = _until(asyncio.Event(), chance.randint(0, LINES))
        await bench.client.delete(f"{bench.settings.namespace}batch:{bench.spec.id}:lease")
        assert await parts.store.acquire(bench.spec.id, "one")
        running = asyncio.create_task(Coordinator(bench.spec.id, "one", replace(parts, backend=bench.fleet)).run())
        await asyncio.wait([running], timeout=chance.random() * 0.05)
        running.cancel()
        await asyncio.wait([running])
        async with asyncio.timeout(5):
            for _ in range(16):
                await parts.slots.acquire("t")
        for _ in range(16):
            parts.slots.release("t")


async def _killed_half_way(bench: Bench) -> None:
    """Some lines are finished, and in segments."""
    for at in range(3, 20):
        await bench.begin()
        await bench.coordinate(Killer(at))
        if (await bench.batch()).counters.completed:
            break
        await bench.coordinate()
    batch = await bench.batch()
    assert 0 < batch.counters.completed < LINES
    assert batch.status is Status.IN_PROGRESS


async def test_a_lost_segment_ends_the_batch(bench: Bench) -> None:
    await _killed_half_way(bench)
    store = bench.parts().store
    lost = await store.segments(bench.spec.id)
    assert lost
    for segment in lost:
        (bench.root / segment.name).unlink()
    await bench.coordinate()
    batch = await bench.batch()
    assert (batch.status, [each.code for each in batch.problems]) == (Status.FAILED, ["results_lost"])
    assert len(await bench.rows(batch.output_file_id)) == LINES - sum(each.lines for each in lost)
    await bench.check_clean(batch)


async def test_a_changed_input_ends_the_batch(bench: Bench) -> None:
    await _killed_half_way(bench)
    finished = (await bench.batch()).counters.completed
    content = (bench.root / bench.spec.input_file_id).read_bytes()
    (bench.root / bench.spec.input_file_id).write_bytes(content[: len(content) // 2] + b"oops")
    await bench.coordinate()
    batch = await bench.batch()
    assert (batch.status, [each.code for each in batch.problems]) == (Status.FAILED, ["input_file_changed"])
    assert len(await bench.rows(batch.output_file_id)) >= finished > 0


async def test_a_lower_limit_is_for_later_uploads(bench: Bench) -> None:
    await _killed_half_way(bench)
    bench.batches = BatchSettings.model_construct(**BatchSettings().model_dump() | {"max_line_bytes": 10})
    await bench.coordinate()
    await bench.check_all_answered()


async def test_who_has_no_file_store_ends_nothing(bench: Bench, tmp_path: Path) -> None:
    await _killed_half_way(bench)
    bench.root = tmp_path / "not mounted"
    with pytest.raises(ExceptionGroup) as raised:
        await bench.coordinate()
    assert raised.value.split(StoreMissing)[1] is None
    assert (await bench.batch()).status is Status.IN_PROGRESS
    bench.root = tmp_path
    await bench.coordinate()
    await bench.check_all_answered()


@pytest.mark.parametrize("ending", [Status.CANCELLED, Status.EXPIRED])
async def test_what_a_dead_one_has_under_way_is_stopped(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, ending: Status
) -> None:
    """Its successor never asks for those lines: the batch has ended meanwhile."""
    monkeypatch.setattr("penstock.serving.batches.runner.FIRST_PAUSE_S", 0.001)
    await bench.begin(window_ms=3_600_000 if ending is Status.CANCELLED else 2_000)

    async def answer(request: LineRequest) -> Reply:
        if request.stream_id.endswith("-5"):
            return Reply(502, {}, b"{}")
        return await _until(asyncio.Event(), 0 if request.stream_id.endswith("-r1") else 20)(request)

    bench.fleet.answer = answer
    first = asyncio.create_task(bench.coordinate())
    await eventually_async(bench.has_asked(20 + 16), 10, "all slots wait")
    first.cancel()
    await asyncio.wait([first])
    assert not bench.fleet.stopped
    running = [name for name, run in bench.fleet.log.items() if not run.done()]
    assert len(running) == 16
    assert f"{bench.spec.id}-5-r1" in running
    if ending is Status.CANCELLED:
        await bench.parts().store.transition(bench.spec.id, (Status.IN_PROGRESS,), Status.CANCELLING)
    else:
        await eventually_async(_expired(bench.spec), 10, "the window has closed")
    await bench.coordinate()
    assert set(running) <= set(bench.fleet.stopped)
    assert (await bench.batch()).status is ending


def _expired(spec: BatchSpec) -> Callable[[], Awaitable[bool]]:
    async def holds() -> bool:
        return now_ms() > spec.expires_ms

    return holds


@pytest.mark.parametrize("ending", [Status.CANCELLED, Status.COMPLETED])
async def test_a_last_commit_is_not_interrupted(bench: Bench, monkeypatch: pytest.MonkeyPatch, ending: Status) -> None:
    """The batch is cancelled, or its window ends, while the last lines are committed: they are finished."""
    monkeypatch.setattr("penstock.serving.batches.results.SEGMENT_LINES", LINES + 1)
    monkeypatch.setattr("penstock.serving.batches.results.FLUSH_S", 1000.0)
    monkeypatch.setattr("penstock.serving.batches.coordinator.RENEW_S", 0.01)
    await bench.begin(window_ms=3_600_000 if ending is Status.CANCELLED else 3_000)
    parts, begun, go, seen = bench.parts(), asyncio.Event(), asyncio.Event(), []
    commit, load = parts.store.commit, parts.store.load

    async def held_commit(*args: Any) -> None:
        begun.set()
        await go.wait()
        await commit(*args)

    async def noted_load(batch_id: str) -> Batch | None:
        seen.append(await load(batch_id))
        return seen[-1]

    parts.store.commit, parts.store.load = held_commit, noted_load  # type: ignore[method-assign]
    assert await parts.store.acquire(bench.spec.id, "one")
    running = asyncio.create_task(Coordinator(bench.spec.id, "one", parts).run())
    await begun.wait()

    async def cancelled() -> bool:
        return [each.status for each in seen].count(Status.CANCELLING) > 5

    if ending is Status.CANCELLED:
        await bench.parts().store.transition(bench.spec.id, (Status.IN_PROGRESS,), Status.CANCELLING)
        await eventually_async(cancelled, 10, "the coordinator has seen it")
    else:
        await eventually_async(_expired(bench.spec), 10, "the window has closed")
    go.set()
    await running
    batch = await bench.batch()
    assert (batch.status, batch.counters.completed, batch.error_file_id) == (ending, LINES, None)
    await bench.check_clean(batch)


async def test_logs_of_all_tries_and_choices_go_soon(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.serving.batches.runner.FIRST_PAUSE_S", 0.001)
    await bench.begin()
    prefix = f"{bench.settings.namespace}req:"

    async def answer(request: LineRequest) -> Reply:
        records = tuple(f"{request.stream_id}:{choice}" for choice in range(2))
        for record_id in records:
            await bench.client.hset(f"{prefix}{record_id}", "done", 1)
            await bench.client.expire(f"{prefix}{record_id}", 3600)
        failing = request.stream_id.endswith("-7")
        return (Reply(502, {}, b"{}") if failing else chat_reply())._replace(records=records)

    bench.fleet.answer = answer
    await bench.coordinate()
    batch, logs = await bench.batch(), [key async for key in bench.client.scan_iter(f"{prefix}{bench.spec.id}-*")]
    assert (batch.counters.completed, len(logs)) == (LINES, 2 * (LINES + 1))
    assert max([await bench.client.ttl(key) for key in logs]) <= KEPT_S


async def test_many_under_way_and_killed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """More lines are under way than are put in order at a time: all of them are looked for."""
    monkeypatch.setattr("penstock.serving.batches.coordinator.MOST_HELD_LINES", 0)
    bench.slots = 100
    bench.batches = BatchSettings(look_ahead_lines=4, in_flight=bench.slots)
    await bench.begin()
    go = asyncio.Event()
    bench.fleet.answer = _until(go, 0)
    first = asyncio.create_task(bench.coordinate())
    await eventually_async(bench.has_asked(bench.slots), 10, "all slots wait")
    first.cancel()
    await asyncio.wait([first])
    go.set()
    await bench.coordinate()
    await bench.check_all_answered()
    assert not bench.fleet.missed
