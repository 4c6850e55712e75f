"""Failures by class: the request's, a replica's, the platform's; and the request that kills whatever runs it."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from penstock.queue.dead_letters import retry
from penstock.queue.messages import EventKind, encode, lua_string
from penstock.queue.protocol import Delivery
from penstock.queue.records import SCHEMA_VERSION, PriorityClass, decode_record
from penstock.queue.registry import LEASE_S
from penstock.queue.token_log import Dispatch, DispatchStatus
from penstock.workers import errand
from penstock.workers.dispatcher import SUSPECTS
from penstock.workers.errand import PROBATION_TOKENS
from tests.contract.workers.cluster import Cluster, Worker
from tests.support.frozen_records import FROZEN

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]

POISON = "poison"


def lethal(cluster: Cluster, *, held: bool = False, **limits: int) -> Worker:
    """A replica that the poison kills."""
    worker = cluster.add(held=held, **limits)
    worker.engine.lethal[POISON] = worker.die
    return worker


async def test_the_likeliest_suspect_is_alone_at_once(mixed: Cluster) -> None:
    """[I8] What had got far when its replica died goes on elsewhere; what had just begun gets a replica for itself."""
    mixed.dispatch(max_attempts=3)
    first = lethal(mixed, held=True)
    innocents = [await mixed.send(5, {"max_tokens": 60}) for _ in range(2)]
    for record in innocents:
        await mixed.running_on(record, first)
    first.engine.allow(30)
    for record in innocents:
        await mixed.emitted(record, PROBATION_TOKENS)
    poison = await mixed.send(id=POISON)
    await mixed.until(lambda: first.died, "the poison has killed")
    rest = [lethal(mixed) for _ in range(3)]
    await mixed.completes(*innocents)
    await mixed.fails(poison, "engine_failed")
    assert sum(worker.died for worker in rest) == 2
    assert [await mixed.field(record, "runs") for record in innocents] == ["2", "2"]
    await mixed.drained()


async def test_poison_does_not_take_its_neighbours_along(mixed: Cluster) -> None:
    """[I5, I8] Where many had just begun none is likelier than the others. Twice on a replica with the poison, an
    innocent is as suspect as it: from then on each is alone."""
    mixed.dispatch(max_attempts=3)
    first = lethal(mixed, held=True, max_num_seqs=8)
    innocents = [await mixed.send(5, {"max_tokens": 40}) for _ in range(SUSPECTS)]
    for record in innocents:
        await mixed.running_on(record, first)
    poison = await mixed.send(id=POISON)
    await mixed.until(lambda: first.died, "the poison has killed")
    second = lethal(mixed, held=True, max_num_seqs=8)
    await mixed.until(lambda: second.died, "the poison has killed again")
    for record in innocents:
        await mixed.running_on(record, second)
    last = [lethal(mixed) for _ in range(3)]
    await mixed.completes(*innocents)
    await mixed.fails(poison, "engine_failed")
    assert sum(worker.died for worker in last) == 1
    await mixed.drained()
    (letter,) = await mixed.dead_letters()
    assert (letter.record().id, letter.reason) == (POISON, "3 replicas died while running this request")


async def test_suspects_of_several_dispatchers_are_kept_apart(mixed: Cluster) -> None:
    """[I8] Each dispatcher has suspects of its own; none is put beside another's."""
    for _ in range(2):
        mixed.dispatch(max_attempts=2, dispatchers=2)
    first = lethal(mixed, held=True)
    innocents = [await mixed.send(5, {"max_tokens": 40}) for _ in range(6)]
    for record in innocents:
        await mixed.running_on(record, first)
    poison = await mixed.send(id=POISON)
    await mixed.until(lambda: first.died, "the poison has killed")
    last = [lethal(mixed) for _ in range(3)]
    await mixed.completes(*innocents)
    await mixed.fails(poison, "engine_failed")
    assert sum(worker.died for worker in last) == 1
    await mixed.drained()
    assert [letter.record().id for letter in await mixed.dead_letters()] == [POISON]


async def test_progress_clears_a_suspect(mixed: Cluster) -> None:
    """[I8] A long answer survives more deaths than it may have in a row."""
    mixed.dispatch(max_attempts=2)
    record = await mixed.send(5, {"max_tokens": 100})
    for emitted in (20, 40, 60):
        worker = mixed.add(held=True)
        await mixed.running_on(record, worker)
        worker.engine.allow(20)
        await mixed.emitted(record, emitted)
        await asyncio.to_thread(worker.die)
    mixed.add()
    await mixed.completes(record)
    assert await mixed.dead_letters() == []


async def test_replica_that_fails_on_a_request_is_avoided(mixed: Cluster) -> None:
    broken = mixed.add()
    broken.engine.poison = POISON
    mixed.dispatch(max_attempts=9)
    record = await mixed.send(id=POISON)
    await mixed.until(lambda: broken.engine.refused > 0, "it has failed")
    sound = mixed.add()
    await mixed.completes(record)
    assert len(sound.engine.started) == 1
    await mixed.drained()


async def test_record_that_no_engine_reads_is_told(mixed: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """[I5, I7] A dispatcher of a later release wrote it: every engine gives it back, and none dies of it."""
    with monkeypatch.context() as later:
        later.setattr(errand, "_for_engine", lambda record: msgspec.structs.replace(record, v=SCHEMA_VERSION + 1))
        mixed.dispatch(max_attempts=2)
        worker = mixed.add()
        record = await mixed.send()
        await mixed.fails(record, "engine_failed")
    await mixed.completes(await mixed.send())
    assert (await mixed.field(record, "runs"), len(worker.engine.started)) == ("2", 1)
    await mixed.drained()


@pytest.mark.parametrize("work", [["run", "r", "a stage to come"], ["a kind to come", "r"], [["nonsense"]]], ids=str)
async def test_work_that_an_engine_does_not_know(mixed: Cluster, work: list[object]) -> None:
    """[I7] What names its request goes back to the dispatcher, the rest is passed over."""
    worker = mixed.add()
    mixed.dispatch()
    await mixed.completes(await mixed.send())
    entry = Dispatch("r", 0, "nobody", worker.id, lua_string(encode(work)), "acme")
    assert [answer.status for answer in await mixed.log.dispatch("nobody", [entry])] == [DispatchStatus.OK]
    await mixed.completes(await mixed.send())
    known = work[-1] != ["nonsense"]
    assert [event.kind for event in await mixed.log.states({"r": 1})] == [
        EventKind.LOST if known else EventKind.PREFILLED
    ]


async def test_failure_everywhere_is_told(mixed: Cluster) -> None:
    """[I5] After as many tries as it may have, with pauses between them, and then it is an operator's."""
    worker = mixed.add()
    worker.engine.poison = POISON
    mixed.dispatch(max_attempts=3)
    record = await mixed.send(id=POISON)
    await mixed.fails(record, "engine_failed")
    assert worker.engine.refused == 3
    assert len(await mixed.dead_letters()) == 1
    await mixed.drained()


@pytest.mark.parametrize("lettered", [False, True], ids=["before the letter", "after the letter"])
async def test_dispatcher_dies_while_it_gives_up(
    mixed: Cluster, monkeypatch: pytest.MonkeyPatch, lettered: bool
) -> None:
    """[I5] Its successor does what is missing: the stream ends once, and there is one dead letter."""
    running = mixed.dispatch(max_attempts=1)
    mixed.shape |= {"max_attempts": 1}
    bury, reached = running.queue.dead_letter, asyncio.Event()

    async def die_beside(delivery: Delivery, reason: str) -> None:
        if lettered:
            await bury(delivery, reason)
        reached.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(running.queue, "dead_letter", die_beside)
    worker = mixed.add(held=True)
    record = await mixed.send()
    await mixed.running_on(record, worker)
    worker.die()
    await mixed.until(reached.is_set, "it gives up")
    await mixed.replace(running)
    mixed.add()
    await mixed.fails(record, "engine_failed")
    await mixed.drained()
    (letter,) = await mixed.dead_letters()
    assert letter.record().id == record.id


async def test_what_another_dispatcher_knows_counts(mixed: Cluster) -> None:
    """[I8] One that was adopted and got on well meanwhile is not given up by whom nobody told."""
    running = mixed.dispatch(max_attempts=2)
    record = await mixed.send(5, {"max_tokens": 60})
    first = mixed.add(held=True)
    await mixed.running_on(record, first)
    await asyncio.to_thread(first.die)
    second = mixed.add(held=True)
    await mixed.running_on(record, second)
    state = f"{mixed.settings.namespace}req:{record.id}"
    await mixed.client.hset(state, "dispatcher", "dispatcher:another")  # as after a rebalance
    second.engine.allow(PROBATION_TOKENS + 5)
    await mixed.emitted(record, PROBATION_TOKENS + 5)
    assert running.dispatcher._books.errands[record.id].deaths == 1
    await asyncio.to_thread(second.die)
    mixed.add()
    await mixed.completes(record)
    assert await mixed.field(record, "runs") == "3"
    assert await mixed.dead_letters() == []
    await mixed.drained()


async def test_no_replica_is_no_failure(mixed: Cluster) -> None:
    """[I8] Waiting for a replica counts for nothing, nor does one that says goodbye."""
    mixed.dispatch(max_attempts=1)
    record = await mixed.send(5, {"max_tokens": 20})
    for emitted in (5, 10):
        worker = mixed.add(held=True)
        await mixed.running_on(record, worker)
        worker.engine.allow(5)
        await mixed.emitted(record, emitted)
        await asyncio.to_thread(worker.host.leave)
    mixed.add()
    await mixed.completes(record)
    assert await mixed.field(record, "deaths") == "0"
    await mixed.drained()


async def test_redis_outage_is_nobodys_death(lossy: Cluster) -> None:
    """[I8] All leases run out while Redis is away; when it is back nothing was taken from anybody."""
    assert lossy.server is not None
    worker = lossy.add(held=True)
    running = lossy.dispatch()
    record = await lossy.send(5, {"max_tokens": 40})
    worker.engine.allow(3)
    await lossy.emitted(record, 3)
    await asyncio.to_thread(lossy.server.kill)
    await lossy.until(lambda: not running.dispatcher._judging, "the dispatcher has noticed")
    noticed = running.dispatcher._judging_from
    await lossy.until(lambda: running.dispatcher._judging_from > noticed + LEASE_S, "a lease's time has passed")
    await asyncio.to_thread(lossy.server.start)
    await lossy.client.connection_pool.disconnect()
    worker.engine.allow()
    await lossy.completes(record)
    assert await lossy.field(record, "attempt") == "1"
    await lossy.drained()


async def test_full_redis_is_nobodys_death(lossy: Cluster) -> None:
    """[I8] It answers what is asked, and refuses every heartbeat until the last lease has run out."""
    worker = lossy.add(held=True)
    running = lossy.dispatch(max_attempts=1)
    record = await lossy.send(5, {"max_tokens": 40})
    worker.engine.allow(3)
    await lossy.emitted(record, 3)
    await lossy.client.config_set("maxmemory", 1)

    async def lapsed() -> bool:
        return not await lossy.client.exists(f"{lossy.settings.namespace}replica:{worker.id}")

    await lossy.until(lapsed, "its lease has run out")
    noticed = running.dispatcher._judging_from
    await lossy.until(lambda: running.dispatcher._judging_from > noticed, "the dispatcher has looked since")
    await lossy.client.config_set("maxmemory", 0)
    worker.engine.allow()
    await lossy.completes(record)
    assert (await lossy.field(record, "attempt"), await lossy.field(record, "deaths")) == ("1", "0")
    assert await lossy.dead_letters() == []
    await lossy.drained()


async def test_batch_leaves_room_for_the_urgent(mixed: Cluster) -> None:
    """[I9] However much batch work there is, an interactive request starts at once."""
    worker = mixed.add(held=True, max_num_seqs=10)
    mixed.dispatch(reserved_share=0.2)
    batch = [await mixed.send(priority_class=PriorityClass.BATCH) for _ in range(12)]
    await mixed.until(lambda: len(worker.engine.started) == 8, "batch has its share")
    urgent = await mixed.send(priority_class=PriorityClass.INTERACTIVE)
    await mixed.running_on(urgent, worker)
    assert len(worker.engine.started) == 9
    worker.engine.allow()
    await mixed.completes(urgent, *batch)
    await mixed.drained()


async def test_waiting_batch_does_not_block_the_urgent(mixed: Cluster) -> None:
    """[I9] A batch request that fits nowhere waits, and the others are pulled meanwhile."""
    worker = mixed.add(held=True, num_gpu_blocks_override=128)
    running = mixed.dispatch()
    first = await mixed.send(300)
    await mixed.running_on(first, worker)
    large = await mixed.send(300, priority_class=PriorityClass.BATCH)
    await mixed.until(lambda: large.id in running.dispatcher._books.waiting, "the large one waits")
    small = await mixed.send(5, priority_class=PriorityClass.INTERACTIVE)
    await mixed.running_on(small, worker)
    worker.engine.allow()
    await mixed.completes(first, large, small)
    await mixed.drained()


async def test_dead_letter_is_run_again(mixed: Cluster) -> None:
    """From the beginning, under fresh attempts, once the fault is mended."""
    worker = mixed.add()
    worker.engine.poison = POISON
    mixed.dispatch(max_attempts=1)
    record = await mixed.send(id=POISON)
    await mixed.fails(record, "engine_failed")
    await mixed.drained()
    worker.engine.poison = None
    mixed.follow(record)
    await retry(mixed.queue, mixed.log, await mixed.dead_letters())
    await mixed.completes(record)
    await mixed.drained()
    assert await mixed.dead_letters() == []


@pytest.mark.parametrize("version", FROZEN)
async def test_records_of_released_versions_run(mixed: Cluster, version: int) -> None:
    """[I7] Left on the broker by an earlier release."""
    record = decode_record(FROZEN[version])
    mixed.reader.open(record.id)
    prefix = f"{mixed.settings.namespace}requests:default:"
    await mixed.client.xadd(f"{prefix}standard", {"t": record.num_tokens, "r": FROZEN[version]})
    await mixed.client.hincrby(f"{prefix}tokens", "1", record.num_tokens)
    mixed.add()
    mixed.dispatch()
    await mixed.completes(record)
    await mixed.drained()
