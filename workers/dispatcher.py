"""The dispatcher: from the queue to the engines and back.

Pulls no more than the engines have room for, gives each request the next attempt and a replica, and finishes it in the
queue once its end is in the token log. It holds no state that a successor could not rebuild from queue and token log.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

import redis.asyncio
import structlog

from penstock.queue.backlog import write_backlog
from penstock.queue.errors import (
    DeadlineExceeded,
    EngineFailed,
    PenstockError,
    StoreUnavailable,
    StreamInterrupted,
    TransientError,
)
from penstock.queue.mailbox import Mailbox
from penstock.queue.messages import TERMINAL, Event, EventKind, Finish, Frame, StreamError, decode_events
from penstock.queue.protocol import Budget, Delivery, RequestQueue
from penstock.queue.records import now_ms
from penstock.queue.registry import Registry
from penstock.queue.settings import RedisSettings
from penstock.queue.token_log import DispatchStatus, RequestLog, emitted_tokens
from penstock.workers.errand import Errand
from penstock.workers.routing import Router
from penstock.workers.sampling import continuable
from penstock.workers.settings import WorkerSettings

MAX_BATCH = 128
"""Requests in one pull: one script call for them takes about a millisecond."""
REFRESH_S = 0.25
"""How often leases and deadlines are looked at; an eighth of a lease."""
REPORT_S = 1.0
"""How often the backlog is published; admission is a safety net, and the autoscaler thinks in tens of seconds."""
OUTAGE_PAUSE_S = 0.2
"""Pause before a loop that met an unavailable broker or Redis tries again."""

INTERRUPTED = (
    "the engine died after {} tokens and this request's sampling parameters do not allow continuing exactly; "
    "send it again"
)

log = structlog.get_logger()


class Dispatcher:
    """Moves requests of one pool. :meth:`run` until cancelled."""

    def __init__(
        self, queue: RequestQueue, client: redis.asyncio.Redis, settings: RedisSettings, workers: WorkerSettings, pool: str
    ) -> None:
        self._queue = queue
        self._client = client
        self._settings = settings
        self._log = RequestLog(client, settings)
        self._registry = Registry(client, settings)
        self._mailbox = Mailbox(client, settings, f"dispatcher:{uuid.uuid4().hex}")
        self._workers = workers
        self._pool = pool
        self._router = Router(workers)
        self._errands: dict[str, Errand] = {}
        self._waiting: list[Errand] = []
        self._uncompleted: list[Errand] = []
        self._room = asyncio.Event()
        self._retry = asyncio.Event()

    async def run(self) -> None:
        """Dispatch for ever; an unexpected error ends it (and with it the process)."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            tasks.create_task(self._watch())
            tasks.create_task(self._pull())
            tasks.create_task(self._place_waiting())
            tasks.create_task(self._report())

    # -- queue to engines

    async def _pull(self) -> None:
        """New work, as much as there is room for; none while older work still waits for a replica."""
        while True:
            self._room.clear()
            requests, tokens = (0, 0) if self._waiting else self._router.room()
            if requests <= 0:
                await self._room.wait()
                continue
            try:
                deliveries = await self._queue.pull(Budget(min(requests, MAX_BATCH), max(1, tokens)))
                await self._dispatch([self._admit(delivery) for delivery in deliveries])
            except TransientError as error:
                log.warning("dispatch_paused", error=str(error))
                await asyncio.sleep(OUTAGE_PAUSE_S)

    async def _place_waiting(self) -> None:
        """Work that found no room, or lost its replica, as soon as there may be room."""
        while True:
            await self._retry.wait()
            self._retry.clear()
            waiting, self._waiting = sorted(self._waiting, key=Errand.urgency), []
            try:
                await self._dispatch(waiting)
            except TransientError as error:
                log.warning("dispatch_paused", error=str(error))
                await asyncio.sleep(OUTAGE_PAUSE_S)
            self._room.set()

    def _admit(self, delivery: Delivery) -> Errand:
        errand = Errand(delivery)
        self._errands[errand.id] = errand
        return errand

    async def _dispatch(self, errands: Sequence[Errand]) -> None:
        """Place what can be placed, in one script call; the rest waits."""
        placed = [errand for errand in errands if not errand.ended and self._router.place(errand)]
        self._waiting += [errand for errand in errands if not errand.ended and not errand.target]
        if not placed:
            return
        try:
            answers = await self._log.dispatch(self._mailbox.channel, [errand.dispatch() for errand in placed])
        except StoreUnavailable:
            for errand in placed:
                self._wait(errand)
            raise
        for errand, answer in zip(placed, answers, strict=True):
            errand.attempt = max(errand.attempt, answer.attempt)
            if answer.status is DispatchStatus.ADOPTED:
                self._router.adopt(errand, answer.replica)
            elif answer.status is not DispatchStatus.OK:
                await self._refused(errand, answer.status)

    async def _refused(self, errand: Errand, status: DispatchStatus) -> None:
        if status is DispatchStatus.DONE:
            await self._complete([errand])
        elif status is DispatchStatus.CANCELLED:
            await self._end(errand, Frame(TERMINAL, [], finish=Finish.ABORT))
        elif status is DispatchStatus.EMITTED:
            await self._go_on(errand)
        else:
            self._router.forget(errand.target)
            self._wait(errand)

    async def _go_on(self, errand: Errand) -> None:
        """Tokens were delivered by an engine that is gone: the next one continues after them."""
        errand.emitted = emitted_tokens(await self._log.read(errand.id))
        errand.force = True
        if continuable(errand.record.sampling):
            self._router.give_back(errand)
            await self._dispatch([errand])
        else:
            await self._fail(errand, StreamInterrupted(INTERRUPTED.format(len(errand.emitted))))

    def _wait(self, errand: Errand) -> None:
        self._router.give_back(errand)
        self._waiting.append(errand)
        self._retry.set()

    # -- back from the engines

    async def _follow(self) -> None:
        async for payload in self._mailbox.messages():
            try:
                await self._handle(decode_events(payload) if payload is not None else await self._missed())
            except TransientError as error:
                log.warning("completion_delayed", error=str(error))

    async def _missed(self) -> list[Event]:
        """What happened to our requests while the mailbox was not connected."""
        ids = list(self._errands)
        states = await self._log.states(ids) if ids else []
        return [Event(id_, state) for id_, state in zip(ids, states, strict=True) if state is not None]

    async def _handle(self, events: list[Event]) -> None:
        done = []
        for event in events:
            errand = self._errands.get(event.id)
            if errand is None:
                continue
            if event.kind is EventKind.DONE:
                done.append(errand)
            elif event.kind is EventKind.PREFILLED:
                self._router.prefilled(errand)
            else:
                await self._again(errand, "the decode replica was gone at the hand-over")
        if done:
            await self._complete(done)
        self._wake()

    async def _again(self, errand: Errand, why: str) -> None:
        log.warning("redispatch", request_id=errand.id, attempt=errand.attempt, why=why)
        errand.force = True
        if errand.attempt >= self._workers.max_attempts:
            await self._give_up(errand)
        else:
            self._wait(errand)

    # -- leases and deadlines

    async def _watch(self) -> None:
        while True:
            try:
                await self._refresh()
            except TransientError as error:
                log.warning("refresh_failed", error=str(error))
            await asyncio.sleep(REFRESH_S)

    async def _report(self) -> None:
        """Publish the backlog for admission and autoscaling."""
        while True:
            try:
                await write_backlog(self._client, self._settings, self._pool, await self._queue.depth())
            except TransientError as error:
                log.warning("backlog_not_reported", error=str(error))
            await asyncio.sleep(REPORT_S)

    async def _refresh(self) -> None:
        alive = [replica for replica in (await self._registry.alive()).values() if replica.pool == self._pool]
        for replica_id in self._router.refresh(alive):
            for errand in [e for e in self._errands.values() if e.runs_on(replica_id)]:
                await self._again(errand, f"replica {replica_id} died")
        now = now_ms()
        for errand in [e for e in self._errands.values() if e.record.expired(now)]:
            await self._fail(errand, DeadlineExceeded("the request's deadline passed before it finished"))
        await self._complete(self._uncompleted)
        self._wake()

    def _wake(self) -> None:
        """There may be room now."""
        self._room.set()
        if self._waiting:
            self._retry.set()

    # -- ends

    async def _give_up(self, errand: Errand) -> None:
        error = EngineFailed(f"{errand.attempt} replicas died while running this request")
        await self._log.finish([(errand.id, errand.record.reply_to, _frame(error))])
        await self._queue.dead_letter(errand.delivery, str(error))
        self._forget(errand)

    async def _fail(self, errand: Errand, error: PenstockError) -> None:
        log.warning("request_failed", request_id=errand.id, code=error.code, error=str(error))
        await self._end(errand, _frame(error))

    async def _end(self, errand: Errand, frame: Frame) -> None:
        await self._log.finish([(errand.id, errand.record.reply_to, frame)])
        await self._complete([errand])

    async def _complete(self, errands: Sequence[Errand]) -> None:
        """Finish in the queue what has its end in the log. If the broker is away, later."""
        for errand in errands:
            self._forget(errand)
        try:
            await self._queue.complete([errand.delivery for errand in errands])
            self._uncompleted = [errand for errand in self._uncompleted if errand not in errands]
        except TransientError as error:
            log.warning("completion_delayed", error=str(error), requests=len(errands))
            self._uncompleted += [errand for errand in errands if errand not in self._uncompleted]

    def _forget(self, errand: Errand) -> None:
        errand.ended = True
        self._errands.pop(errand.id, None)
        self._router.give_back(errand)
        self._wake()


def _frame(error: PenstockError) -> Frame:
    wire = StreamError(error.code, str(error), error.status, retryable=isinstance(error, TransientError))
    return Frame(TERMINAL, [], finish=Finish.ERROR, error=wire)
