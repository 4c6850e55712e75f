"""One engine as a process of its own: the body of a Ray Serve replica, or by itself without Ray."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid

import msgspec
import structlog

from penstock.queue.logs import VLLM_ENVIRONMENT, configure_logging
from penstock.queue.registry import Replica
from penstock.queue.settings import ModelSettings, RedisSettings
from penstock.workers.engine import Engine
from penstock.workers.host import EngineHost
from penstock.workers.metrics import EngineMetrics
from penstock.workers.settings import CPU_ENVIRONMENT, WorkerSettings

SIGNAL_S = 1.0
"""How late SIGTERM may be noticed. A process that is stopped when it comes gives it to any of its threads when it goes
on, and Python's handler waits until the main thread, which it does not wake, does something."""
log = structlog.get_logger()


def engine_environment(model: ModelSettings) -> dict[str, str]:
    """Environment of engine processes; what the operator has set already stays."""
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        **VLLM_ENVIRONMENT,
    }
    if not _has_gpu():
        wanted |= CPU_ENVIRONMENT
    if os.path.isdir(model.path):
        wanted["HF_HUB_OFFLINE"] = "1"
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def _has_gpu() -> bool:
    return os.path.exists("/dev/nvidiactl")


def build_engine(model: ModelSettings, workers: WorkerSettings, role: str) -> Engine:
    """The configured engine. Imports vLLM only when it is asked for: that alone takes fifteen seconds."""
    if workers.engine == "simulated":
        from penstock.workers.simulated.engine import SimulatedEngine

        return SimulatedEngine(model, workers, role)
    from penstock.workers.vllm_engine import VllmEngine

    return VllmEngine(model, role, workers.nixl_progress_delay_us)


def start_host(
    redis: RedisSettings, model: ModelSettings, workers: WorkerSettings, role: str, node: str, replica_id: str
) -> EngineHost:
    """Build the engine and set it to work; ``node`` is the address at which others reach this process."""
    started = time.monotonic()
    engine = build_engine(model, workers, role)
    metrics = EngineMetrics(model.served_name, role, replica_id)
    info = msgspec.to_builtins(engine.info)
    replica = Replica(
        id=replica_id,
        pool=model.pool,
        role=role,
        node=node,
        pid=os.getpid(),
        metrics=f"{node}:{metrics.serve(node)}",
        **info,
    )
    host = EngineHost(engine, redis, replica, metrics)
    host.start()
    log.info("replica_ready", replica=replica_id, role=role, seconds=round(time.monotonic() - started, 1), **info)
    return host


def new_replica_id(role: str) -> str:
    """A fresh name; a process that was restarted is another replica."""
    return f"{role}-{uuid.uuid4().hex[:12]}"


def main(role: str, node: str) -> None:
    """``penstock engine``: run until SIGTERM or SIGINT, then finish what runs, for a while, and leave."""
    configure_logging(role)
    model, workers = ModelSettings(), WorkerSettings()
    os.environ |= engine_environment(model)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    host = start_host(RedisSettings(), model, workers, role, node, new_replica_id(role))
    while not ended.wait(SIGNAL_S):
        continue
    host.drain(workers.drain_grace_s)
    host.stop()
