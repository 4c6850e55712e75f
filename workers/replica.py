"""An engine replica: the Ray Serve deployment whose process *is* the engine."""

from __future__ import annotations

import os
import threading
import time
import traceback
import uuid

import msgspec
import ray
import structlog

from penstock.queue.errors import StoreUnavailable
from penstock.queue.logs import configure_logging
from penstock.queue.redis_client import connect
from penstock.queue.registry import HEARTBEAT_S, LEASE_S, Lease, Replica
from penstock.queue.settings import ModelSettings, RedisSettings
from penstock.queue.token_log import TokenWriter
from penstock.workers.engine import Engine
from penstock.workers.inbox import Inbox
from penstock.workers.loop import EngineLoop, fatal
from penstock.workers.metrics import EngineMetrics
from penstock.workers.settings import WorkerSettings

UNHEALTHY_AFTER_S = 10 * LEASE_S
"""Serve replaces a replica whose heartbeat thread has not run for this long: ten leases, so that a Redis restart, which
stops all replicas alike, does not make Serve replace them all."""

log = structlog.get_logger()


class EngineReplica:
    """One engine, its inbox and its lease.

    Ray Serve gives it a process, restarts it when that dies, and counts replicas; requests and tokens go through Redis.
    """

    def __init__(self, redis: RedisSettings, model: ModelSettings, workers: WorkerSettings, role: str) -> None:
        configure_logging(role)
        self._id = f"{role}-{uuid.uuid4().hex[:12]}"
        try:
            self._start(redis, model, workers, role)
        except BaseException as error:
            log.error("engine_failed", role=role, cause=innermost(error), traceback=traceback.format_exc())
            raise

    def _start(self, redis: RedisSettings, model: ModelSettings, workers: WorkerSettings, role: str) -> None:
        started = time.monotonic()
        self._engine = build_engine(model, workers, role)
        self._metrics = EngineMetrics(model.served_name, role, self._id)
        self._loop = EngineLoop(self._engine, TokenWriter(connect(redis), redis), self._metrics)
        self._lease = Lease(connect(redis), redis, self._id)
        host = ray.util.get_node_ip_address()
        info = msgspec.to_builtins(self._engine.info)
        self._replica = Replica(
            id=self._id, pool=model.pool, role=role, node=host, pid=os.getpid(),
            metrics=f"{host}:{self._metrics.serve(host)}", **info,
        )
        inbox = Inbox(connect(redis), redis, self._id, self._engine, self._loop)
        self._beat = time.monotonic()
        self._ended = threading.Event()
        self._loop.start()
        threading.Thread(target=fatal(inbox.run), name="inbox", daemon=True).start()
        threading.Thread(target=fatal(self._heartbeat), name="heartbeat", daemon=True).start()
        log.info("replica_ready", replica=self._id, role=role, seconds=round(time.monotonic() - started, 1), **info)

    def _heartbeat(self) -> None:
        while not self._ended.is_set():
            load = self._engine.load()
            self._metrics.load(load, self._engine.info)
            try:
                self._lease.renew(msgspec.structs.replace(self._replica, **load._asdict()))
            except StoreUnavailable as error:
                log.warning("lease_not_renewed", error=str(error))
            self._beat = time.monotonic()
            self._ended.wait(HEARTBEAT_S)

    def ready(self) -> str:
        """The replica's id, once it can take work; for whoever starts it."""
        return self._id

    def check_health(self) -> None:
        """Ray Serve's health probe."""
        if time.monotonic() - self._beat > UNHEALTHY_AFTER_S:
            raise RuntimeError(f"{self._id} has had no heartbeat for {UNHEALTHY_AFTER_S:.0f} s")

    def __del__(self) -> None:
        """Serve takes the replica down: give the lease back so that nobody waits for it to run out."""
        if hasattr(self, "_ended"):
            self._ended.set()
            self._lease.end()


def build_engine(model: ModelSettings, workers: WorkerSettings, role: str) -> Engine:
    """The configured engine. Imports vLLM only when it is asked for: that alone takes fifteen seconds."""
    if workers.engine == "simulated":
        from penstock.workers.simulated.engine import SimulatedEngine

        return SimulatedEngine(model, workers, role)
    from penstock.workers.vllm_engine import VllmEngine

    return VllmEngine(model, role, workers.nixl_progress_delay_us)


def innermost(error: BaseException) -> str:
    """What really went wrong, beneath all that wrapped it."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {error}"

