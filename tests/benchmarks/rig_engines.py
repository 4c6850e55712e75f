"""``python -m tests.benchmarks.rig_engines N``: N simulated engines of the settings' pool, in one process."""

from __future__ import annotations

import os
import signal
import sys
import threading
import uuid

import msgspec

from penstock.queue.logs import configure_logging
from penstock.queue.registry import Replica
from penstock.queue.settings import ModelSettings, RedisSettings
from penstock.workers.host import EngineHost
from penstock.workers.metrics import EngineMetrics
from penstock.workers.settings import WorkerSettings
from penstock.workers.simulated.engine import SimulatedEngine

ROLE = "mixed"


def host(redis: RedisSettings, model: ModelSettings, workers: WorkerSettings) -> EngineHost:
    """One engine at work."""
    engine = SimulatedEngine(model, workers, ROLE)
    name = f"{ROLE}-{uuid.uuid4().hex[:12]}"
    info = msgspec.to_builtins(engine.info)
    replica = Replica(id=name, pool=model.pool, role=ROLE, node="here", pid=os.getpid(), **info)
    return EngineHost(engine, redis, replica, EngineMetrics(model.served_name, ROLE, name))


def main() -> None:
    """Run until SIGTERM."""
    configure_logging("engines")
    redis, model, workers = RedisSettings(), ModelSettings(), WorkerSettings()
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    hosts = [host(redis, model, workers) for _ in range(int(sys.argv[1]))]
    for one in hosts:
        one.start()
    ended.wait()
    os._exit(0)  # two hundred orderly ends take longer than the measurement


if __name__ == "__main__":
    main()
