"""Load without HTTP: publishes records and reads token frames as an ingress does, and checks every token.

What each stream must show is known beforehand: the simulated engine's answer is a pure function of the prompt, and a
real engine's was recorded in an undisturbed run (:class:`Oracle`).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Self

import redis.asyncio

from penstock.queue.dead_letters import DeadLetter
from penstock.queue.errors import TransientError
from penstock.queue.factory import open_queue
from penstock.queue.mailbox import Mailbox, TokenReader
from penstock.queue.messages import Delivered, Finish, Frame, decode_frame
from penstock.queue.readers import Readers
from penstock.queue.records import Record, new_request_id
from penstock.queue.redis_client import connect_async
from penstock.queue.settings import QueueSettings, RedisSettings
from penstock.queue.token_log import RequestLog, emitted_tokens
from penstock.workers.simulated.tokens import expected_tokens
from tests.support.requests import make_record
from tests.support.simulated_stack import POOL
from tests.support.waiting import eventually_async

RETRY_S = 0.05
"""Before a publication that was not acknowledged is sent again."""
PROGRESS_S = 120.0
"""For tokens to come on: over the longest outage, a broker's restart among others' work."""
AUDIT_BATCH = 500
"""Requests whose logs are read in one pipeline."""
Oracle = Callable[[Record], list[int]]
"""The tokens a record must be answered with."""


def simulated(record: Record) -> list[int]:
    """What every simulated engine answers."""
    return expected_tokens(record.token_ids(), record.max_tokens)


class Stream:
    """One request as its reader sees it."""

    __slots__ = (
        "ended", "error", "expected", "finish", "first_s", "gap_at", "gap_s", "last", "position", "record", "sent",
        "took_s",
    )  # fmt: skip

    def __init__(self, record: Record, expected: list[int]) -> None:
        self.record = record
        self.expected = expected
        self.position = 0
        self.finish: Finish | None = None
        self.error = ""
        self.sent = time.monotonic()
        self.last = 0.0
        self.first_s = self.gap_s = self.took_s = 0.0
        self.gap_at = 0
        """Tokens delivered before its longest silence."""
        self.ended = asyncio.Event()

    def waited_s(self) -> float:
        """Its longest silence, less the time in which an engine computes anew, unseen, what had been delivered."""
        pace = (self.took_s - self.first_s - self.gap_s) / max(1, self.position)
        return self.gap_s - max(0.0, pace) * self.gap_at


class Tally:
    """What was seen of all streams. Counts are tokens, but for ``accepted``, ``finished`` and ``errors``."""

    def __init__(self) -> None:
        self.accepted = 0
        self.finished = 0
        self.tokens = 0
        self.lost = 0
        self.repeated = 0
        self.altered = 0
        self.errors: Counter[str] = Counter()

    def see(self, stream: Stream, frame: Frame) -> None:
        """Account for one frame that became visible."""
        if frame.tokens:
            self._tokens(stream, frame)
        if frame.finish is not None:
            self._end(stream, frame)

    def _tokens(self, stream: Stream, frame: Frame) -> None:
        now = time.monotonic()
        if stream.last:
            gap = now - stream.last
            if gap > stream.gap_s:
                stream.gap_s, stream.gap_at = gap, stream.position
        else:
            stream.first_s = now - stream.sent
        stream.last = now
        end = frame.index + len(frame.tokens)
        self.lost += max(0, frame.index - stream.position)
        self.repeated += max(0, stream.position - frame.index) + (len(frame.tokens) if stream.finish is not None else 0)
        wanted = stream.expected[frame.index : end]
        self.altered += (
            sum(a != b for a, b in zip(frame.tokens, wanted, strict=False)) + end - frame.index - len(wanted)
        )
        self.tokens += len(frame.tokens)
        stream.position = max(stream.position, end)

    def _end(self, stream: Stream, frame: Frame) -> None:
        if stream.finish is not None:
            self.repeated += 1
            return
        stream.finish = frame.finish
        stream.took_s = time.monotonic() - stream.sent
        if frame.error is not None:
            stream.error = frame.error.code
        elif frame.finish is Finish.ABORT:
            stream.error = "aborted"
        if stream.error:
            self.errors[stream.error] += 1
        else:
            self.finished += 1
            self.lost += len(stream.expected) - stream.position
        stream.ended.set()


class Audit:
    """What the token log says afterwards: wrong logs by request id, and how often requests were run."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.runs: dict[str, int] = {}

    @property
    def reexecuted(self) -> float:
        """Share of requests that were given to more than one replica."""
        return sum(runs > 1 for runs in self.runs.values()) / max(1, len(self.runs))


class Load:
    """``async with Load(...) as load: await load.run(total)``.

    Args:
        concurrency: streams kept open; the next one starts when one ends.
        prompt: of each request, by its number.
        sampling: of each request, by its number.
        oracle: what the answers must be.
    """

    def __init__(
        self,
        queue: QueueSettings,
        settings: RedisSettings,
        *,
        concurrency: int,
        prompt: Callable[[int], list[int]],
        sampling: Callable[[int], dict[str, Any]],
        oracle: Oracle = simulated,
    ) -> None:
        self.concurrency = concurrency
        self.tally = Tally()
        self.streams: dict[str, Stream] = {}
        self.open: dict[str, Stream] = {}
        self.stopped = False
        self.sent_all = False
        self.over = asyncio.Event()
        self._settings = settings
        self._client: redis.asyncio.Redis = connect_async(settings)
        self.log = RequestLog(self._client, settings)
        self.queue = open_queue(queue, settings, POOL)
        mailbox = Mailbox(self._client, settings, f"ingress:chaos-{uuid.uuid4().hex}")
        self.reader = TokenReader(mailbox, self.log, Readers(self._client, settings, mailbox.channel))
        self._prompt = prompt
        self._sampling = sampling
        self._oracle = oracle
        self._number = 0
        self._reading: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._reading is not None
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        await self.queue.close()
        await self._client.aclose()

    async def run(self, total: int = 0) -> None:
        """Send requests until ``total`` were sent (0: until :meth:`stop`), and wait until each has ended."""
        numbers = iter(range(total)) if total else iter(int, 1)
        await asyncio.gather(*(self._worker(numbers) for _ in range(min(self.concurrency, total or self.concurrency))))
        self.over.set()

    async def finished(self) -> None:
        """Wait until a load of so many requests is over."""
        await self.over.wait()

    def stop(self) -> None:
        """Send no more."""
        self.stopped = True

    async def progressed(self, tokens: int) -> None:
        """Wait until so many more tokens have been seen, or nothing is left to wait for."""
        goal = self.tally.tokens + tokens
        await eventually_async(lambda: self._reached(goal), PROGRESS_S, f"{goal} tokens; {self.tally.tokens} so far")

    @staticmethod
    async def reached(stream: Stream, tokens: int) -> None:
        """Wait until one stream has so many tokens, or its end."""

        async def there() -> bool:
            return stream.position >= tokens or stream.ended.is_set()

        await eventually_async(there, PROGRESS_S, f"{tokens} tokens of {stream.record.id}")

    async def _reached(self, goal: int) -> bool:
        return self.tally.tokens >= goal or (self.sent_all and not self.open)

    async def send(self, **changes: Any) -> Stream:
        """Publish one request, again until it is acknowledged, and follow it."""
        stream = self.follow(self.make(**changes))
        await self.publish(stream)
        return stream

    def make(self, **changes: Any) -> Record:
        """The next request. Its salt makes engines compute a prompt that they have seen before."""
        number, self._number, id_ = self._number, self._number + 1, new_request_id()
        values = {"id": id_, "cache_salt": id_, "sampling": self._sampling(number), "reply_to": self.reader.channel}
        return make_record(self._prompt(number), **values | changes)

    def follow(self, record: Record) -> Stream:
        """Read what comes for this record."""
        stream = self.streams[record.id] = self.open[record.id] = Stream(record, self._oracle(record))
        self.reader.open(record.id)
        return stream

    async def publish(self, stream: Stream) -> None:
        """Until the broker says that it has it. Twice the same record is harmless: it runs once."""
        while True:
            try:
                await self.queue.publish(stream.record)
            except TransientError:
                await asyncio.sleep(RETRY_S)
            else:
                self.tally.accepted += 1
                return

    def leave(self, stream: Stream) -> None:
        """Read it no more."""
        self.reader.close(stream.record.id)
        self.open.pop(stream.record.id, None)

    async def _worker(self, numbers: Any) -> None:
        for _ in numbers:
            if self.stopped:
                break
            stream = await self.send()
            await stream.ended.wait()
            self.leave(stream)
        self.sent_all = True

    async def handed_over(self, streams: Sequence[Stream]) -> bool:
        """Whether the prefill replicas have passed on any of these."""
        pipeline = self._client.pipeline(transaction=False)
        for stream in streams:
            pipeline.hexists(f"{self._settings.namespace}req:{stream.record.id}", "handed")
        return any(await pipeline.execute())

    async def sources(self, streams: Sequence[Stream]) -> Counter[str]:
        """How many of these each prefill replica has passed on whose KV cache nobody has read yet."""
        pipeline = self._client.pipeline(transaction=False)
        for stream in streams:
            pipeline.hget(f"{self._settings.namespace}req:{stream.record.id}", "source")
        return Counter(source.decode() for source in await pipeline.execute() if source)

    async def _read(self) -> None:
        async for batch in self.reader.batches():
            for item in batch:
                self._seen(item)

    def _seen(self, item: Delivered) -> None:
        stream = self.open.get(item.id)
        if stream is not None:
            self.tally.see(stream, item.frame)

    # -- afterwards

    async def audit(self) -> Audit:
        """Compare every log with what it must hold: all tokens once, one end, nothing after it."""
        audit, ids = Audit(), list(self.streams)
        for start in range(0, len(ids), AUDIT_BATCH):
            await self._audit(ids[start : start + AUDIT_BATCH], audit)
        return audit

    async def _audit(self, ids: list[str], audit: Audit) -> None:
        pipeline = self._client.pipeline(transaction=False)
        for id_ in ids:
            pipeline.lrange(f"{self._settings.namespace}tok:{id_}", 0, -1)
            pipeline.hget(f"{self._settings.namespace}req:{id_}", "runs")
        answers = await pipeline.execute()
        for id_, frames, runs in zip(ids, answers[::2], answers[1::2], strict=True):
            audit.runs[id_] = int(runs or 0)
            if not _right(self.streams[id_], [decode_frame(frame) for frame in frames]):
                audit.wrong.append(id_)

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """What the queue has given up."""
        letters: list[DeadLetter] = await self.queue.dead_letters(limit)
        return letters


def _right(stream: Stream, frames: list[Frame]) -> bool:
    tokens = emitted_tokens(frames)
    ends = [frame for frame in frames if frame.finish is not None]
    complete = bool(stream.error) or tokens == stream.expected
    return complete and tokens == stream.expected[: len(tokens)] and len(ends) == 1 and ends[0] is frames[-1]


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of all do not exceed; 0 when there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
