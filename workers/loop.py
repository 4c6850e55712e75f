"""The engine loop: the one thread that owns an engine, and the writer thread behind it.

    inbox thread ──prepared──> engine thread ──step outputs──> writer thread ──one script call──> token log

The engine thread never waits for Redis. The writer coalesces what has piled up while a call was under way, in order.
After vLLM's ``EngineCoreProc.run_busy_loop``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import structlog

from penstock.queue.errors import StoreUnavailable
from penstock.queue.messages import EventKind, Finish, Stage, StreamError
from penstock.queue.pauses import jittered
from penstock.queue.token_log import Append, AppendStatus, TokenWriter
from penstock.workers.engine import Engine, Output
from penstock.workers.metrics import EngineMetrics
from penstock.workers.stream import Assignment, Stream

TRANSFER_POLL_S = 0.0005
"""Pause between steps that run nothing, because a KV cache is being read or a grammar compiled: lets those threads have
the interpreter."""
SENT_POLL_S = 0.005
"""The same where KV caches wait for others to read them: nobody here waits for that but the blocks, and each look costs
a third of a millisecond, of a processor that the readers may want."""
HAND_OFF_S = 0.00005
"""Pause of a thread that has handed something on, in which the other wakes and has the interpreter. It would get it for
certain only after Python's switch interval of 5 ms: the next step gives it up, but for moments that are too short."""
STORE_RETRY_S = 0.1
"""Pause before a failed append is tried again. Redis restarts take longer; the steps made meanwhile are kept."""
LOOK_S = 0.5
"""A writer with nothing to write looks this often whether the log still holds what it wrote."""
PAUSED_S = 10.0
"""A loop that had work and did not run for so long (a stopped process) has missed heartbeats to prefill engines: KV it
has not read yet may be somebody else's by now. Well under the 20 s that one heartbeat buys."""

log = structlog.get_logger()


class Admit(NamedTuple):
    """A prepared request and the stream it feeds."""

    stream: Stream
    prepared: Any


class Cancel(NamedTuple):
    """Abort these requests, whatever attempt of them runs here, and append their end."""

    request_ids: list[str]


class Forget(NamedTuple):
    """Abort these jobs without a word: their attempt is no longer the valid one."""

    job_ids: set[str]


class Refuse(NamedTuple):
    """A request that could not be prepared, or not even read: append its error."""

    stream: Assignment
    error: StreamError


class GiveBack(NamedTuple):
    """A request that this replica will not start: it is being drained."""

    stream: Stream


Item = Admit | Cancel | Forget | Refuse | GiveBack
Produced = tuple[Assignment, Output | EventKind]
"""What to append: a step's output, or that the request goes back to its dispatcher and why."""


class EngineLoop:
    """Runs one engine until :meth:`stop`. An exception in either thread ends the process: a half-dead engine is worse
    than none."""

    def __init__(self, engine: Engine, writer: TokenWriter, metrics: EngineMetrics) -> None:
        self._engine = engine
        self._log = writer
        self._metrics = metrics
        self._inbox: SimpleQueue[Item | None] = SimpleQueue()
        self._outbox: SimpleQueue[list[Produced] | None] = SimpleQueue()
        self._streams: dict[str, Stream] = {}
        self._unread: set[str] = set()
        self._seen_at = time.monotonic()
        self._pause_s = 0.0
        self._working = False
        self._threads = [
            Thread(target=fatal(self._run_engine), name="engine", daemon=True),
            Thread(target=fatal(self._run_writer), name="token-writer", daemon=True),
        ]

    def start(self) -> None:
        """Start both threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop after the step under way; what was produced is written first."""
        self._inbox.put(None)
        for thread in self._threads:
            thread.join()

    def submit(self, item: Item) -> None:
        """Hand work to the engine thread; called by the inbox thread."""
        self._inbox.put(item)

    @property
    def idle(self) -> bool:
        """Whether no request runs here, and nobody has yet to read a KV cache from here. From any thread."""
        return not self._working and not self._streams and self._inbox.empty() and self._outbox.empty()

    # -- engine thread

    def _run_engine(self) -> None:
        while self._take():
            if self._engine.has_work():
                self._mistrust()
                self._step()
        self._outbox.put(None)
        self._engine.shutdown()

    def _take(self) -> bool:
        """Take all there is; wait for something while there is nothing better to do. False: stop."""
        self._working = self._engine.has_work()
        wait = self._pause_s if self._working else None
        with suppress(Empty):
            while (item := self._inbox.get(timeout=wait)) is not None:
                if not self._engine.has_work():
                    self._seen_at = time.monotonic()
                self._handle(item)
                wait = 0.0
            return False
        return True

    def _handle(self, item: Item) -> None:
        if isinstance(item, Admit):
            self._admit(item.stream, item.prepared)
        elif isinstance(item, GiveBack):
            self._outbox.put([(item.stream, EventKind.LOST)])
        elif isinstance(item, Refuse):
            self._outbox.put([(item.stream, Output(item.stream.job_id, [], error=item.error))])
        elif isinstance(item, Forget):
            self._drop([self._streams[id_] for id_ in item.job_ids & self._streams.keys()])
        else:
            gone = [stream for stream in self._streams.values() if stream.request_id in item.request_ids]
            self._drop(gone)
            self._outbox.put([(stream, Output(stream.job_id, [], finish=Finish.ABORT)) for stream in gone])

    def _admit(self, stream: Stream, prepared: Any) -> None:
        if stream.job_id in self._streams:  # a log that lost its last second had it handed over a second time
            return
        if stream.stage is not Stage.RELEASE:
            self._streams[stream.job_id] = stream
        if stream.kv_expired:
            log.warning("kv_expired", request_id=stream.request_id, attempt=stream.attempt)
            self._recompute(stream)
            return
        if stream.transfers:
            self._unread.add(stream.job_id)
        self._engine.add(prepared)

    def _mistrust(self) -> None:
        """After a pause, compute what should have been read from prefill engines."""
        now = time.monotonic()
        paused, self._seen_at = now - self._seen_at > PAUSED_S, now
        if paused and self._unread:
            unread, self._unread = self._unread, set()
            log.warning("kv_mistrusted", requests=len(unread))
            self._engine.abort(list(unread))
            for job_id in unread:
                self._recompute(self._streams[job_id])

    def _recompute(self, stream: Stream) -> None:
        del self._streams[stream.job_id]
        job = stream.recompute()
        self._streams[job.id] = stream
        self._engine.add(self._engine.prepare(job))

    def _drop(self, streams: list[Stream]) -> None:
        self._engine.abort([stream.job_id for stream in streams])
        for stream in streams:
            del self._streams[stream.job_id]
            self._unread.discard(stream.job_id)

    def _step(self) -> None:
        started = time.perf_counter()
        outputs, executed = self._engine.step()
        if executed:
            self._metrics.step(time.perf_counter() - started, outputs)
        if outputs:
            self._outbox.put([pair for output in outputs if (pair := self._route(output)) is not None])
            time.sleep(HAND_OFF_S)
        idle_s = TRANSFER_POLL_S if self._streams else SENT_POLL_S
        self._pause_s = 0.0 if executed else idle_s

    def _route(self, output: Output) -> Produced | None:
        finished = output.finish is not None or output.error is not None
        self._unread.discard(output.id)
        stream = self._streams.pop(output.id, None) if finished else self._streams.get(output.id)
        return None if stream is None else (stream, output)

    # -- writer thread

    def _run_writer(self) -> None:
        while (produced := self._collect()) is not None:
            self._write(produced)

    def _collect(self) -> list[Produced] | None:
        """Everything produced since the last call, perhaps nothing; None at the end."""
        try:
            produced = self._outbox.get(timeout=LOOK_S)
        except Empty:
            return []
        while produced is not None and not self._outbox.empty():
            more = self._outbox.get()
            if more is None:
                self._outbox.put(None)
                break
            produced = produced + more
        return produced

    def _write(self, produced: list[Produced]) -> None:
        made = [(stream, entry) for stream, output in produced if (entry := _entry(stream, output)) is not None]
        statuses = self._append([entry for _, entry in made])
        refused = {
            stream.job_id: (stream, status)
            for (stream, _), status in zip(made, statuses, strict=True)
            if status not in (AppendStatus.OK, AppendStatus.LOST)
        }
        for stream, status in refused.values():
            say = log.info if status is AppendStatus.DONE else log.warning  # also what was cancelled a step ago
            say("append_refused", request_id=stream.request_id, attempt=stream.attempt, status=status)
        if refused:
            self.submit(Forget(set(refused)))

    def _append(self, entries: list[Append]) -> list[AppendStatus]:
        """Append until it is done: tokens that exist are never thrown away because Redis is away."""
        while True:
            try:
                return self._log.append(entries)
            except StoreUnavailable as error:
                log.warning("token_log_unavailable", error=str(error), entries=len(entries))
                time.sleep(jittered(STORE_RETRY_S))


def _entry(stream: Assignment, output: Output | EventKind) -> Append | None:
    return stream.give_back(output) if isinstance(output, EventKind) else stream.append(output)


def fatal(run: Callable[[], None]) -> Callable[[], None]:
    """``run``, but an exception in it ends the process."""

    def guarded() -> None:
        try:
            run()
        except BaseException:
            log.exception("engine_thread_failed")
            os._exit(1)

    return guarded
