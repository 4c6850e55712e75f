"""The Ray Serve application of one pool, and the command that runs it on a local Ray.

``serve deploy`` uses the import path ``penstock.workers.app:app``; settings come from the settings file and environment
of the process that builds it and are handed to the replicas, which need neither.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
import time
from contextlib import suppress

import ray
import structlog
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from penstock.queue.logs import configure_logging
from penstock.queue.settings import ModelSettings, QueueSettings, RedisSettings
from penstock.workers.dispatch_process import run_dispatcher
from penstock.workers.engine_process import engine_environment
from penstock.workers.replica import EngineReplica
from penstock.workers.settings import WorkerSettings

APPLICATION = "penstock"
HEALTH_PERIOD_S = 2
"""How often Serve looks at a replica; a killed process it notices by itself."""
DISPATCHER_CPUS = 0.1
"""Not nothing: a head that is given no CPUs, so that its loss takes nothing along, gets whatever asks for none."""
DISPATCHER_SURGE_PERCENT = 1
"""Rounded up: an update starts one dispatcher before it ends another, so that there is always one."""
DISPATCHER_GRACE_S = 10
"""A dispatcher has nothing to finish: it hands its deliveries to the others, which takes one call to the broker."""
BEYOND_GRACE_S = 5
"""After its grace a replica stops its threads and frees the device."""
OBJECT_STORE_BYTES = 80 * 1024 * 1024
"""Ray's minimum, nearly: neither requests nor tokens nor KV caches pass through the object store."""
RAY_START_TRIES = 3
"""Ray gives its own processes a fixed 30 s to start, which a laptop that imports vLLM several times over can exceed."""
RAY_ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # Ray's 15 would let the ingress starve the engines
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # Ray's 0.1 takes 4 % of a core to be told what leases tell sooner
}
"""For a local Ray, unless set otherwise."""
RAY_TEMP_VARIABLE = "PENSTOCK_RAY_TEMP"
"""Folder for the files of a local Ray; short, for a socket's path holds 107 bytes."""

log = structlog.get_logger()


class DispatcherReplica:
    """One dispatcher in its own process, and the head of the application: it names the engine deployments it feeds."""

    async def __init__(  # type: ignore[misc]  # Serve awaits the constructor
        self,
        queue: QueueSettings,
        redis: RedisSettings,
        model: ModelSettings,
        workers: WorkerSettings,
        engines: list[DeploymentHandle],
    ) -> None:
        configure_logging("dispatcher")
        self._engines = engines
        self._running = asyncio.create_task(run_dispatcher(queue, redis, model, workers))

    async def __del__(self) -> None:
        """Serve takes the replica down: hand unfinished deliveries to other dispatchers."""
        self._running.cancel()
        with suppress(asyncio.CancelledError):
            await self._running


def build_app(queue: QueueSettings, redis: RedisSettings, model: ModelSettings, workers: WorkerSettings) -> Application:
    """The application: a dispatcher deployment, and one deployment per role of engine."""
    counts = {"prefill": workers.prefill, "decode": workers.decode, "mixed": workers.mixed}
    engines = [_engines(role, count, redis, model, workers) for role, count in counts.items() if count]
    dispatcher = serve.deployment(
        DispatcherReplica,
        name="dispatcher",
        num_replicas=workers.dispatchers,
        max_surge_percent=DISPATCHER_SURGE_PERCENT,
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=DISPATCHER_GRACE_S,
        ray_actor_options={"num_cpus": DISPATCHER_CPUS},
    )
    return dispatcher.bind(queue, redis, model, workers, engines)


def _engines(role: str, count: int, redis: RedisSettings, model: ModelSettings, workers: WorkerSettings) -> Application:
    deployment = serve.deployment(
        EngineReplica,
        name=role,
        num_replicas=count,
        max_surge_percent=workers.update_surge_percent,
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=workers.drain_grace_s + BEYOND_GRACE_S,
        ray_actor_options={
            "num_cpus": workers.cpus_per_replica,
            "num_gpus": workers.gpus_per_replica,
            "runtime_env": {"env_vars": engine_environment(model)},
        },
    )
    return deployment.bind(redis, model, workers, role)


def app(_: dict[str, str] | None = None) -> Application:
    """Builder for ``serve deploy`` (import path ``penstock.workers.app:app``): settings from file and environment."""
    return build_app(QueueSettings(), RedisSettings(), ModelSettings(), WorkerSettings())


def run_local(temp_dir: str | None = None) -> None:
    """Run the application on a Ray of this machine's own until SIGTERM or SIGINT; then take it down."""
    configure_logging("workers")
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    workers = WorkerSettings()
    started = time.monotonic()
    _start_ray(workers, temp_dir)
    for number in (signal.SIGTERM, signal.SIGINT):  # now, for Ray installs handlers of its own
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        serve.start(proxy_location="Disabled")
        log.info("ray_ready", seconds=round(time.monotonic() - started, 1))
        serve.run(app(), name=APPLICATION, route_prefix=None)
        log.info("workers_ready", seconds=round(time.monotonic() - started, 1))
        signal.pause()
    finally:
        ray.shutdown()  # at once: what was under way is delivered again, and an orderly stop of Serve takes ten seconds


def _start_ray(workers: WorkerSettings, temp_dir: str | None) -> None:
    engines = workers.cpus_per_replica * (workers.prefill + workers.decode + workers.mixed)
    for attempt in range(1, RAY_START_TRIES + 1):
        try:
            ray.init(
                num_cpus=math.ceil(engines + DISPATCHER_CPUS * workers.dispatchers),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=temp_dir,
            )
        except Exception as error:  # Ray raises the bare class when its processes are late
            ray.shutdown()
            if attempt == RAY_START_TRIES or "timed out during startup" not in str(error):
                raise
            log.warning("ray_start_retried", attempt=attempt, error=str(error))
        else:
            return


def main() -> None:
    """``penstock workers``."""
    run_local(os.environ.get(RAY_TEMP_VARIABLE))


if __name__ == "__main__":
    main()
