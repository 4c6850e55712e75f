"""The request queue on Redis Streams: the embedded default (Redis 6.2 and later).

One stream per class, ``{ns}requests:{pool}:{class}``, read by one consumer group; a finished entry is deleted, so the
streams hold exactly the unfinished work. Every operation is one script call. A consumer renews a lease; entries of a
consumer whose lease has run out are adopted by the others (never by idle time: requests run for minutes).

"Acknowledged" means what the server's operator configured. Needed: ``appendonly yes`` with ``appendfsync everysec``
(a power failure may take the last second; ``always`` takes nothing) and ``maxmemory-policy noeviction``; with
replicas, ``min-replicas-to-write 1``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection, Coroutine, Sequence
from typing import Any

from penstock.queue.dead_letters import DeadLetter
from penstock.queue.errors import QueueUnavailable
from penstock.queue.intake import Entry, Intake
from penstock.queue.payloads import RecordCodec, answering, connect_once
from penstock.queue.protocol import Budget, Delivery, Depth
from penstock.queue.records import PriorityClass, Record, new_request_id
from penstock.queue.redis_client import COMMAND_TIMEOUT_S
from penstock.queue.scripts import script
from penstock.queue.settings import QueueSettings, RedisSettings
from penstock.queue.unreadable import Unreadable

GROUP = "penstock"
LEASE_S = 1.6
"""A dead consumer's requests move on after this time and one look, two seconds in all. They also move on when its event
loop stands still for so long, which costs a look into the token log each: what a live replica runs is left to it."""
HEARTBEAT_S = 0.4
"""Three late heartbeats in a row cost nothing."""
ADOPT_EVERY_S = 0.4
"""How often a consumer looks for entries of dead ones; small beside :data:`LEASE_S`, and the look is one cheap call."""
BLOCK_S = 0.4
"""How long a blocking read waits before the consumer looks for dead ones again."""
PUBLISH_BATCH = 64
"""Records that share a round trip when many are published at once; bounds how long the server is kept busy."""


class RedisStreamsQueue:
    """:class:`~penstock.queue.protocol.RequestQueue` of one pool on Redis Streams."""

    def __init__(self, queue: QueueSettings, redis_settings: RedisSettings, pool: str) -> None:
        prefix = f"{redis_settings.namespace}requests:{pool}:"
        self._client = connect_once(redis_settings)
        self._blocking_client = connect_once(redis_settings)
        self._codec = RecordCodec(self._client, redis_settings, queue.max_record_bytes)
        self._intake = Intake(self._codec, Unreadable(self._client, redis_settings))
        self._streams = [prefix + cls for cls in PriorityClass]
        self._counters = prefix + "tokens"
        self._dead = f"{redis_settings.namespace}dead:{pool}"
        self._consumer = new_request_id()
        self._leases = f"{redis_settings.namespace}consumer:{pool}:"
        self._publish = self._client.register_script(script("queue_publish"))
        self._pull = self._client.register_script(script("queue_pull"))
        self._settle = self._client.register_script(script("queue_settle"))
        self._depth = self._client.register_script(script("queue_depth"))
        self._forgotten = self._client.register_script(script("queue_forgotten"))
        self._enter = self._client.register_script(script("queue_join"))
        self._leave = self._client.register_script(script("queue_leave"))
        self._outbox: list[tuple[int, int, bytes, asyncio.Future[None]]] = []
        self._flusher: asyncio.Task[None] | None = None
        self._heartbeat: asyncio.Task[None] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._next_adoption = 0.0
        self._closed = False

    async def publish(self, record: Record) -> None:
        """Append; records published meanwhile share the next round trip."""
        data = await self._codec.encode(record)
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._outbox.append((record.priority_class.rank, record.num_tokens, data, stored))
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush())
        await stored

    async def pull(self, budget: Budget) -> list[Delivery]:
        """Take what fits; one round trip when work is there, and none after the wake-up when it is not."""
        await self._join()
        await _finish(self._read(budget))
        while not (deliveries := await self._intake.take(budget, self._bury)):
            await self._arrival()
            if not self._intake.offers(budget):
                await _finish(self._read(budget))
        return deliveries

    async def complete(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge and delete, the whole batch in one round trip."""
        ours = self._intake.on_loan(deliveries)
        await self._finish_entries(self._intake.entries(ours), "")
        await self._codec.discard(delivery.record for delivery in ours)

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        """Delivered again by this consumer, or by another once this one is gone."""
        self._intake.give_back(deliveries)

    async def dead_letter(self, delivery: Delivery, reason: str) -> None:
        """Copy the entry to ``{ns}dead:{pool}`` and finish it in one transaction."""
        await self._finish_entries(self._intake.entries(self._intake.on_loan([delivery])), reason)

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """The oldest ``limit`` dead letters."""
        async with answering():
            found: Any = await self._client.xrange(self._dead, count=limit)
        return [_dead_letter(entry_id.decode(), fields) for entry_id, fields in found]

    async def drop_dead_letters(self, ids: Collection[str]) -> int:
        """Delete them from their stream."""
        async with answering():
            dropped: Any = await self._client.xdel(self._dead, *ids) if ids else 0
        return int(dropped)

    async def depth(self) -> dict[PriorityClass, Depth]:
        """Exact, read in one script call."""
        async with answering():
            rows = await self._depth(keys=[*self._streams, self._counters])
        return {
            cls: Depth(requests, tokens, age_ms / 1000)
            for cls, (requests, tokens, age_ms) in zip(PriorityClass, rows, strict=True)
        }

    async def ping(self) -> None:
        """Return when Redis answers."""
        async with answering():
            await self._client.ping()

    @property
    def healthy(self) -> bool:
        """Always: every call here has a time-out."""
        return True

    async def close(self) -> None:
        """Give up the lease; the other consumers adopt what was not finished."""
        if self._closed:
            return
        self._closed = True
        await _cancel(self._reader, self._heartbeat)
        if self._heartbeat is not None:
            with contextlib.suppress(QueueUnavailable):  # the lease runs out by itself
                await self._give_up_lease()
        await self._client.aclose()
        await self._blocking_client.aclose()

    async def _give_up_lease(self) -> None:
        async with answering():
            await self._leave(keys=[*self._streams, self._lease], args=[GROUP, self._consumer])

    @property
    def _lease(self) -> str:
        return self._leases + self._consumer

    async def _flush(self) -> None:
        while self._outbox:
            batch, self._outbox = self._outbox[:PUBLISH_BATCH], self._outbox[PUBLISH_BATCH:]
            args = [part for rank, tokens, data, _ in batch for part in (rank, tokens, data)]
            failure: QueueUnavailable | None = None
            try:
                async with answering():
                    await self._publish(keys=[*self._streams, self._counters], args=args)
            except QueueUnavailable as error:
                failure = error
            for *_, stored in batch:
                _resolve(stored, failure)

    async def _join(self) -> None:
        if self._heartbeat is None:
            await self._renew()
            self._heartbeat = self._heartbeat or asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            with contextlib.suppress(QueueUnavailable):  # the next beat may get through
                await self._renew()

    async def _renew(self) -> None:
        async with answering():
            await self._enter(keys=[*self._streams, self._lease], args=[GROUP, int(LEASE_S * 1000)])

    async def _read(self, budget: Budget) -> None:
        """Bring from the server what fits the budget beside what waits here already."""
        adopt = time.monotonic() >= self._next_adoption
        if adopt:
            await self._recall()
        limits = [number for rank, row in enumerate(self._intake.held()) for number in (*budget.bound(rank), *row)]
        args: list[str | int] = [
            GROUP,
            self._consumer,
            self._leases,
            int(adopt),
            *limits,
        ]
        async with answering():
            adopted, *rows = await self._pull(keys=self._streams, args=args)
        if adopt and not adopted:
            self._next_adoption = time.monotonic() + ADOPT_EVERY_S
        self._intake.put(self._entry(rank, entry_id, fields, count) for rank, entry_id, fields, count in rows)

    async def _recall(self) -> None:
        """Take up again what the server says is ours and we do not know of."""
        async with answering():
            rows = await self._forgotten(keys=self._streams, args=[GROUP, self._consumer, *self._intake.counts()])
        for rank, entry_id, count in rows:
            stream, name = self._streams[rank], entry_id.decode()
            if not self._intake.knows((stream, rank, name)):
                async with answering():
                    found: Any = await self._client.xrange(stream, name, name)
                self._intake.put(self._entry(rank, entry_id, fields, count + 1) for _, fields in found)

    async def _bury(self, entry: Entry, reason: str) -> None:
        await self._finish_entries([entry], reason)

    async def _arrival(self) -> None:
        """Wait until an entry arrives or is given back, or none did for a while."""
        reader = self._reader = self._reader or asyncio.create_task(self._block())
        if not reader.done():
            await self._intake.changed()
        if reader.done():
            self._reader = None
            reader.result()

    async def _block(self) -> None:
        """Wait at the server. A task of its own: a read that is cancelled half-way would lose what it was given.

        Only for classes of which nothing waits here, so that a class no budget has room for is not piled up here.
        """
        streams = [stream for stream, held in zip(self._streams, self._intake.held(), strict=True) if not held.requests]
        try:
            if not streams:
                await asyncio.sleep(BLOCK_S)
                return
            async with answering(BLOCK_S + COMMAND_TIMEOUT_S):
                reply: Any = await self._blocking_client.xreadgroup(
                    GROUP,
                    self._consumer,
                    dict.fromkeys(streams, ">"),
                    count=1,
                    block=int(BLOCK_S * 1000),
                )
            for name, rows in reply or ():
                rank = self._streams.index(name.decode())
                self._intake.put(self._entry(rank, entry_id, fields, 1) for entry_id, fields in rows)
        finally:
            self._intake.wake()

    def _entry(self, rank: int, entry_id: bytes, fields: Any, deliveries: int) -> Entry:
        values = fields if isinstance(fields, dict) else dict(zip(fields[::2], fields[1::2], strict=True))
        name = entry_id.decode()
        millis, sequence = name.split("-")
        return Entry(
            order=(rank, int(millis), int(sequence)),
            tokens=int(values.get(b"t", 0)),
            data=values.get(b"r", b""),
            position=(self._streams[rank], rank, name),
            deliveries=deliveries,
        )

    async def _finish_entries(self, entries: Sequence[Entry], reason: str) -> None:
        if not entries:
            return
        keys = [*self._streams, self._counters, self._dead]
        parts = [part for entry in entries for part in (entry.position[1], entry.position[2], entry.tokens)]
        async with answering():
            await self._settle(keys=keys, args=[GROUP, reason, *parts])
        self._intake.forget(entries)


def _dead_letter(entry_id: str, fields: dict[bytes, bytes]) -> DeadLetter:
    return DeadLetter(entry_id, fields.get(b"r", b""), fields[b"reason"].decode(), int(entry_id.split("-")[0]))


def _resolve(future: asyncio.Future[None], failure: Exception | None) -> None:
    if future.done():  # its publisher was cancelled meanwhile
        return
    if failure is None:
        future.set_result(None)
    else:
        future.set_exception(failure)


async def _finish(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end even when the caller is cancelled: what the server gave must not be lost on the way."""
    await asyncio.shield(asyncio.create_task(work))


async def _cancel(*tasks: asyncio.Task[None] | None) -> None:
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
