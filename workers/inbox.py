"""A replica's inbox: work that dispatchers and prefill replicas put into its Redis stream, made ready for the engine.

A stream read by position, because that survives a broken connection: what a lost answer held is read again, where a
popped list would have forgotten it. On loopback this hands over in well under a millisecond, a Ray Serve handle call
takes four to five.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

import msgspec
import redis
import structlog

from penstock.queue.errors import InvalidRecord, RequestError, StoreUnavailable
from penstock.queue.messages import Abort, Inbound, Run, Stage, StreamError, decode_address, decode_inbound, encode
from penstock.queue.pauses import jittered
from penstock.queue.records import decode_record
from penstock.queue.redis_client import store_errors
from penstock.queue.settings import RedisSettings
from penstock.workers.engine import Engine
from penstock.workers.loop import HAND_OFF_S, Admit, Cancel, EngineLoop, GiveBack, Refuse
from penstock.workers.stream import Assignment, Stream

BLOCK_S = 2
"""How long one read waits. Below the connection's command timeout, so that silence is not taken for a dead Redis."""
RETRY_S = 0.2
"""Pause after a failed read; the stream keeps what arrives meanwhile."""
BATCH = 256
"""Entries read at once: more than the largest batch a dispatcher hands over."""

_BROKEN = StreamError("engine_failed", "the engine could not take this request", 500, retryable=True)

log = structlog.get_logger()


class Inbox:
    """Feeds one engine loop. :meth:`run` is the body of the inbox thread."""

    def __init__(
        self, client: redis.Redis, settings: RedisSettings, replica_id: str, engine: Engine, loop: EngineLoop
    ) -> None:
        self._client = client
        self._key = f"{settings.namespace}inbox:{replica_id}"
        self._engine = engine
        self._loop = loop
        self._position = b"0"
        self._stopped = threading.Event()
        self.draining = False
        """Give new requests back, but for those whose KV cache another replica holds for this one."""

    def run(self) -> None:
        """Receive until :meth:`stop`."""
        while not self._stopped.is_set():
            try:
                for entry in self._read():
                    self._receive(entry)
                time.sleep(HAND_OFF_S)  # before the next read, which takes the interpreter that the engine wants now
            except StoreUnavailable as error:
                log.warning("inbox_unavailable", error=str(error))
                self._stopped.wait(jittered(RETRY_S))

    def stop(self) -> None:
        """Let :meth:`run` return; an abort of nothing wakes the read under way."""
        self._stopped.set()
        with suppress(StoreUnavailable), store_errors():  # else the read returns by itself
            self._client.xadd(self._key, {"w": encode(Inbound(0, Abort([])))})

    def _read(self) -> list[bytes]:
        """Wait for entries after the last one; what was read before is trimmed in the same round trip."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.xtrim(self._key, minid=self._position, approximate=False)
        pipeline.xread({self._key: self._position}, count=BATCH, block=BLOCK_S * 1000)
        with store_errors():
            _, reply = pipeline.execute()
        if not reply:
            return []
        ((_, entries),) = reply
        self._position = entries[-1][0]
        return [fields[b"w"] for _, fields in entries]

    def _receive(self, entry: bytes) -> None:
        try:
            inbound = decode_inbound(entry)
        except msgspec.MsgspecError:
            self._unread(entry)
            return
        if isinstance(inbound.work, Abort):
            self._loop.submit(Cancel(inbound.work.ids))
        else:
            self._admit(inbound.work, inbound.attempt, inbound.fence)

    def _admit(self, run: Run, attempt: int, fence: int) -> None:
        try:
            record = decode_record(bytes(run.record))
        except InvalidRecord:
            self._give_back(Assignment(run.id, attempt, fence, len(run.emitted)))
            return
        stream = Stream(run, record, attempt, self._engine.info.block_size, fence)
        if self.draining and stream.stage in (Stage.WHOLE, Stage.PREFILL):
            self._loop.submit(GiveBack(stream))
            return
        try:
            prepared: Any = self._engine.prepare(stream.job())
        except RequestError as error:
            self._refuse(stream, StreamError(error.code, str(error), error.status))
        except Exception:  # one request's fault, found before it could touch the others'
            log.exception("request_not_prepared", request_id=run.id)
            self._refuse(stream, _BROKEN)
        else:
            self._loop.submit(Admit(stream, prepared))

    def _unread(self, entry: bytes) -> None:
        """It may come from a later release: give back what it names."""
        try:
            address = decode_address(entry)
        except msgspec.MsgspecError:
            log.exception("inbox_entry_not_read")
        else:
            self._give_back(Assignment(address.work.id, address.attempt, address.fence))

    def _give_back(self, assignment: Assignment) -> None:
        """Another replica may be able to read it: a failure of this one, and its dispatcher tries elsewhere."""
        log.warning("request_not_read", request_id=assignment.request_id)
        self._loop.submit(Refuse(assignment, _BROKEN))

    def _refuse(self, stream: Stream, error: StreamError) -> None:
        if stream.stage is not Stage.RELEASE:
            self._loop.submit(Refuse(stream, error))
