"""One batch from its validation to its files, by whoever holds its lease.

Every step can be begun again by another process after any instant: what is finished is in the list of segments, what
was under way is in the token log under the line's own stream id, and output files are named by the batch. When Redis
was started again in the middle of a step, the step is done again: see :mod:`penstock.serving.batches.store`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass

from penstock.queue.errors import PermanentError, TransientError
from penstock.queue.logs import get_logger
from penstock.queue.records import now_ms
from penstock.serving.batches.answers import CANCELLED, EXPIRED, unanswered
from penstock.serving.batches.assembly import assemble
from penstock.serving.batches.lines import LineSplitter, RawLine, read_envelope
from penstock.serving.batches.model import Batch, Status
from penstock.serving.batches.ordering import blocks, in_prompt_order
from penstock.serving.batches.results import (
    MOST_HELD_LINES,
    RETRY_S,
    SEGMENT_BYTES,
    SEGMENT_LINES,
    Results,
    folder_of,
)
from penstock.serving.batches.runner import Backend, LineRunner, stop_begun
from penstock.serving.batches.settings import BatchSettings
from penstock.serving.batches.shares import Shares
from penstock.serving.batches.slots import FairSlots
from penstock.serving.batches.store import LEASE_S, BatchStore, LeaseLost, encode_problems
from penstock.serving.batches.unfinishable import UNFINISHABLE, problem_of
from penstock.serving.batches.urgency import Urgency
from penstock.serving.batches.validation import problems_of
from penstock.serving.files.catalog import FileCatalog
from penstock.serving.files.objects import ObjectMissing, StorageFull
from penstock.serving.files.orphans import MARKER

RENEW_S = LEASE_S / 4
"""Three renewals may fail before the lease runs out; also how soon a cancellation is noticed."""
DURABLE_S = 3.0
"""After this time what Redis has is on its disk: it is written every second, and at most one second late."""
log = get_logger()


class StoreMissing(PermanentError):
    """This ingress does not reach the file store: another one may."""

    code = "file_store_missing"


@dataclass(frozen=True, slots=True)
class Parts:
    """What coordinators of one ingress share."""

    store: BatchStore
    catalog: FileCatalog
    backend: Backend
    slots: FairSlots
    shares: Shares
    settings: BatchSettings
    model: str


class Coordinator:
    """Works on one batch as long as ``owner`` holds its lease. :meth:`run` may be cancelled at any time."""

    def __init__(self, batch_id: str, owner: str, parts: Parts) -> None:
        self._id = batch_id
        self._owner = owner
        self._parts = parts
        self._store = parts.store
        self._cancelled = asyncio.Event()
        self._restarted = asyncio.Event()
        self._life = ""
        self._ours = False
        """Nobody has begun a line, or this coordinator alone, the only time it fed them."""
        self._fed = False
        self._runner: LineRunner | None = None

    async def run(self) -> None:
        """Return when the batch has ended. Raises :class:`LeaseLost`, perhaps in a group."""
        async with asyncio.TaskGroup() as group:
            keeper = group.create_task(self._keep())
            while await self._advance():
                continue
            keeper.cancel()
        await self._store.release(self._id, self._owner)

    async def _keep(self) -> None:
        while True:
            with suppress(TransientError):  # nobody can take the lease from a Redis that is away
                life = await self._store.renew(self._id, self._owner)
                if self._life not in ("", life):
                    self._restarted.set()
                batch = await self._store.load(self._id)
                if batch is not None and batch.status is Status.CANCELLING:
                    self._cancelled.set()
            await asyncio.sleep(RENEW_S)

    async def _advance(self) -> bool:
        """One step; False when there is nothing left to do."""
        try:
            self._cancelled.clear()
            self._restarted.clear()
            self._life = await self._store.renew(self._id, self._owner)
            batch = await self._store.load(self._id)
            return batch is not None and await self._step(batch)
        except (TransientError, StorageFull) as error:
            log.warning("batch_waits", batch_id=self._id, error=str(error))
            await asyncio.sleep(RETRY_S)
            return True

    async def _step(self, batch: Batch) -> bool:
        step = self._steps().get(batch.status)
        if step is None:
            return not await self._close(batch)
        try:
            await step(batch)
        except UNFINISHABLE as error:
            await self._fail(batch, error)
        return True

    def _steps(self) -> dict[Status, Callable[[Batch], Awaitable[None]]]:
        return {
            Status.VALIDATING: self._validate,
            Status.IN_PROGRESS: self._work,
            Status.FINALIZING: lambda batch: self._end(batch, Status.COMPLETED),
            Status.CANCELLING: lambda batch: self._give_up(batch, Status.CANCELLED, *CANCELLED),
        }

    async def _validate(self, batch: Batch) -> None:
        found, settings = await self._store.inspection(self._id), self._parts.settings
        problems = problems_of(
            found, endpoint=batch.spec.endpoint, model=self._parts.model, max_lines=settings.max_lines
        )
        if problems:
            await self._move(Status.VALIDATING, Status.FAILED, problems=encode_problems(problems))
        else:
            await self._move(Status.VALIDATING, Status.IN_PROGRESS, total=found.lines, model=found.model or "")
            self._ours = not self._fed

    async def _work(self, batch: Batch) -> None:
        """Run every line that is not finished; what finishes is committed, however this ends. The last commit is not
        interrupted by a cancellation or the end of the window: what is finished by then counts."""
        left_s = batch.spec.expires_ms / 1000 - now_ms() / 1000
        done = await self._store.done(self._id)
        results = Results(self._id, self._owner, self._store, self._parts.catalog.objects)
        runner = self._runner = self._new_runner(batch, done)
        feeding = asyncio.create_task(self._feed(batch, done, runner, results))
        watching = [asyncio.create_task(event.wait()) for event in (self._cancelled, self._restarted)]
        try:
            await asyncio.wait({feeding, *watching}, timeout=max(left_s, 0), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _stop(feeding, *watching)
            if feeding.cancelled() or not isinstance(feeding.exception(), LeaseLost):
                await results.commit()
            if self._over(batch):
                await runner.stop()
        if not feeding.cancelled():
            feeding.result()
            await self._move(Status.IN_PROGRESS, Status.FINALIZING)
        elif now_ms() >= batch.spec.expires_ms:
            await self._give_up(batch, Status.EXPIRED, *EXPIRED)

    def _new_runner(self, batch: Batch, done: bytearray) -> LineRunner:
        settings, left = self._parts.settings, batch.total - int.from_bytes(done).bit_count()
        urgency = Urgency(batch.spec, left, settings.urgent_share)
        return LineRunner(batch.spec, self._parts.backend, settings, urgency, self._fresh_from(done))

    async def _feed(self, batch: Batch, done: bytearray, runner: LineRunner, results: Results) -> None:
        """Run the lines; commit in time."""
        committing = asyncio.create_task(results.keep_committing())
        running = asyncio.create_task(self._run_lines(batch, done, runner, results))
        urging = asyncio.create_task(runner.keep_urging())
        try:
            await asyncio.wait({running, committing, urging}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _stop(running, committing, urging)
        for task in (committing, running, urging):
            if not task.cancelled() and (error := task.exception()) is not None:
                raise _root(error)

    def _fresh_from(self, done: bytearray) -> int:
        """The first line that nobody can have begun. Only who has just validated a batch knows that none was begun."""
        self._ours, self._fed = self._ours and not self._fed, True
        return 0 if self._ours else self._begun_below(done)

    def _begun_below(self, done: bytearray) -> int:
        """Beyond the last committed line there may be lines that are not committed, lines under way, and the rest of a
        first and a last block: lines are begun block by block, in any order within one."""
        settings = self._parts.settings
        return len(done) * 8 + MOST_HELD_LINES + settings.in_flight + 2 * settings.look_ahead_lines

    def _over(self, batch: Batch) -> bool:
        """Whether nobody will want the answers that are not there yet."""
        return self._cancelled.is_set() or now_ms() >= batch.spec.expires_ms

    async def _run_lines(self, batch: Batch, done: bytearray, runner: LineRunner, results: Results) -> None:
        tenant, slots, settings = batch.spec.tenant, self._parts.slots, self._parts.settings

        async def run(line: RawLine) -> None:
            results.add(await runner.run(line))

        ordered = in_prompt_order(self._lines(batch, done), settings.look_ahead_lines, settings.look_ahead_bytes)
        async with asyncio.TaskGroup() as group, aclosing(ordered):
            async for line in ordered:
                await results.room()
                await slots.acquire(tenant)
                running = group.create_task(run(line))
                running.add_done_callback(lambda _: slots.release(tenant))  # also of one cancelled before it began

    async def _lines(self, batch: Batch, done: bytearray) -> AsyncIterator[RawLine]:
        """Lines of the input that are not finished."""
        splitter = LineSplitter(sys.maxsize)  # the limit was that of the upload; it may have been lowered since
        async with aclosing(self._parts.catalog.objects.read(batch.spec.input_file_id)) as pieces:
            async for piece in pieces:
                for line in splitter.feed(piece):
                    if not is_done(done, line.at):
                        yield line
        for line in splitter.finish():
            if not is_done(done, line.at):
                yield line

    async def _give_up(self, batch: Batch, ending: Status, code: str, message: str) -> None:
        """Every line that is not finished is stopped and ends as an error of this code; then the batch ends."""
        results = Results(self._id, self._owner, self._store, self._parts.catalog.objects)
        done, backend = await self._store.done(self._id), self._parts.backend
        begun = 0 if self._ours else self._begun_below(done)
        if batch.total:  # else it never began
            async with aclosing(blocks(self._lines(batch, done), SEGMENT_LINES, SEGMENT_BYTES)) as unfinished:
                async for block in unfinished:
                    doubtful = [line for line in block if line.at < begun]
                    await stop_begun(batch.spec, backend, doubtful, self._parts.settings.max_attempts)
                    for line in block:
                        custom_id = read_envelope(line.data or b"").custom_id
                        results.add(unanswered(self._id, line.at, custom_id, code, message))
                    await results.commit()
        await self._end(batch, ending)

    async def _end(self, batch: Batch, ending: Status, *, whole: bool = True, **fields: bytes) -> None:
        files = await assemble(batch, await self._store.segments(self._id), self._parts.catalog, whole=whole)
        await self._move(batch.status, ending, **files, **fields)

    async def _fail(self, batch: Batch, error: Exception) -> None:
        """It ends with what there is, unless it is this ingress that has no file store."""
        problem = problem_of(error)
        try:
            await self._parts.catalog.objects.get(MARKER)
        except ObjectMissing:
            raise StoreMissing(f"{self._id}: there is no {MARKER} in the file store; is it mounted?") from error
        if self._runner is not None:
            await self._runner.stop()
        log.error("batch_unfinishable", batch_id=self._id, code=problem.code, error=str(error))
        await self._end(batch, Status.FAILED, whole=False, problems=encode_problems([problem]))

    async def _move(self, old: Status, new: Status, **fields: str | bytes | int) -> None:
        """Not if it was cancelled meanwhile: the next step sees that."""
        had = await self._store.transition(self._id, (old,), new, owner=self._owner, life=self._life, **fields)
        log.info("batch_status", batch_id=self._id, status=new if had is old else had)

    async def _close(self, batch: Batch) -> bool:
        """Remove what is not needed any more, once the end cannot be forgotten; False when it may have been."""
        life = self._life
        await asyncio.sleep(DURABLE_S)
        if await self._store.renew(self._id, self._owner) != life:
            return False
        await self._parts.catalog.objects.delete(folder_of(self._id))
        await self._parts.catalog.unpin(batch.spec.input_file_id, self._id)
        await self._store.close(batch.spec, self._parts.settings.retention_s)
        return True


def is_done(done: bytearray, index: int) -> bool:
    """Whether this line's bit is set, in Redis' order of bits."""
    byte = index >> 3
    return byte < len(done) and bool(done[byte] & (0x80 >> (index & 7)))


def _root(error: BaseException) -> BaseException:
    """The first cause, out of the groups it came in."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _stop(*tasks: asyncio.Task[object]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
