"""Finished lines on their way to the file store: collected, written as immutable segments, then committed.

A segment is an object nobody knows of until its commit is in the batch's list: a coordinator that dies in between
leaves an object that is removed with the batch, and lines whose answers are still in the token log. Rows of a segment
are ``index kind json``; ``kind`` is ``o`` (output) or ``e`` (error).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from contextlib import suppress

import msgspec
from prometheus_client import Counter

from penstock.queue.errors import TransientError
from penstock.queue.logs import get_logger
from penstock.serving.batches.answers import Answer
from penstock.serving.batches.model import Counters
from penstock.serving.batches.store import BatchStore, Committed, Segment
from penstock.serving.files.objects import ObjectStore, StorageFull

SEGMENT_LINES = 500
"""Lines of a segment: few enough for a commit of a millisecond, many enough that a million lines make 2,000 objects."""
SEGMENT_BYTES = 4 * 1024 * 1024
FLUSH_S = 1.0
"""How long a finished line may wait for others at first: what a watcher sees, and what a kill costs to read again."""
FLUSHES = 60
SLOWEST_FLUSH = 10
"""After each so many commits it may wait a second longer, up to ten: a slow batch of a week leaves 60,000 segments."""
ROOM = 4
"""Segments' worth of rows that may wait while the store is slow; then no new lines are begun."""
MOST_HELD_LINES = (ROOM + 1) * SEGMENT_LINES
"""Finished lines that are not committed when another one is begun: those that wait, and the segment on its way."""
RETRY_S = 1.0
"""Between tries while Redis or the file store is away or full."""
LINES = Counter("penstock_batch_lines_total", "Finished lines of batches, committed by this ingress.", ["outcome"])
log = get_logger()


def folder_of(batch_id: str) -> str:
    """Where a batch's segments are."""
    return f"segments/{batch_id}"


class Results:
    """The finished lines of one batch, as far as this coordinator knows."""

    def __init__(self, batch_id: str, owner: str, store: BatchStore, objects: ObjectStore) -> None:
        self._batch_id = batch_id
        self._owner = owner
        self._store = store
        self._objects = objects
        self._rows: list[Answer] = []
        self._bytes = 0
        self._commits = 0
        self._sealed: tuple[Committed, bytes] | None = None
        self._ready = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._turn = asyncio.Lock()

    def add(self, answer: Answer) -> None:
        """A line is finished."""
        self._rows.append(answer)
        self._bytes += len(answer.row)
        self._signal()

    async def room(self) -> None:
        """Wait while too many rows are not committed yet."""
        await self._room.wait()

    async def keep_committing(self) -> None:
        """Commit for ever: full segments at once, others in time. Raises :class:`LeaseLost`."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_S * min(1 + self._commits // FLUSHES, SLOWEST_FLUSH)):
                    await self._ready.wait()
            await self.commit()

    async def commit(self) -> None:
        """Commit every row added so far. Waits while a store is away; raises :class:`LeaseLost`."""
        async with self._turn:
            while self._sealed is not None or self._rows:
                await self._commit_segment()

    async def _commit_segment(self) -> None:
        if self._sealed is None:
            self._sealed = self._seal()
        committed, data = self._sealed
        while True:
            try:
                await self._objects.put(committed.segment.name, data)
                await self._store.commit(self._batch_id, self._owner, committed)
                break
            except (TransientError, StorageFull) as error:
                log.warning("commit_waits", batch_id=self._batch_id, error=str(error))
                await asyncio.sleep(RETRY_S)
        self._sealed = None
        self._commits += 1
        for name in ("completed", "failed"):
            LINES.labels(name).inc(getattr(committed.counters, name))

    def _seal(self) -> tuple[Committed, bytes]:
        rows, self._rows = self._rows[:SEGMENT_LINES], self._rows[SEGMENT_LINES:]
        self._bytes = sum(len(answer.row) for answer in self._rows)
        self._signal()
        rows.sort()
        data = b"".join(b"%d %c %s\n" % (a.at, ord(a.kind[0]), a.row) for a in rows)
        indexes = [answer.at for answer in rows]
        name = f"{folder_of(self._batch_id)}/{uuid.uuid4().hex}"
        segment = Segment(name, len(rows), indexes[0], indexes[-1])
        records = [record_id for answer in rows for record_id in answer.records]
        return Committed(segment, indexes, _sum([answer.counters for answer in rows]), records), data

    def _signal(self) -> None:
        _set(self._ready, self._full(1))
        _set(self._room, not self._full(ROOM))

    def _full(self, times: int) -> bool:
        return len(self._rows) >= SEGMENT_LINES * times or self._bytes >= SEGMENT_BYTES * times


def _set(event: asyncio.Event, on: bool) -> None:
    if on:
        event.set()
    else:
        event.clear()


def _sum(counters: Sequence[Counters]) -> Counters:
    return Counters(**{name: sum(getattr(c, name) for c in counters) for name in msgspec.structs.asdict(Counters())})
