"""Engines and dispatchers die, Redis forgets: every request still ends, as it would have."""

from __future__ import annotations

import asyncio
import random

import pytest

from penstock.workers.errand import PROBATION_TOKENS
from tests.contract.workers.cluster import CONTINUABLE, STATEFUL, Cluster, Worker

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]


SEEDS = 3


async def revive(cluster: Cluster, dead: Worker, role: str) -> None:
    """The replica dies, another starts, and the dead one's engine comes back to life."""
    dead.die()
    cluster.add(role)
    dead.engine.allow()


@pytest.mark.parametrize("sampling", [CONTINUABLE, STATEFUL], ids=["plain", "seed"])
async def test_death_before_the_first_token(mixed: Cluster, sampling: dict[str, int]) -> None:
    """The engine comes back as a zombie; nothing it says counts."""
    worker = mixed.add(held=True)
    mixed.dispatch()
    record = await mixed.send(5, sampling)
    await mixed.running_on(record, worker)
    worker.die()
    successor = mixed.add()
    await mixed.running_on(record, successor)
    worker.engine.allow()
    await mixed.completes(record)
    await mixed.drained()
    assert await mixed.field(record, "runs") == "2"


async def test_death_after_tokens_continues(mixed: Cluster) -> None:
    worker = mixed.add(held=True)
    mixed.dispatch()
    record = await mixed.send(5, CONTINUABLE)
    worker.engine.allow(3)
    await mixed.emitted(record, 3)
    worker.die()
    successor = mixed.add()
    await mixed.running_on(record, successor)
    worker.engine.allow()
    await mixed.completes(record)
    await mixed.drained()


REPLAYED = [
    {"max_tokens": 8, "seed": 7},
    {"max_tokens": 8, "presence_penalty": 0.5},
    {"max_tokens": 8, "min_tokens": 6},
    {"max_tokens": 8, "structured_outputs": {"regex": "a+"}},
    {"max_tokens": 8, "seed": 7, "prompt_logprobs": 1, "logprobs": 2},
]


@pytest.mark.parametrize("sampling", REPLAYED, ids=lambda sampling: ",".join(sampling))
async def test_death_after_tokens_replays_stateful_sampling(mixed: Cluster, sampling: dict[str, object]) -> None:
    """Run again from the prompt with all parameters; what was delivered is checked and not repeated."""
    worker = mixed.add(held=True)
    mixed.dispatch()
    record = await mixed.send(5, sampling)
    worker.engine.allow(3)
    await mixed.emitted(record, 3)
    worker.die()
    successor = mixed.add()
    await mixed.completes(record)
    await mixed.drained()
    (job,) = successor.engine.jobs
    assert (job.emitted, job.record.sampling) == ([], sampling)
    frames = mixed.seen[record.id]
    assert [frame.index for frame in frames] == list(range(8))
    assert [frame.usage is not None for frame in frames] == [True] + [False] * 7


async def test_replay_that_differs_is_told(mixed: Cluster) -> None:
    """Never a silent splice: the engine does not reproduce what the client has seen."""
    worker = mixed.add(held=True)
    mixed.dispatch()
    record = await mixed.send(5, STATEFUL)
    worker.engine.allow(3)
    await mixed.emitted(record, 3)
    worker.die()
    successor = mixed.add(held=True)
    successor.engine.twist = True
    successor.engine.allow()
    await mixed.fails(record, "stream_interrupted")
    await mixed.drained()
    assert len(mixed.tokens(record)) == 3
    await mixed.until(lambda: successor.engine.used_blocks == 0, "the engine dropped it")


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("prompt", [5, 8], ids=["part of a block", "whole blocks"])
async def test_replay_in_a_split_pool(split: Cluster, role: str, prompt: int) -> None:
    """The second attempt goes through both pools again, appends only the rest, and loses another replica. The first
    had got far: else it would be run alone."""
    workers = {name: split.add(name, held=name == "decode") for name in ("prefill", "decode")}
    split.dispatch(max_attempts=9)
    record = await split.send(prompt, STATEFUL | {"max_tokens": 2 * PROBATION_TOKENS})
    await split.running_on(record, workers["decode"])
    workers["decode"].engine.allow(PROBATION_TOKENS + 3)
    await split.emitted(record, PROBATION_TOKENS)
    second = {name: split.add(name, held=name == role) for name in ("prefill", "decode")}
    for worker in workers.values():
        worker.die()
    await split.running_on(record, second[role])
    second[role].engine.allow(1)
    second[role].die()
    split.add(role)
    await split.completes(record)
    await split.drained()


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("prompt", [5, 8], ids=["shared first token", "whole blocks"])
async def test_death_in_a_split_pool(split: Cluster, role: str, prompt: int) -> None:
    workers = {name: split.add(name, held=name == role) for name in ("prefill", "decode")}
    split.dispatch()
    record = await split.send(prompt, {"max_tokens": 20})
    await split.running_on(record, workers[role])
    if role == "decode":
        workers[role].engine.allow(3)
        await split.emitted(record, 3)
    await revive(split, workers[role], role)
    await split.completes(record)
    await split.drained()


async def test_hand_over_to_the_dead(split: Cluster) -> None:
    """The decode replica died while no dispatcher looked; the prefill replica found nobody."""
    prefill, decode = split.add("prefill", held=True), split.add("decode")
    running = split.dispatch()
    record = await split.send()
    await split.running_on(record, prefill)
    decode.die()
    prefill.engine.allow()

    async def lost() -> bool:
        return await split.field(record, "lost") == "1" or int(await split.field(record, "attempt")) > 1

    await split.until(lost, "the hand-over found nobody")
    split.add("decode")
    await split.completes(record)
    await split.drained()
    assert running.dispatcher._books.errands == {}


async def test_dispatcher_death_leaves_the_running_alone(mixed: Cluster) -> None:
    """A successor adopts what runs: the same attempt goes on, and is finished in the queue."""
    worker = mixed.add(held=True)
    running = mixed.dispatch()
    record = await mixed.send(5, STATEFUL)
    worker.engine.allow(3)
    await mixed.emitted(record, 3)
    before = await mixed.field(record, "dispatcher")
    running = await mixed.replace(running)

    async def adopted() -> bool:
        return await mixed.field(record, "dispatcher") != before

    await mixed.until(adopted, "the successor has adopted it")
    worker.engine.allow()
    await mixed.completes(record)
    await mixed.drained()
    assert await mixed.field(record, "attempt") == "1"
    assert running.dispatcher._books.errands == {}


async def test_adopted_in_prefill_then_decode_dies(split: Cluster) -> None:
    """The successor never chose the decode replica, yet notices its death."""
    prefill, decode = split.add("prefill", held=True), split.add("decode", held=True)
    running = split.dispatch()
    record = await split.send(5, {"max_tokens": 20})
    await split.running_on(record, prefill)
    before = await split.field(record, "dispatcher")
    await split.replace(running)

    async def adopted() -> bool:
        return await split.field(record, "dispatcher") != before

    await split.until(adopted, "the successor has adopted it")
    prefill.engine.allow()
    await split.running_on(record, decode)
    await revive(split, decode, "decode")
    await split.completes(record)
    await split.drained()


async def test_finished_while_no_dispatcher_lived(mixed: Cluster) -> None:
    worker = mixed.add(held=True)
    running = mixed.dispatch()
    record = await mixed.send()
    await mixed.running_on(record, worker)
    mixed._dispatchers.remove(running)
    await running.stop()
    worker.engine.allow()
    await mixed.completes(record)
    mixed.dispatch()
    await mixed.drained()
    assert len(worker.engine.started) == 1


async def test_request_that_kills_is_given_up(mixed: Cluster) -> None:
    """Three replicas died of it: a typed error for the client, a dead letter for the operator."""
    mixed.dispatch(max_attempts=3)
    record = await mixed.send(5, {"max_tokens": 20})
    for emitted in (1, 2, 3):
        worker = mixed.add(held=True)
        await mixed.running_on(record, worker)
        worker.engine.allow(1)
        await mixed.emitted(record, emitted)
        worker.die()
    await mixed.fails(record, "engine_failed")
    await mixed.drained()
    (letter,) = await mixed.dead_letters()
    assert "3 replicas died" in letter.reason
    assert await mixed.field(record, "runs") == "3"


async def test_short_absence_of_a_lease_loses_nothing(mixed: Cluster) -> None:
    """A replica that stalled past its lease is not the one it was, but its inbox and its credits still add up."""
    worker = mixed.add(held=True, max_num_seqs=2)
    running = mixed.dispatch()
    records = [await mixed.send() for _ in range(4)]
    await mixed.running_on(records[0], worker)
    await mixed.client.delete(f"{mixed.settings.namespace}replica:{worker.id}")
    worker.engine.allow()
    await mixed.completes(*records)
    await mixed.drained()
    (seat,) = running.dispatcher._router._decode.seats.values()
    await mixed.until(lambda: (seat.requests, seat.use) == (2, 0.0), "all credits are back")


async def test_connections_drop(split: Cluster) -> None:
    """Redis closes everybody's connection again and again: nobody notices but the log."""
    for role in ("prefill", "decode"):
        split.add(role)
    split.dispatch()
    records = []
    for _ in range(6):
        records += [await split.send(9, {"max_tokens": 30}) for _ in range(3)]
        await split.cut_connections()
    await split.completes(*records)
    await split.drained()


async def test_lost_state_is_generated_again(mixed: Cluster) -> None:
    """Redis knows nothing of it any more: a new attempt, above the last one, and the same tokens once."""
    worker = mixed.add(held=True)
    running = mixed.dispatch()
    record = await mixed.send(5, CONTINUABLE)
    worker.engine.allow(2)
    await mixed.emitted(record, 2)
    namespace = mixed.settings.namespace
    await mixed.client.delete(f"{namespace}req:{record.id}", f"{namespace}tok:{record.id}")
    await running.dispatcher._handle(await running.dispatcher._missed())
    worker.engine.allow()
    await mixed.completes(record)
    await mixed.drained()
    assert int(await mixed.field(record, "attempt")) > 1


async def test_lost_events_do_not_hold_a_request(mixed: Cluster) -> None:
    """The end's message never came: the comparison with Redis finds it."""
    worker = mixed.add(held=True)
    running = mixed.dispatch()
    record = await mixed.send()
    await mixed.running_on(record, worker)
    await mixed.client.hset(f"{mixed.settings.namespace}req:{record.id}", "dispatcher", "nobody")
    worker.engine.allow()
    await mixed.completes(record)
    assert list(running.dispatcher._books.errands) == [record.id]
    await running.dispatcher._handle(await running.dispatcher._missed())
    await mixed.drained()


async def test_waiting_requests_survive_a_reconnection(mixed: Cluster) -> None:
    """What was never dispatched has no state in Redis; that is not an end."""
    worker = mixed.add(held=True, num_gpu_blocks_override=128)
    running = mixed.dispatch()
    first = await mixed.send(300)
    await mixed.running_on(first, worker)
    second = await mixed.send(300)
    await mixed.until(lambda: second.id in running.dispatcher._books.waiting, "the second one waits")
    await running.dispatcher._handle(await running.dispatcher._missed())
    worker.engine.allow()
    await mixed.completes(first, second)
    await mixed.drained()


async def test_two_dispatchers_share_a_pool(split: Cluster) -> None:
    for role in ("prefill", "decode", "decode"):
        split.add(role)
    for _ in range(2):
        split.dispatch(dispatchers=2)
    await split.completes(*[await split.send(7, {"max_tokens": 10}) for _ in range(60)])
    await split.drained()


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(SEEDS))
async def test_everything_ends_whatever_dies(split: Cluster, seed: int) -> None:
    """Replicas, dispatchers and connections come and go under load; every answer is exact."""
    choose = random.Random(seed)
    replicas = {role: [split.add(role), split.add(role)] for role in ("prefill", "decode")}
    running = split.dispatch(max_attempts=50)
    split.shape |= {"max_attempts": 50}
    records = []
    for turn in range(24):
        for _ in range(8):
            records.append(await split.send(choose.randrange(1, 40), {"max_tokens": choose.randrange(1, 40)}))
        what = choose.choice(["prefill", "decode", "decode", "dispatcher", "connections"])
        if what == "dispatcher":
            running = await split.replace(running)
        elif what == "connections":
            await split.cut_connections()
        else:
            replicas[what].append(split.add(what))
            await asyncio.to_thread(replicas[what].pop(turn % 2).die)
    await split.completes(*records)
    await split.drained()
    await split.until(lambda: running.dispatcher._books.errands == {}, "the dispatcher holds nothing")
