"""vLLM's engine client, with the queue as the engine.

vLLM's ``AsyncLLM`` renders, tokenizes, validates, detokenizes and formats;
this client takes its finished engine requests, publishes them, and feeds token frames back. Everything OpenAI-shaped
stays vLLM's own code.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec
import structlog
from vllm.tasks import SupportedTask
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
)
from vllm.v1.engine.core_client import EngineCoreClient

from penstock.queue.errors import InvalidRecord, StoreUnavailable, TransientError
from penstock.queue.mailbox import TokenReader
from penstock.queue.messages import TERMINAL, Delivered, Finish, Frame, StreamError, encode
from penstock.queue.pauses import jittered
from penstock.queue.protocol import RequestQueue
from penstock.queue.readers import Readers, Revival, Standing
from penstock.queue.records import PriorityClass, Record
from penstock.queue.settings import ModelSettings
from penstock.serving.context import Outcome, RequestContext, current
from penstock.serving.deadlines import Deadlines
from penstock.serving.durable.leaving import Leaving
from penstock.serving.errors import to_vllm_error
from penstock.serving.output_queue import OutputQueue
from penstock.serving.translation import to_record, to_vllm_output, without_cached, without_end

REVIVE_RETRY_S = 1.0
"""On average. Redis or the broker are away: the client waits, and so do we."""
REVIVALS = 3
"""How often a reader that came later takes back an ABORT: the one it found, and such as were under way when it came.
While somebody reads nothing is parked, so any other is meant."""
CANCELLED = Frame(TERMINAL, [], finish=Finish.ABORT)
"""Delivered in place of an ABORT that is final."""

log = structlog.get_logger()


class _Stream:
    """One engine request of one rendering: vLLM's id for it is unique to the rendering, the record's is not."""

    __slots__ = ("context", "output", "published", "record", "revivals", "started")

    def __init__(self, record: Record, context: RequestContext, output: OutputQueue) -> None:
        self.record = record
        self.context = context
        self.output = output
        self.published: PriorityClass | None = None
        self.revivals = REVIVALS if context.attach else 0
        self.started = time.monotonic()


class QueueClient(EngineCoreClient):  # type: ignore[misc]
    """An ``EngineCoreClient`` whose core is every engine of a pool, reached through the queue.

    A request that may have been published before is *attached to*: its log is read from the start, and it is published
    only where nothing is known of it. Publishing a record twice is harmless: it runs once.
    """

    engine_ranks_managed = (0,)
    resources = SimpleNamespace(engine_dead=False)

    def __init__(self, queue: RequestQueue, reader: TokenReader, readers: Readers, model: ModelSettings) -> None:
        self._queue = queue
        self._reader = reader
        self._readers = readers
        self._model = model
        self._batches: AsyncIterator[list[Delivered]] = reader.batches()
        self._streams: dict[str, _Stream] = {}
        self._leaving = Leaving(readers, reader.reads)
        self._deadlines = Deadlines(reader)
        self._tasks: set[asyncio.Task[None]] = set()
        self._published: list[str] = []
        self.output_of: Callable[[str], OutputQueue]
        """Where the output processor puts the outputs of a request; set by :class:`QueueLLM`."""
        self.failed: list[tuple[str, StreamError, Outcome]] = []
        self.draining = False
        """Set when this ingress is to end: clients that go away now go on elsewhere."""

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Publish or attach. Returns when the broker has acknowledged; raises (and cancels) when it has not."""
        context, local = current(), request.request_id
        record = to_record(request, context, self._model, self._reader.channel)
        stream = self._streams[local] = _Stream(record, context, self.output_of(local))
        self._reader.open(record.id, local, live=not context.attach)
        try:
            if context.saved is not None:
                await context.saved
            standing = await self._standing(record) if context.attach else Standing.UNKNOWN
            if standing in (Standing.UNKNOWN, Standing.QUEUED):
                self._deadlines.watch(local, record)
            if standing is Standing.UNKNOWN:
                await self._queue.publish(record)
                stream.published = record.priority_class
                self._note_published(record, context)
            context.outcome.accepted.set()
            if context.attach:
                self._reader.catch_up(local)
        except BaseException as error:
            self._close(local)
            stop = not context.attach or context.grace_s is not None
            self._leaving.add(record.id, 0, stop=stop)  # it may have been stored although nobody said so
            if isinstance(error, TransientError | InvalidRecord):
                context.outcome.fail(error)
                raise to_vllm_error(error) from error
            raise

    async def _standing(self, record: Record) -> Standing:
        (standing,) = await self._readers.attach([record.id])
        return standing

    def _note_published(self, record: Record, context: RequestContext) -> None:
        """Others may ask for it again while it waits in the queue: they need not publish it again."""
        if context.attach or context.grace_s is None:
            self._published.append(record.id)
            if len(self._published) == 1:
                self._start(self._note_all())

    async def _note_all(self) -> None:
        await asyncio.sleep(0)  # what is published in this turn of the loop comes along
        ids, self._published = self._published, []
        with suppress(StoreUnavailable):  # then they may be published twice, and still run once
            await self._readers.note_published(ids)

    async def urge(self, stream_ids: Collection[str], priority_class: PriorityClass) -> None:
        """Publish what the queue may hold of these in a less urgent class again in this one. Raises
        :class:`QueueUnavailable`; may be repeated."""
        for stream in list(self._streams.values()):
            accepted = stream.context.outcome.accepted.is_set()
            if accepted and stream.published is not priority_class and stream.context.request.stream_id in stream_ids:
                stream.record = msgspec.structs.replace(stream.record, priority_class=priority_class)
                await self._queue.publish(stream.record)
                stream.published = priority_class

    async def get_output_async(self) -> EngineCoreOutputs:
        """The next step's worth of tokens of all streams of this ingress, stamped with this process' clock."""
        while True:
            outputs = [out for item in await anext(self._batches) if (out := self._output(item)) is not None]
            if outputs or self.failed:
                return EngineCoreOutputs(outputs=outputs)

    def _output(self, item: Delivered) -> EngineCoreOutput | None:
        frame, stream = item.frame, self._streams.get(item.id)
        if stream is None:
            return None
        if frame.finish is Finish.ABORT and stream.revivals > 0 and frame is not CANCELLED:
            stream.revivals -= 1
            self._start(self._revive(item.id, stream, frame, self._reader.frames(item.id) - 1))
            return to_vllm_output(item.id, without_end(frame), None) if frame.tokens else None
        if frame.finish is not None:
            self._close(item.id)
        if frame.error is not None:
            self.failed.append((item.id, frame.error, stream.context.outcome))
            return None
        if stream.output.full:
            self._reader.pause(item.id)
            stream.output.call_when_low(partial(self._reader.resume, item.id))
        if frame.usage is None:
            return to_vllm_output(item.id, frame, None)
        several = stream.context.request.choices > 1
        return to_vllm_output(item.id, without_cached(frame) if several else frame, stream.started)

    async def _revive(self, local: str, stream: _Stream, frame: Frame, position: int) -> None:
        """It was parked because nobody read it, and here is a reader: let it go on. A cancellation that was asked for
        stays."""
        instead = encode(without_end(frame)) if frame.tokens else b""
        while local in self._streams:
            try:
                revival = await self._readers.revive(stream.record.id, position, instead)
                if revival is Revival.REVIVED:
                    self._deadlines.watch(local, stream.record)
                    await self._queue.publish(stream.record)
                break
            except TransientError as error:
                log.warning("revival_delayed", request_id=stream.record.id, error=str(error))
                await asyncio.sleep(jittered(REVIVE_RETRY_S))
        else:
            return
        if revival is Revival.FINAL:
            await self._reader.deliver(local, CANCELLED)
        else:
            self._reader.rewind(local)

    def drain(self) -> None:
        """This ingress is to end."""
        self.draining = True

    def leave(self, request_ids: list[str]) -> None:
        """The client of these is gone. Their generation goes on for a while: it may come back, here or elsewhere."""
        for local in request_ids:
            stream = self._streams.get(local)
            self._close(local)
            if stream is not None:
                grace = stream.context.grace_s
                stays = grace is None or self.draining
                self._leaving.add(stream.record.id, 0 if stays else grace or 0, stop=not stays)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Called for what stop strings ended: nobody reads beyond."""
        for local in request_ids:
            stream = self._streams.get(local)
            self._close(local)
            if stream is not None:
                self._leaving.add(stream.record.id, 0)

    def _close(self, local: str) -> None:
        self._reader.close(local)
        self._streams.pop(local, None)
        self._deadlines.forget(local)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def get_supported_tasks_async(self) -> tuple[SupportedTask, ...]:
        """Text generation only."""
        return ("generate",)

    async def reset_mm_cache_async(self) -> None:
        """There is no multi-modal cache to reset: such requests are refused."""

    def dp_engines_running(self) -> bool:
        """Asked by vLLM's elastic scaling only, which is not used."""
        return True

    def shutdown(self, timeout: float | None = None) -> None:
        """The queue outlives its clients; the ingress closes its connections itself."""
