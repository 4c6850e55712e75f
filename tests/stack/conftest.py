"""One stack for the whole session: vLLM prefill and decode engines on Ray, reached through both queues.

Engines do not know which queue their work came from, so one set of them serves two dispatchers and two ingresses, one
on Redis Streams and one on Apache Kafka.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from penstock.queue.local.kafka_broker import KafkaBroker
from penstock.queue.local.process import ServerProcess, free_port
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.settings import RedisSettings
from penstock.workers.demo_model import demo_model_path
from tests.contract.conftest import kafka_broker, redis_server  # noqa: F401  (fixtures)
from tests.support.waiting import eventually

MODEL = "penstock-demo"
START_TIMEOUT_S = 600
"""Three interpreters import vLLM on two cores: about a minute, and several on a machine that is doing other things."""


ENGINE_ARGS = {
    "max_num_seqs": 64,
    # A model that has not learnt JSON would fill its answer with the white space that a grammar allows.
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
POLL_S = 0.5
"""How often readiness is asked for; the parts need the processor more."""


@dataclass(frozen=True)
class RunningStack:
    """Where the stack's ingresses are, by queue, and how to reach its Redis."""

    urls: dict[str, str]
    redis: RedisSettings
    logs: Path
    environment: dict[str, str]
    """Of every part that is on the Redis queue."""

    @property
    def model(self) -> str:
        return MODEL


def _environment(redis: RedisServer, folder: Path) -> dict[str, str]:
    return os.environ | {
        "PENSTOCK_REDIS_URL": redis.url,
        "PENSTOCK_MODEL_PATH": str(demo_model_path()),
        "PENSTOCK_MODEL_NAME": MODEL,
        # Exactness is asserted token for token, and bfloat16 rounds differently with the shape of the batch.
        "PENSTOCK_MODEL_DTYPE": "float32",
        "PENSTOCK_MODEL_MAX_MODEL_LEN": "4096",
        "PENSTOCK_MODEL_ENGINE_ARGS": json.dumps(ENGINE_ARGS),
        "PENSTOCK_WORKERS_DISPATCHERS": "1",
        "PENSTOCK_INGRESS_TOOL_CALL_PARSER": "hermes",
        "PENSTOCK_INGRESS_MAX_BODY_BYTES": str(1024 * 1024),
        "PENSTOCK_FILES_ROOT": str(folder / "files"),
        "PENSTOCK_RAY_TEMP": str(folder / "ray"),
        "RAY_DEDUP_LOGS": "0",
    }


def _process(command: str, name: str, environment: dict[str, str], folder: Path) -> ServerProcess:
    words = ["env", *(f"{k}={v}" for k, v in environment.items() if k.startswith(("PENSTOCK_", "RAY_")))]
    return ServerProcess([*words, sys.executable, "-m", "penstock.serving.cli", command], folder / f"{name}.log")


@pytest.fixture(scope="session")
def stack(
    redis_server: RedisServer,  # noqa: F811
    kafka_broker: KafkaBroker,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningStack]:
    """The running stack; ready on both queues."""
    folder = tmp_path_factory.mktemp("stack")
    on_redis = _environment(redis_server, folder)
    on_kafka = on_redis | {"PENSTOCK_QUEUE_BACKEND": "kafka", "PENSTOCK_QUEUE_BOOTSTRAP": kafka_broker.bootstrap}
    ports = {"redis": free_port(), "kafka": free_port()}
    processes = [
        _process("workers", "workers", on_redis, folder),
        _process("dispatcher", "dispatcher-kafka", on_kafka, folder),
        _process("ingress", "ingress-redis", on_redis | {"PENSTOCK_INGRESS_PORT": str(ports["redis"])}, folder),
        _process("ingress", "ingress-kafka", on_kafka | {"PENSTOCK_INGRESS_PORT": str(ports["kafka"])}, folder),
    ]
    urls = {queue: f"http://127.0.0.1:{port}" for queue, port in ports.items()}
    try:
        workers, *others = processes
        _start(workers)
        log = folder / "workers.log"  # Ray gives itself 30 s to start: nothing else may take the processor meanwhile
        eventually(lambda: "ray_ready" in log.read_text(), START_TIMEOUT_S, f"Ray is up; see {log}", POLL_S)
        for process in others:
            _start(process)
        with httpx.Client(timeout=5, trust_env=False) as client:
            for url in urls.values():
                _await_ready(client, url, processes, folder)
        yield RunningStack(urls, RedisSettings(url=redis_server.url), folder, on_redis)
    finally:
        for process in reversed(processes):
            process.stop()


@contextmanager
def extra_ingress(stack: RunningStack, port: int, **settings: str) -> Iterator[str]:
    """One more ingress on the Redis queue, with settings of its own; its base address."""
    environment = stack.environment | {"PENSTOCK_INGRESS_PORT": str(port)} | settings
    process, url = _process("ingress", f"ingress-{port}", environment, stack.logs), f"http://127.0.0.1:{port}"
    try:
        _start(process)
        with httpx.Client(timeout=5, trust_env=False) as client:
            _await_ready(client, url, [process], stack.logs)
        yield url
    finally:
        process.stop()


def _start(process: ServerProcess) -> None:
    process.start(lambda: process.alive)  # readiness is asked of the whole stack


def _await_ready(client: httpx.Client, url: str, processes: list[ServerProcess], folder: Path) -> None:
    def ready() -> bool:
        assert all(process.alive for process in processes), f"a part of the stack has ended; logs in {folder}"
        try:
            return client.get(f"{url}/ready").is_success
        except httpx.TransportError:
            return False

    eventually(ready, START_TIMEOUT_S, f"{url} is ready; logs in {folder}", POLL_S)


@pytest.fixture(params=["redis", "kafka"])
def url(request: pytest.FixtureRequest, stack: RunningStack) -> str:
    """Base address of an ingress, once on each queue."""
    return stack.urls[request.param]
