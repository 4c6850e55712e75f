"""A replica's inbox: work that dispatchers and prefill replicas put into its Redis list, made ready for the engine.

A list, because it survives a broken connection; one blocking pop wakes the thread, a second pop takes the rest. On
loopback this hands over in well under a millisecond, a Ray Serve handle call takes four to five.
"""

from __future__ import annotations

import time
from typing import Any, cast

import redis
import structlog

from penstock.queue.errors import RequestError
from penstock.queue.messages import Abort, Inbound, Run, Stage, StreamError, decode_inbound
from penstock.queue.records import decode_record
from penstock.queue.settings import RedisSettings
from penstock.workers.engine import Engine
from penstock.workers.loop import Admit, Cancel, EngineLoop, Refuse
from penstock.workers.stream import Stream

BLOCK_S = 2
"""How long one pop waits. Below the connection's command timeout, so that silence is not taken for a dead Redis."""
RETRY_S = 0.2
"""Pause after a failed pop; the list keeps what arrives meanwhile."""
DRAIN = 256
"""Entries taken at once after the first: more than the largest batch a dispatcher hands over."""

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

    def run(self) -> None:
        """Receive for ever."""
        while True:
            try:
                for entry in self._pop():
                    self._receive(decode_inbound(entry))
            except (redis.ConnectionError, redis.TimeoutError) as error:
                log.warning("inbox_unavailable", error=str(error))
                time.sleep(RETRY_S)

    def _pop(self) -> list[bytes]:
        first = cast("tuple[bytes, bytes] | None", self._client.blpop([self._key], timeout=BLOCK_S))
        if first is None:
            return []
        rest = cast("list[bytes] | None", self._client.lpop(self._key, DRAIN))
        return [first[1], *(rest or ())]

    def _receive(self, inbound: Inbound) -> None:
        if isinstance(inbound.work, Abort):
            self._loop.submit(Cancel(inbound.work.ids))
        else:
            self._admit(inbound.work, inbound.attempt)

    def _admit(self, run: Run, attempt: int) -> None:
        record = decode_record(bytes(run.record))
        stream = Stream(run, record, attempt, self._engine.info.block_size)
        try:
            prepared: Any = self._engine.prepare(stream.job())
        except RequestError as error:
            if run.stage is not Stage.RELEASE:
                self._loop.submit(Refuse(stream, StreamError(error.code, str(error), error.status)))
        else:
            self._loop.submit(Admit(stream, prepared))

