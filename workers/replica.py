"""An engine replica: the Ray Serve deployment whose process *is* the engine."""

from __future__ import annotations

import os
import time
import traceback
import uuid

import msgspec
import ray
import structlog

from penstock.queue.logs import configure_logging
from penstock.queue.registry import LEASE_S, Replica
from penstock.queue.settings import ModelSettings, RedisSettings
from penstock.workers.engine import Engine
from penstock.workers.host import EngineHost
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
        engine = build_engine(model, workers, role)
        metrics = EngineMetrics(model.served_name, role, self._id)
        node = ray.util.get_node_ip_address()
        info = msgspec.to_builtins(engine.info)
        replica = Replica(
            id=self._id,
            pool=model.pool,
            role=role,
            node=node,
            pid=os.getpid(),
            metrics=f"{node}:{metrics.serve(node)}",
            **info,
        )
        self._host = EngineHost(engine, redis, replica, metrics)
        self._host.start()
        log.info("replica_ready", replica=self._id, role=role, seconds=round(time.monotonic() - started, 1), **info)

    def check_health(self) -> None:
        """Ray Serve's health probe."""
        if time.monotonic() - self._host.last_beat > UNHEALTHY_AFTER_S:
            raise RuntimeError(f"{self._id} has had no heartbeat for {UNHEALTHY_AFTER_S:.0f} s")

    def __del__(self) -> None:
        """Serve takes the replica down: give the lease back so that nobody waits for it to run out."""
        if hasattr(self, "_host"):
            self._host.leave()


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
