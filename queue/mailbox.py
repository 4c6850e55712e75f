"""Messages pushed to one process over Redis publish/subscribe, and the token reader an ingress builds on them.

Publish/subscribe has no memory, which is why it only ever carries copies of what a key holds: after every
(re)connection the reader is told that it may have missed something and reads the keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress

import redis
import redis.asyncio
import structlog

from penstock.queue.cursor import Cursor
from penstock.queue.errors import StoreUnavailable, StreamInterrupted
from penstock.queue.messages import TERMINAL, Delivered, Finish, Frame, StreamError, decode_delivered
from penstock.queue.pauses import jittered
from penstock.queue.readers import Readers
from penstock.queue.settings import RedisSettings
from penstock.queue.token_log import RequestLog

RECONNECT_FIRST_S = 0.05
"""Redis restarts in well under a second; the first try comes early."""
RECONNECT_MAX_S = 2.0
"""Upper bound of the jittered back-off, so that a fleet of ingresses does not storm a Redis that comes back."""
PING_INTERVAL_S = 15.0
"""A half-open connection is noticed after twice this time; the kernel would take minutes."""
CHUNK = 1024
"""Frames read from a log at once: 30 KB, and a long answer does not keep others waiting."""
MAX_READING = 8
"""Logs read at the same time: after a reconnection all streams of an ingress have to."""
MAX_WAITING = 16
"""Chunks that may wait for the output processor; more stay in the log."""

log = structlog.get_logger()


class Mailbox:
    """Subscription of one process to its own channel."""

    def __init__(self, client: redis.asyncio.Redis, settings: RedisSettings, channel: str) -> None:
        self.channel = channel
        self._client = client
        self._name = settings.namespace + channel

    async def messages(self) -> AsyncGenerator[bytes | None, None]:
        """Payloads as they come; ``None`` after each (re)connection: something may have been missed before it.

        That is when Redis has confirmed the subscription: what is published from then on arrives here. The client
        also reconnects by itself, and the new confirmation is all that shows it.
        """
        delay = RECONNECT_FIRST_S
        while True:
            pubsub = self._client.pubsub()
            try:
                await pubsub.subscribe(self._name)
                async for payload in self._receive(pubsub):
                    delay = RECONNECT_FIRST_S
                    yield payload
            except (redis.ConnectionError, redis.TimeoutError):
                await asyncio.sleep(jittered(delay))
                delay = min(delay * 2, RECONNECT_MAX_S)
            finally:
                await pubsub.aclose()  # type: ignore[no-untyped-call]

    async def wake(self) -> None:
        """Have :meth:`messages` yield an empty payload soon, or ``None``."""
        with suppress(redis.ConnectionError, redis.TimeoutError):  # then the subscription is renewed anyhow
            await self._client.publish(self._name, b"")

    @staticmethod
    async def _receive(pubsub: redis.asyncio.client.PubSub) -> AsyncIterator[bytes | None]:
        pinged = False
        while True:
            message = await pubsub.get_message(timeout=PING_INTERVAL_S)
            if message is None and pinged:
                raise redis.TimeoutError("no answer to a ping")
            pinged = message is None
            if message is None:
                await pubsub.ping()
            elif message["type"] == "subscribe":
                yield None
            elif message["type"] == "message":
                yield message["data"]


class TokenReader:
    """Frames of the open streams of one ingress: for each reader each once, in order, whatever the connection does.

    A request may have several readers here, each with its own place. Frames are taken as they arrive; a reader that
    missed some, came late or was paused reads the log, in chunks, until it has caught up with what arrives.
    """

    def __init__(self, mailbox: Mailbox, log: RequestLog, readers: Readers | None = None) -> None:
        """``readers``: register this ingress again after a reconnection, for Redis may have forgotten it."""
        self.channel = mailbox.channel
        self._mailbox = mailbox
        self.log = log
        self._readers = readers
        self._cursors: dict[str, Cursor] = {}
        self._by_request: dict[str, list[Cursor]] = {}
        self._read: asyncio.Queue[list[Delivered]] = asyncio.Queue(MAX_WAITING)
        self._reading = asyncio.Semaphore(MAX_READING)
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self, request_id: str, reader: str | None = None, *, live: bool = True) -> None:
        """Start following a stream, as ``reader`` (by default the request's own id).

        Call before its record is published. Not ``live``: somebody else has published it before; call
        :meth:`catch_up` once this ingress is attached to it.
        """
        cursor = Cursor(request_id, reader or request_id, live=live)
        self._cursors[cursor.reader] = cursor
        self._by_request.setdefault(request_id, []).append(cursor)

    def close(self, reader: str) -> None:
        """Stop following; unknown ones are ignored."""
        cursor = self._cursors.pop(reader, None)
        if cursor is not None:
            cursor.ended = True
            others = self._by_request[cursor.request_id]
            others.remove(cursor)
            if not others:
                del self._by_request[cursor.request_id]

    def reads(self, request_id: str) -> bool:
        """Whether anybody here follows this request."""
        return request_id in self._by_request

    @property
    def busy(self) -> bool:
        """Whether a log is being read because something was missed."""
        return bool(self._tasks)

    def frames(self, reader: str) -> int:
        """How many entries of the log the reader has read; 0 for unknown ones."""
        cursor = self._cursors.get(reader)
        return 0 if cursor is None else cursor.frames

    def pause(self, reader: str) -> None:
        """Take nothing more for this reader until :meth:`resume`; what arrives meanwhile stays in the log."""
        cursor = self._cursors.get(reader)
        if cursor is not None and not cursor.ended:
            cursor.paused, cursor.live = True, False

    def resume(self, reader: str) -> None:
        """Go on after :meth:`pause`."""
        cursor = self._cursors.get(reader)
        if cursor is not None and cursor.paused:
            cursor.paused = False
            self._follow(cursor)

    def rewind(self, reader: str) -> None:
        """Go on after an end that was taken back."""
        cursor = self._cursors.get(reader)
        if cursor is not None:
            cursor.rewind()
            self._follow(cursor)

    def catch_up(self, reader: str) -> None:
        """Read the log, then go on with what arrives."""
        cursor = self._cursors.get(reader)
        if cursor is not None:
            self._follow(cursor)

    async def deliver(self, reader: str, frame: Frame) -> None:
        """Put a frame of one's own behind what has arrived for this reader."""
        await self._hand_out([Delivered(reader, frame)])

    async def batches(self) -> AsyncIterator[list[Delivered]]:
        """What arrived, under the readers' names, one list a message (which holds one engine step of all streams)."""
        try:
            async for payload in self._mailbox.messages():
                if payload is None:
                    await self._reconnected()
                arrived = self._accept(decode_delivered(payload)) if payload else []
                while not self._read.empty():  # before what arrived after it for the same reader
                    yield self._read.get_nowait()
                if arrived:
                    yield arrived
        finally:
            for task in self._tasks:
                task.cancel()

    async def _hand_out(self, batch: list[Delivered]) -> None:
        await self._read.put(batch)
        await self._mailbox.wake()

    def _accept(self, arrived: list[Delivered]) -> list[Delivered]:
        accepted: list[Delivered] = []
        for item in arrived:
            for cursor in self._by_request.get(item.id, ()):
                if not cursor.live:
                    cursor.behind = True
                elif cursor.missed(item.frame):
                    self._follow(cursor)
                elif (delivered := _take(cursor, item.frame)) is not None:
                    accepted.append(delivered)
        return accepted

    async def _reconnected(self) -> None:
        """Redis may have been away, and may have come back without its last second, and have got other tokens since.

        So whatever was delivered is compared with the log once more: 2 us a token, in chunks.
        """
        while self._readers is not None and self._by_request:
            try:
                await self._readers.attach(list(self._by_request))
                break
            except StoreUnavailable as error:  # unattached, nobody would post here what Redis forgot we read
                log.warning("not_attached", error=str(error))
                await asyncio.sleep(jittered(RECONNECT_FIRST_S))
        for cursor in self._cursors.values():
            cursor.frames = 0
            self._follow(cursor)

    def _follow(self, cursor: Cursor) -> None:
        cursor.live = False
        cursor.behind = True
        if not cursor.following and not cursor.paused and not cursor.ended:
            cursor.following = True
            task = asyncio.create_task(self._read_on(cursor))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _read_on(self, cursor: Cursor) -> None:
        """Read the log until it holds no more than was read; from then on the reader is live."""
        try:
            async with self._reading:
                await self._catch_up(cursor)
        finally:
            cursor.following = False

    async def _catch_up(self, cursor: Cursor) -> None:
        while not cursor.paused and not cursor.ended:
            cursor.behind = False
            frames = await self._next_frames(cursor)
            if delivered := _take_entries(cursor, frames):
                await self._hand_out(delivered)
            if len(frames) < CHUNK and not cursor.behind and not cursor.paused:
                cursor.live = True
                return

    async def _next_frames(self, cursor: Cursor) -> list[Frame]:
        """Up to a chunk of the log from ``cursor.frames`` on, which goes back to 0 when the last entry that was read is
        not where it was."""
        if cursor.frames:
            frames = await self._entries(cursor, cursor.frames - 1, CHUNK + 1)
            if frames and (frames[0].index, len(frames[0].tokens)) == cursor.last:
                return frames[1:]
            cursor.frames = 0
        return await self._entries(cursor, 0, CHUNK)

    async def _entries(self, cursor: Cursor, skip: int, limit: int) -> list[Frame]:
        """Until Redis answers: a stream whose missed frames were given up would wait for ever."""
        while not cursor.ended:
            try:
                return await self.log.read(cursor.request_id, skip, limit)
            except StoreUnavailable:
                await asyncio.sleep(jittered(RECONNECT_FIRST_S))
        return []


def _take(cursor: Cursor, frame: Frame) -> Delivered | None:
    """What the reader is to see of a frame; the end, where it contradicts what the reader has seen."""
    try:
        taken = cursor.take(frame)
    except StreamInterrupted as error:
        cursor.ended = True
        wire = StreamError(error.code, str(error), error.status)
        taken = Frame(TERMINAL, [], finish=Finish.ERROR, error=wire)
    return None if taken is None else Delivered(cursor.reader, taken)


def _take_entries(cursor: Cursor, frames: list[Frame]) -> list[Delivered]:
    """The same for the next entries of the log, which count whether or not they bring anything new."""
    delivered = []
    for position, frame in enumerate(frames, cursor.frames + 1):
        if (item := _take(cursor, frame)) is not None:
            delivered.append(item)
        cursor.frames, cursor.last = position, (frame.index, len(frame.tokens))
    return delivered
