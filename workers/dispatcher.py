"""The dispatcher: from the queue to the engines and back.

Pulls no more than the engines have room for, gives each request the next attempt and a replica, and finishes it in the
queue once its end is in the token log. It holds no state that a successor could not rebuild from queue and token log.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Collection, Sequence

import redis.asyncio
import structlog

from penstock.queue.backlog import write_backlog
from penstock.queue.errors import (
    StoreUnavailable,
    StreamInterrupted,
    TransientError,
)
from penstock.queue.mailbox import Mailbox
from penstock.queue.messages import Event, EventKind, Stage, decode_events
from penstock.queue.pauses import jittered
from penstock.queue.protocol import RequestQueue
from penstock.queue.registry import LEASE_S, Registry
from penstock.queue.settings import RedisSettings
from penstock.queue.token_log import Dispatched, DispatchStatus, RequestLog, emitted_tokens
from penstock.workers.books import Books
from penstock.workers.endings import Endings
from penstock.workers.errand import Errand
from penstock.workers.pull import OUTAGE_PAUSE_S
from penstock.workers.routing import Router
from penstock.workers.settings import WorkerSettings

REFRESH_S = 0.25
"""How often leases and deadlines are looked at; an eighth of a lease."""
RECONCILE_EVERY = 40
"""Every so many refreshes (ten seconds) all requests are compared with Redis, so that no lost message can hold one for
ever; one short read a request."""
REPORT_S = 1.0
"""How often the backlog is published; admission is a safety net, and the autoscaler thinks in tens of seconds."""
SUSPECTS = 4
"""So many requests at most are run alone after one death: each has a replica to itself for some 16 steps."""
AMNESTY_S = LEASE_S
"""After Redis was away all leases have run out. Nobody is taken for dead before they could be renewed."""

TRUNCATED = "the token log was lost while the request ran; send it again"

log = structlog.get_logger()


class Dispatcher:
    """Moves requests of one pool. :meth:`run` until cancelled."""

    def __init__(
        self,
        queue: RequestQueue,
        client: redis.asyncio.Redis,
        settings: RedisSettings,
        workers: WorkerSettings,
        pool: str,
    ) -> None:
        self._queue = queue
        self._client = client
        self._settings = settings
        self._log = RequestLog(client, settings)
        self._registry = Registry(client, settings)
        self._mailbox = Mailbox(client, settings, f"dispatcher:{uuid.uuid4().hex}")
        self._pool = pool
        self._router = Router(workers)
        self._books = Books(queue, self._router)
        self._endings = Endings(queue, self._log, self._books, workers.max_attempts)
        self._judging_from = 0.0
        self._in_doubt = False

    async def run(self) -> None:
        """Dispatch for ever; an unexpected error ends it (and with it the process)."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            tasks.create_task(self._watch())
            tasks.create_task(self._books.puller.run())
            tasks.create_task(self._place_waiting())
            tasks.create_task(self._report())

    # -- queue to engines

    async def _place_waiting(self) -> None:
        """New work, and work that found no room or lost its replica, as soon as there may be room."""
        while True:
            await self._books.placeable.wait()
            self._books.placeable.clear()
            try:
                await self._endings.expire(list(self._books.waiting.values()))
                await self._endings.condemn(list(self._books.waiting.values()))
                placed = self._books.place()
                self._books.puller.look()
                await self._dispatch(placed)
            except TransientError as error:
                self._delayed("dispatch_paused", error)
                await asyncio.sleep(jittered(OUTAGE_PAUSE_S))
                self._books.placeable.set()

    async def _dispatch(self, placed: Sequence[Errand]) -> None:
        """Give what was placed to the replicas, in one script call."""
        if not placed:
            return
        try:
            answers = await self._log.dispatch(self._mailbox.channel, [errand.dispatch() for errand in placed])
        except StoreUnavailable:
            for errand in placed:
                self._books.wait(errand)
            raise
        for errand, answer in zip(placed, answers, strict=True):
            errand.attempt = max(errand.attempt, answer.attempt)
            if not errand.ended and errand.id not in self._books.waiting:
                await self._answered(errand, answer)

    async def _answered(self, errand: Errand, answer: Dispatched) -> None:
        if answer.status is DispatchStatus.OK:
            errand.force = False
        elif answer.status is DispatchStatus.ADOPTED:
            errand.deaths = answer.deaths
            self._router.move(errand, answer.replica)
        else:
            try:
                await self._refused(errand, answer)
            except TransientError as error:
                self._delayed("dispatch_retried", error, request_id=errand.id)
                self._books.wait(errand)

    async def _refused(self, errand: Errand, answer: Dispatched) -> None:
        if answer.status is DispatchStatus.DONE:
            await self._endings.complete([errand])
        elif answer.status is DispatchStatus.GIVEN_UP:
            await self._endings.bury([errand])
        elif answer.status is DispatchStatus.CANCELLED:
            await self._endings.abort(errand)
        elif answer.status is DispatchStatus.EMITTED:
            await self._go_on(errand, answer)
        else:
            self._router.close(errand.target)
            self._books.wait(errand)

    async def _go_on(self, errand: Errand, answer: Dispatched) -> None:
        """It ran before: the next engine goes on after what was delivered, knowing what happened to the last."""
        errand.emitted = emitted_tokens(await self._log.read(errand.id))
        if answer.deaths != errand.deaths:
            errand.suspect(answer.deaths)
        if len(errand.emitted) != answer.next:
            await self._endings.fail(errand, StreamInterrupted(TRUNCATED))
        else:
            self._books.wait(errand)

    # -- back from the engines

    async def _follow(self) -> None:
        async for payload in self._mailbox.messages():
            try:
                await self._handle(decode_events(payload) if payload is not None else await self._reconnected())
            except TransientError as error:
                self._delayed("event_delayed", error)

    async def _reconnected(self) -> list[Event]:
        self._redis_was_away()
        return await self._missed()

    def _redis_was_away(self) -> None:
        self._judging_from = time.monotonic() + AMNESTY_S
        self._in_doubt = True

    def _delayed(self, event: str, error: TransientError, **about: str) -> None:
        """Something is to be tried again. A Redis that did not answer us may have refused heartbeats as well."""
        if isinstance(error, StoreUnavailable):
            self._redis_was_away()
        log.warning(event, error=str(error), **about)

    @property
    def _judging(self) -> bool:
        """Whether what Redis does not know is gone; not while replicas may still have to tell it again."""
        return time.monotonic() >= self._judging_from

    async def _missed(self) -> list[Event]:
        """Where our dispatched requests stand, whatever messages were lost, and whatever Redis lost."""
        attempts = {errand.id: errand.attempt for errand in self._books.errands.values() if errand.attempt}
        return await self._log.states(attempts) if attempts else []

    async def _handle(self, events: list[Event]) -> None:
        known = [(errand, event) for event in events if (errand := self._books.errands.get(event.id)) is not None]
        done = [errand for errand, event in known if event.kind is EventKind.DONE]
        await self._endings.complete(await self._ended(done))
        await self._endings.bury([errand for errand, event in known if event.kind is EventKind.GIVEN_UP])
        for errand, event in known:
            if not errand.ended and errand.target:
                self._moved(errand, event)
        self._books.look()

    async def _ended(self, errands: list[Errand]) -> list[Errand]:
        """Those whose end stands. One that was delivered again may have been taken back after a cancellation: then
        what was delivered again is to be run."""
        again = {errand.id: errand.attempt for errand in errands if len(errand.deliveries) > 1}
        if not again:
            return errands
        done = {event.id for event in await self._log.states(again) if event.kind is EventKind.DONE}
        for errand in errands:
            if errand.id in again.keys() - done and not errand.ended:
                self._again(errand, "its end was taken back")
        return [errand for errand in errands if errand.id not in again.keys() - done]

    def _moved(self, errand: Errand, event: Event) -> None:
        """It did not end, but may no longer be where it was. What an older attempt says is void."""
        if event.kind is EventKind.GONE:
            if self._judging:
                self._again(errand, "Redis has lost its state")
        elif event.attempt < errand.attempt:
            return
        elif event.kind is EventKind.PREFILLED:
            source = errand.target if errand.stage is Stage.PREFILL else ""
            if errand.target != event.replica:
                self._router.move(errand, event.replica)
                errand.source = source
        elif event.kind is EventKind.LOADED:
            errand.source = ""
        elif event.kind is EventKind.CLEARED:
            errand.clear()
            self._router.clear(errand)
        elif event.kind is EventKind.LOST:
            self._router.close(errand.decode)
            self._again(errand, "nobody has it")
        elif event.kind is EventKind.FAILED:
            errand.avoid |= {errand.target}
            self._again(errand, f"{errand.target} failed on it", deaths=1)

    def _again(self, errand: Errand, why: str, deaths: int = 0) -> None:
        """Dispatch it anew. Only what a replica may have died or failed of counts against a request."""
        log.warning("redispatch", request_id=errand.id, attempt=errand.attempt, deaths=errand.deaths + deaths, why=why)
        if deaths:
            errand.suspect(errand.deaths + deaths)
        self._books.wait(errand)

    # -- leases and deadlines

    async def _watch(self) -> None:
        turn = 0
        while True:
            try:
                await self._refresh()
                turn += 1
                if turn % RECONCILE_EVERY == 0 or (self._in_doubt and self._judging):
                    self._in_doubt = False
                    await self._handle(await self._missed())
            except TransientError as error:
                self._delayed("refresh_failed", error)
            await asyncio.sleep(REFRESH_S)

    async def _report(self) -> None:
        """Publish the backlog for admission and autoscaling; end a process whose queue client hangs."""
        while True:
            if not self._queue.healthy:
                raise RuntimeError("the queue's client hangs")
            try:
                await write_backlog(self._client, self._settings, self._pool, await self._queue.depth())
            except TransientError as error:
                self._delayed("backlog_not_reported", error)
            await asyncio.sleep(REPORT_S)

    async def _refresh(self) -> None:
        alive = await self._registry.alive()
        ours = [replica for replica in alive.values() if replica.pool == self._pool]
        self._router.refresh(ours, keep=not self._judging)
        await self._leave_the_gone()
        await self._endings.expire(list(self._books.errands.values()))
        await self._endings.complete_late()
        self._books.look()

    async def _leave_the_gone(self) -> None:
        gone = {errand: id_ for errand in self._books.errands.values() if (id_ := self._router.dead(errand))}
        if not gone:
            return
        departed = await self._registry.departed(sorted(set(gone.values())))
        died = {errand for errand, id_ in gone.items() if id_ == errand.target and id_ not in departed}
        await self._find_suspects(died)
        for errand, replica_id in gone.items():
            if errand.ended or self._router.dead(errand) != replica_id:
                continue
            # not there: its prefill replica computes for nobody, or its decode replica waits for it
            errand.force = replica_id != errand.target
            why = "died" if errand in died else "is gone"
            self._again(errand, f"replica {replica_id} {why}", deaths=int(errand in died))

    async def _find_suspects(self, died: Collection[Errand]) -> None:
        """What kills an engine does so at its first steps. Where few had just begun, it was one of them, if any; where
        many had, a machine died more likely than not, and to run them one by one would take too long."""
        positions = await self._log.positions([errand.id for errand in died])
        fresh = {errand for errand in died if not errand.got_far(positions[errand.id])}
        for errand in died:
            errand.stuck = errand in fresh and len(fresh) <= SUSPECTS
