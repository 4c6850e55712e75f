"""What the token log decides about dispatches, cancellations and ends."""

from __future__ import annotations

import pytest

from penstock.queue.messages import (
    Abort,
    Delivered,
    Event,
    EventKind,
    Finish,
    Frame,
    Inbound,
    Run,
    decode_delivered,
)
from penstock.queue.token_log import (
    AppendStatus,
    DispatchStatus,
    TokenWriter,
)
from tests.contract.queue.logs import ADOPTED, CANCELLED, ERROR, OK, Store, Wire, entry, hand_over

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]


async def test_cancellation_follows_a_hand_over(store: Store) -> None:
    """It met the prefill replica when that had just finished: the decode replica must hear of it."""
    await store.dispatch("r", "a")
    assert await store.log.cancel(["r"]) == 1
    store.writer.append([hand_over(entry("r", 1, 0, [5]), "b")])
    run, abort = store.inbox("b")
    assert isinstance(run.work, Run)
    assert abort == Inbound(0, Abort(["r"]))


async def test_dispatch_numbers_attempts_and_runs(store: Store) -> None:
    assert await store.dispatch("r", "a") == (OK, 1, 0, "a", 1, 0)
    assert await store.dispatch("r", "b", force=True) == (OK, 2, 0, "b", 2, 0)
    assert [got.attempt for got in store.inbox("b")] == [2]
    run, abort = store.inbox("a")
    assert (run.attempt, abort) == (1, Inbound(0, Abort(["r"]))), "the first is told to stop"


async def test_living_replica_is_adopted(store: Store, wire: Wire) -> None:
    """A second dispatcher watches what runs, and gets its events."""
    await store.dispatch("r", "a")
    assert await store.dispatch("r", "b", dispatcher="d2") == (ADOPTED, 1, 0, "a", 1, 0)
    assert store.inbox("b") == []
    store.writer.append([entry("r", 1, 0, [1], Finish.STOP)])
    assert [channel for channel, _ in wire.read()] == ["ingress", "d2"]


async def test_emitted_tokens_are_told_before_the_next_run(store: Store) -> None:
    """The first call fences the old attempt and starts nothing; only the second, with all tokens known, runs."""
    await store.dispatch("r", "a")
    store.writer.append([entry("r", 1, 0, [1, 2])])
    store.bury("a")
    assert await store.dispatch("r", "b") == (DispatchStatus.EMITTED, 2, 2, "", 1, 1)
    assert store.writer.append([entry("r", 1, 2, [9])]) == [AppendStatus.STALE]
    assert store.inbox("b") == []
    assert await store.log.states({"r": 1}) == []
    assert await store.dispatch("r", "b", expect=2, deaths=1) == (OK, 3, 2, "b", 2, 1)
    assert len(store.inbox("b")) == 1


async def test_dispatch_to_the_dead_takes_no_attempt(store: Store) -> None:
    store.bury("a")
    assert await store.dispatch("r", "a") == (DispatchStatus.NO_REPLICA, 0, 0, "", 0, 0)
    assert store.inbox("a") == []
    assert await store.dispatch("r", "b") == (OK, 1, 0, "b", 1, 0)


async def test_done_is_not_dispatched(store: Store) -> None:
    await store.dispatch("r", "a")
    store.writer.append([entry("r", 1, 0, [1], Finish.STOP)])
    for force in (False, True):
        assert (await store.dispatch("r", "b", force=force)).status == DispatchStatus.DONE
    assert await store.log.states({"r": 1}) == [Event("r", EventKind.DONE, 1, "a")]


async def test_cancelled_before_dispatch_is_never_run(store: Store) -> None:
    assert await store.log.cancel(["r"]) == 1
    assert (await store.dispatch("r", "a")).status == DispatchStatus.CANCELLED
    assert await store.log.finish([("r", "ingress", CANCELLED)]) == [True]
    assert await store.log.read("r") == [CANCELLED]
    assert store.inbox("a") == []
    assert (await store.dispatch("r", "a")).status == DispatchStatus.DONE
    assert await store.log.cancel(["r"]) == 0


async def test_cancel_reaches_the_replica_once(store: Store) -> None:
    """All of one replica's cancellations come as one entry; nothing is sent to the dead."""
    for request, replica in (("r1", "a"), ("r2", "a"), ("r3", "b")):
        await store.dispatch(request, replica)
    store.bury("b")
    assert await store.log.cancel(["r1", "r2", "r3", "unknown"]) == 4
    assert [got.work for got in store.inbox("a")][2:] == [Abort(["r1", "r2"])]
    assert len(store.inbox("b")) == 1


async def test_finish_from_outside_ends_it_everywhere(store: Store, wire: Wire) -> None:
    await store.dispatch("r", "a")
    store.writer.append([entry("r", 1, 0, [1])])
    assert await store.log.finish([("r", "ignored", ERROR)]) == [True]
    assert await store.log.finish([("r", "ignored", CANCELLED)]) == [False]
    assert store.writer.append([entry("r", 1, 1, [2])]) == [AppendStatus.DONE]
    assert await store.log.read("r") == [Frame(0, [1]), ERROR]
    assert [got.work for got in store.inbox("a")][1:] == [Abort(["r"])]
    assert [decode_delivered(data) for channel, data in wire.read()][1:] == [[Delivered("r", ERROR)]]


async def test_given_up_by_whom_knows_all_its_deaths(store: Store) -> None:
    """[I8] Not by one that has missed an attempt, nor that counts a replica which is alive after all."""
    await store.dispatch("r", "a")
    assert await store.log.give_up("r", "ingress", ERROR, 1, 1) == (None, 0)
    store.bury("a")
    assert await store.log.give_up("r", "ingress", ERROR, 0, 1) == (None, 1)
    assert await store.log.give_up("r", "ingress", ERROR, 1, 2) == (None, 1)
    assert await store.log.read("r") == []
    for _ in range(2):  # again, by a successor
        assert await store.log.give_up("r", "ingress", ERROR, 1, 1) == (EventKind.GIVEN_UP, 1)
    assert await store.log.read("r") == [ERROR]
    assert (await store.dispatch("r", "b")).status == DispatchStatus.GIVEN_UP
    assert [event.kind for event in await store.log.states({"r": 1})] == [EventKind.GIVEN_UP]


async def test_what_ended_otherwise_is_not_given_up(store: Store) -> None:
    await store.dispatch("r", "a")
    store.writer.append([entry("r", 1, 0, [1], Finish.STOP)])
    assert await store.log.give_up("r", "ingress", ERROR, 1, 0) == (EventKind.DONE, 0)


async def test_finish_of_the_never_dispatched_reaches_its_reader(store: Store, wire: Wire) -> None:
    assert await store.log.finish([("r", "ingress", ERROR)]) == [True]
    assert [(channel, decode_delivered(data)) for channel, data in wire.read()] == [
        ("ingress", [Delivered("r", ERROR)])
    ]


async def test_state_of_a_lost_request_is_gone(store: Store) -> None:
    await store.dispatch("r", "a")
    store.blocking.delete(store.key("req:r"), store.key("tok:r"))
    assert await store.log.states({"r": 1}) == [Event("r", EventKind.GONE)]


async def test_a_replica_given_to_one_request_alone_takes_no_other(store: Store) -> None:
    """[I8] Until it has got on well; the replica is free for everybody then."""
    assert (await store.dispatch("suspect", "a", alone=True, probation=2)).status is OK
    assert (await store.dispatch("other", "a")).status is DispatchStatus.NO_REPLICA
    assert (await store.dispatch("other", "b")).status is OK
    store.blocking.hset(store.key("req:suspect"), "probation", 2)  # as for a request with deaths behind it
    writer = TokenWriter(store.blocking, store.settings, "a")
    assert writer.append([entry("suspect", 1, 0, [1])]) == [AppendStatus.OK]
    assert (await store.dispatch("third", "a")).status is DispatchStatus.NO_REPLICA
    assert writer.append([entry("suspect", 1, 1, [2])]) == [AppendStatus.OK]
    assert (await store.dispatch("third", "a")).status is OK
    writer.close()
