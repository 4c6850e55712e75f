"""An engine replica: the Ray Serve deployment whose process *is* the engine."""

from __future__ import annotations

import time
import traceback

import ray
import structlog

from penstock.queue.logs import configure_logging
from penstock.queue.registry import LEASE_S
from penstock.queue.settings import ModelSettings, RedisSettings
from penstock.workers.engine_process import new_replica_id, start_host
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
        self._id = new_replica_id(role)
        self._grace_s = workers.drain_grace_s
        try:
            self._start(redis, model, workers, role)
        except BaseException as error:
            log.error("engine_failed", role=role, cause=innermost(error), traceback=traceback.format_exc())
            raise

    def _start(self, redis: RedisSettings, model: ModelSettings, workers: WorkerSettings, role: str) -> None:
        node = ray.util.get_node_ip_address()
        self._host = start_host(redis, model, workers, role, node, self._id)

    def check_health(self) -> None:
        """Ray Serve's health probe."""
        if time.monotonic() - self._host.last_beat > UNHEALTHY_AFTER_S:
            raise RuntimeError(f"{self._id} has had no heartbeat for {UNHEALTHY_AFTER_S:.0f} s")

    def __del__(self) -> None:
        """Serve takes the replica down: finish what runs, for a while, and give the lease back."""
        if hasattr(self, "_host"):
            self._host.drain(self._grace_s)
            self._host.stop()


def innermost(error: BaseException) -> str:
    """What really went wrong, beneath all that wrapped it."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {error}"
