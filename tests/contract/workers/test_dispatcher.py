"""Dispatcher, queue, token log and engine hosts together: every accepted request ends, exactly, whoever dies."""

from __future__ import annotations

import pytest

from penstock.queue.messages import TERMINAL, Event, EventKind, Finish, Frame
from penstock.queue.records import PriorityClass, now_ms
from penstock.workers.simulated.tokens import expected_tokens
from tests.contract.workers.cluster import CONTINUABLE, STATEFUL, Cluster

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]


async def test_mixed_pool_answers(mixed: Cluster) -> None:
    mixed.add()
    mixed.dispatch()
    await mixed.completes(*[await mixed.send(n, {"max_tokens": m}) for n in (1, 4, 9) for m in (1, 2, 7)])
    await mixed.drained()


@pytest.mark.parametrize("prompt", [3, 4, 5, 8, 64], ids=lambda n: f"{n} tokens")
@pytest.mark.parametrize("sampling", [CONTINUABLE, STATEFUL, {"max_tokens": 1}], ids=["plain", "seed", "one token"])
async def test_split_pool_answers(split: Cluster, prompt: int, sampling: dict[str, int]) -> None:
    """Also where the prompt fills its last block of 4, where the first token cannot be shared, or is the last."""
    prefill, decode = split.add("prefill"), split.add("decode")
    split.dispatch()
    record = await split.send(prompt, sampling)
    await split.completes(record)
    await split.drained()
    assert bool(prefill.engine.started) == (sampling["max_tokens"] > 1)
    assert decode.engine.started
    await split.until(lambda: prefill.engine.used_blocks == decode.engine.used_blocks == 0, "no block is held")


async def test_split_pool_stop_token_in_prefill(split: Cluster) -> None:
    """The first token is also the last: decode only releases the cache."""
    prefill, _ = split.add("prefill"), split.add("decode")
    split.dispatch()
    prompt = [5, 6, 7]
    (stop,) = expected_tokens(prompt, 1)
    record = await split.send(prompt, {"max_tokens": 8, "stop_token_ids": [stop]})
    assert (await split.end(record)).finish is Finish.STOP
    assert split.tokens(record) == [stop]
    await split.drained()
    await split.until(lambda: prefill.engine.used_blocks == 0, "no block is held")


async def test_short_prompts_skip_the_prefill_pool(split: Cluster) -> None:
    prefill, _ = split.add("prefill"), split.add("decode")
    split.dispatch(short_prompt_tokens=10)
    await split.completes(await split.send(10))
    assert prefill.engine.started == []
    await split.completes(await split.send(11))
    assert prefill.engine.started != []


async def test_engine_is_never_overfull(mixed: Cluster) -> None:
    """Credits: no more than ``max_num_seqs`` of forty requests at a time, and none is lost waiting."""
    workers = [mixed.add(max_num_seqs=2) for _ in range(2)]
    running = mixed.dispatch()
    await mixed.until(lambda: len(running.dispatcher._router._decode.seats) == 2, "both replicas are known")
    await mixed.completes(*[await mixed.send(6) for _ in range(40)])
    assert all(0 < worker.engine.most_requests <= 2 for worker in workers)
    await mixed.drained()


async def test_urgent_work_goes_first(mixed: Cluster) -> None:
    """One slot: what waits is served by class, then by age."""
    worker = mixed.add(held=True, max_num_seqs=1)
    mixed.dispatch()
    first = await mixed.send(priority_class=PriorityClass.BATCH)
    await mixed.running_on(first, worker)
    classes = [PriorityClass.BATCH, PriorityClass.STANDARD, PriorityClass.BATCH, PriorityClass.INTERACTIVE]
    batch, standard, later, interactive = [await mixed.send(priority_class=cls) for cls in classes]
    worker.engine.allow()
    await mixed.completes(first, batch, standard, later, interactive)
    assert mixed.ends == [record.id for record in (first, interactive, standard, batch, later)]


async def test_invalid_request_is_refused(mixed: Cluster) -> None:
    mixed.add()
    mixed.dispatch()
    record = await mixed.send(600)
    await mixed.fails(record, "invalid_record")
    assert mixed.seen[record.id][-1].index == TERMINAL
    await mixed.drained()


async def test_request_that_breaks_its_conversion_hurts_nobody(mixed: Cluster) -> None:
    worker = mixed.add()
    mixed.dispatch()
    worker.engine.poison = "poison"
    await mixed.fails(await mixed.send(id="poison"), "engine_failed")
    await mixed.completes(await mixed.send())
    await mixed.drained()


async def test_same_request_published_twice(mixed: Cluster) -> None:
    """A publisher that was not answered sent it again: it runs once, and both entries are finished."""
    worker = mixed.add(held=True)
    mixed.dispatch()
    record = await mixed.send()
    await mixed.running_on(record, worker)
    await mixed.queue.publish(record)
    worker.engine.allow()
    await mixed.completes(record)
    await mixed.drained()
    assert await mixed.field(record, "runs") == "1"


async def test_published_again_before_its_end_was_noticed(mixed: Cluster) -> None:
    """[I1] A cancelled request was taken back and published anew: the news of its first end must not finish that."""
    worker = mixed.add(held=True)
    running = mixed.dispatch()
    record = await mixed.send()
    await mixed.running_on(record, worker)
    await mixed.queue.publish(record)
    errand = running.dispatcher._books.errands[record.id]
    await mixed.until(lambda: len(errand.deliveries) == 2, "it was delivered again")
    await mixed.log.reset([record.id])
    await running.dispatcher._handle([Event(record.id, EventKind.DONE, 1)])
    worker.engine.allow()
    await mixed.completes(record)
    await mixed.drained()


async def test_cancelled_in_the_queue(mixed: Cluster) -> None:
    worker = mixed.add(held=True, max_num_seqs=1)
    mixed.dispatch()
    first = await mixed.send()
    await mixed.running_on(first, worker)
    second = await mixed.send()
    await mixed.log.cancel([second.id])
    worker.engine.allow()
    assert await mixed.end(second) == Frame(TERMINAL, [], finish=Finish.ABORT)
    await mixed.completes(first)
    await mixed.drained()
    assert len(worker.engine.started) == 1


async def test_cancelled_while_waiting_for_room(mixed: Cluster) -> None:
    """It was pulled, but its tokens fit nowhere."""
    worker = mixed.add(held=True, num_gpu_blocks_override=128)
    running = mixed.dispatch()
    first = await mixed.send(300)
    await mixed.running_on(first, worker)
    second = await mixed.send(300)
    await mixed.until(lambda: second.id in running.dispatcher._books.waiting, "the second one waits")
    await mixed.log.cancel([second.id])
    worker.engine.allow()
    assert await mixed.end(second) == Frame(TERMINAL, [], finish=Finish.ABORT)
    await mixed.completes(first)
    await mixed.drained()


async def test_cancelled_while_running(mixed: Cluster) -> None:
    worker = mixed.add(held=True)
    mixed.dispatch()
    record = await mixed.send(5, {"max_tokens": 200})
    worker.engine.allow(3)
    await mixed.emitted(record, 3)
    await mixed.log.cancel([record.id])
    worker.engine.allow()
    assert (await mixed.end(record)).finish is Finish.ABORT
    assert len(mixed.tokens(record)) < 200
    await mixed.drained()
    await mixed.until(lambda: worker.engine.used_blocks == 0, "its blocks are free")


@pytest.mark.parametrize("where", ["prefill", "decode"])
async def test_cancelled_in_a_split_pool(split: Cluster, where: str) -> None:
    prefill = split.add("prefill", held=where == "prefill")
    decode = split.add("decode", held=where == "decode")
    split.dispatch()
    record = await split.send(5, {"max_tokens": 200})
    await split.running_on(record, prefill if where == "prefill" else decode)
    await split.log.cancel([record.id])
    for worker in (prefill, decode):
        worker.engine.allow()
    assert (await split.end(record)).finish is Finish.ABORT
    await split.drained()
    await split.until(lambda: prefill.engine.used_blocks == decode.engine.used_blocks == 0, "no block is held")


async def test_deadline_of_the_running(mixed: Cluster) -> None:
    worker = mixed.add(held=True)
    mixed.dispatch()
    record = await mixed.send(5, {"max_tokens": 200}, deadline_ms=now_ms() + 1000)
    worker.engine.allow(2)
    await mixed.fails(record, "deadline_exceeded")
    worker.engine.allow()
    await mixed.until(lambda: worker.engine.used_blocks == 0, "the engine dropped it")
    await mixed.drained()


async def test_deadline_passed_in_the_queue(mixed: Cluster) -> None:
    """Nobody waits any more when there is room at last: no engine sees it."""
    mixed.dispatch()
    record = await mixed.send(deadline_ms=now_ms() - 1)
    worker = mixed.add()
    await mixed.fails(record, "deadline_exceeded")
    assert worker.engine.started == []
    await mixed.drained()
