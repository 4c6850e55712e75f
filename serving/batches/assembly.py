"""Output and error file of a batch, from its segments.

In order of completion, segments follow one another as they are. In order of the input they are read by their lowest
line, and rows wait in a heap until no later segment can hold a lower one: little waits, as lines run about in order.
"""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import NamedTuple

from penstock.queue.errors import PermanentError
from penstock.queue.logs import get_logger
from penstock.queue.records import now_ms
from penstock.serving.batches.model import Batch
from penstock.serving.batches.store import Segment
from penstock.serving.files.catalog import FileCatalog, FileMeta
from penstock.serving.files.objects import ObjectMissing, ObjectStore, Writer

KINDS = {b"o": "output", b"e": "error"}
log = get_logger()


class SegmentLost(PermanentError):
    """A committed segment is not in the file store any more."""

    code = "results_lost"


class Row(NamedTuple):
    """One line of a segment; sorts by its place in the input."""

    at: int
    kind: bytes
    line: bytes


async def assemble(
    batch: Batch, segments: list[Segment], catalog: FileCatalog, *, whole: bool = True
) -> dict[str, str]:
    """Write the files; returns the fields that name those with anything in them. Doing it again changes nothing.

    Raises:
        SegmentLost: a segment is missing, and the files are to be ``whole``.
    """
    reader = _Reader(catalog.objects, whole)
    ids = {kind: batch.spec.output_id(kind) for kind in KINDS.values()}
    sizes = dict.fromkeys(ids, 0)
    async with AsyncExitStack() as stack:
        writers: dict[str, Writer] = {}
        rows = _in_order(segments, reader) if batch.spec.ordered else _rows(segments, reader)
        async for _, letter, line in rows:
            kind = KINDS[letter]
            if kind not in writers:
                writers[kind] = await stack.enter_async_context(catalog.objects.create(ids[kind]))
            await writers[kind].write(line + b"\n")
            sizes[kind] += len(line) + 1
        for writer in writers.values():
            await writer.commit()
    for kind in writers:
        await catalog.add(_describe(batch, kind, sizes[kind]))
    return {f"{kind}_file_id": ids[kind] for kind in writers}


class _Reader(NamedTuple):
    """Reads segments; one that is missing has no rows, unless all of them are wanted."""

    objects: ObjectStore
    whole: bool

    async def rows(self, segment: Segment) -> list[Row]:
        try:
            return _parse(await self.objects.get(segment.name))
        except ObjectMissing as error:
            if self.whole:
                raise SegmentLost(f"{segment.lines} finished lines are no longer in the file store") from error
            log.error("segment_lost", object=segment.name, lines=segment.lines)
            return []


async def _rows(segments: list[Segment], reader: _Reader) -> AsyncIterator[Row]:
    for segment in segments:
        for row in await reader.rows(segment):
            yield row


async def _in_order(segments: list[Segment], reader: _Reader) -> AsyncIterator[Row]:
    waiting: list[Row] = []
    for segment in sorted(segments, key=lambda each: each.first):
        while waiting and waiting[0].at < segment.first:
            yield heapq.heappop(waiting)
        for row in await reader.rows(segment):
            heapq.heappush(waiting, row)
    while waiting:
        yield heapq.heappop(waiting)


def _parse(data: bytes) -> list[Row]:
    split = (line.split(b" ", 2) for line in data.removesuffix(b"\n").split(b"\n"))
    return [Row(int(index), kind, line) for index, kind, line in split]


def _describe(batch: Batch, kind: str, size: int) -> FileMeta:
    now = now_ms()
    return FileMeta(
        id=batch.spec.output_id(kind),
        tenant=batch.spec.tenant,
        filename=f"{batch.spec.id}_{kind}.jsonl",
        purpose="batch_output",
        size=size,
        created_ms=now,
        expires_ms=now + batch.spec.output_expires_after_s * 1000,
    )
