"""An engine at work: its loop, its inbox and its lease. A replica without Ray."""

from __future__ import annotations

import threading
import time

import msgspec
import structlog

from penstock.queue.errors import StoreUnavailable
from penstock.queue.redis_client import connect
from penstock.queue.registry import HEARTBEAT_S, Lease, Replica
from penstock.queue.settings import RedisSettings
from penstock.queue.token_log import TokenWriter
from penstock.workers.engine import Engine
from penstock.workers.inbox import Inbox
from penstock.workers.loop import EngineLoop, fatal
from penstock.workers.metrics import EngineMetrics

NOTICE_S = 1.0
"""By then dispatchers have read from the heartbeat that this replica takes nothing more (0.5 s, and 0.25 s to look)."""
DRAIN_LOOK_S = 0.05
"""How often a draining replica looks whether it has finished."""

log = structlog.get_logger()


class EngineHost:
    """Runs ``engine`` under the name and capacity in ``replica`` until :meth:`stop`.

    Each part has a connection of its own, so that none waits for another's answer.
    """

    def __init__(self, engine: Engine, redis: RedisSettings, replica: Replica, metrics: EngineMetrics) -> None:
        self._engine = engine
        self._replica = replica
        self._metrics = metrics
        self._clients = [connect(redis) for _ in range(3)]
        written, read, leased = self._clients
        self._writer = TokenWriter(written, redis, replica.id)
        self._loop = EngineLoop(engine, self._writer, metrics)
        self._inbox = Inbox(read, redis, replica.id, engine, self._loop)
        self._lease = Lease(leased, redis, replica.id)
        self._ended = threading.Event()
        self._receiver = threading.Thread(target=fatal(self._inbox.run), name="inbox", daemon=True)
        self._heart = threading.Thread(target=fatal(self._beat), name="heartbeat", daemon=True)
        self.last_beat = time.monotonic()

    def start(self) -> None:
        """Start all threads; dispatchers see the replica with its first heartbeat."""
        self._loop.start()
        self._receiver.start()
        self._heart.start()

    def drain(self, grace_s: float) -> None:
        """Take nothing more, and return when what runs has ended, and what others read from here was read, or after the
        grace; then :meth:`stop`.

        What has not been prepared yet goes back to its dispatcher. What still runs after the grace goes on elsewhere,
        from the token after the last.
        """
        log.info("draining", replica=self._replica.id, grace_s=grace_s)
        deadline = time.monotonic() + grace_s
        self._inbox.draining = True
        self._replica = msgspec.structs.replace(self._replica, draining=True)
        noticed = time.monotonic() + NOTICE_S
        while time.monotonic() < deadline and not (self._loop.idle and time.monotonic() > noticed):
            self._ended.wait(DRAIN_LOOK_S)

    def leave(self) -> None:
        """Give the lease back, so that dispatchers need not wait for it to run out: they take away what runs here."""
        self._ended.set()
        self._heart.join()
        self._lease.end()

    def stop(self) -> None:
        """End all threads after the step under way, leave, and free the device."""
        self._inbox.stop()
        self._receiver.join()
        self.leave()
        self._loop.stop()
        self._writer.close()
        for client in self._clients:
            client.close()

    def _beat(self) -> None:
        while not self._ended.is_set():
            load = self._engine.load()
            self._metrics.load(load, self._engine.info)
            try:
                self._lease.renew(msgspec.structs.replace(self._replica, **load._asdict()))
            except StoreUnavailable as error:
                log.warning("lease_not_renewed", error=str(error))
            self.last_beat = time.monotonic()
            self._ended.wait(HEARTBEAT_S)
