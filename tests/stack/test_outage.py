"""An ingress whose broker or Redis goes away, and its API keys. Its servers are its own, and it has no engines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from penstock.queue.local.kafka_broker import KafkaBroker
from penstock.queue.local.process import Server, ServerProcess, free_port
from penstock.queue.local.redis_server import RedisServer
from penstock.workers.demo_model import demo_model_path
from tests.contract.servers import start
from tests.support.waiting import eventually

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

MODEL = "penstock-demo"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
START_TIMEOUT_S = 300
BACK_S = 60
"""Kafka's restart, and the clients' reconnection after their back-off."""


Away = Callable[[Server], AbstractContextManager[None]]


@dataclass(frozen=True)
class Lonely:
    """An ingress with nothing behind its queue."""

    url: str
    redis: RedisServer
    kafka: KafkaBroker
    environment: dict[str, str]


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lonely]:
    folder: Path = tmp_path_factory.mktemp("lonely")
    redis, kafka = RedisServer(folder / "redis"), KafkaBroker(folder / "kafka")
    start(redis)
    start(kafka)
    port = free_port()
    environment = {
        "PENSTOCK_REDIS_URL": redis.url,
        "PENSTOCK_QUEUE_BACKEND": "kafka",
        "PENSTOCK_QUEUE_BOOTSTRAP": kafka.bootstrap,
        "PENSTOCK_MODEL_PATH": str(demo_model_path()),
        "PENSTOCK_MODEL_NAME": MODEL,
        "PENSTOCK_MODEL_MAX_MODEL_LEN": "4096",
        "PENSTOCK_INGRESS_PORT": str(port),
    }
    words = ["env", *(f"{name}={value}" for name, value in environment.items())]
    ingress = ServerProcess([*words, sys.executable, "-m", "penstock.serving.cli", "ingress"], folder / "ingress.log")
    ingress.start(lambda: ingress.alive)
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: _alive(url), START_TIMEOUT_S, "the ingress listens", 0.5)
        yield Lonely(url, redis, kafka, environment)
    finally:
        ingress.stop()
        kafka.stop()
        redis.stop()


def _alive(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).is_success
    except httpx.TransportError:
        return False


def _missing(url: str) -> set[str]:
    return set(httpx.get(f"{url}/ready", timeout=30, trust_env=False).json()["missing"])


def _penstock(lonely: Lonely, *words: str) -> str:
    command = [sys.executable, "-m", "penstock.serving.cli", *words]
    out = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | lonely.environment, timeout=60
    )
    return out.stdout.strip()


def test_not_ready_without_engines(lonely: Lonely) -> None:
    assert _missing(lonely.url) == {"engine"}


@contextmanager
def dead(server: Server) -> Iterator[None]:
    """Connections are refused."""
    server.kill()
    try:
        yield
    finally:
        server.start()


@contextmanager
def silent(server: Server) -> Iterator[None]:
    """Connections stand, and nobody answers on them."""
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


@pytest.mark.parametrize("away", [dead, silent])
@pytest.mark.parametrize(("part", "code"), [("queue", "queue_unavailable"), ("redis", "store_unavailable")])
def test_away(lonely: Lonely, away: Away, part: str, code: str) -> None:
    """503 with Retry-After, and ready again once it is back."""
    with away(lonely.kafka if part == "queue" else lonely.redis):
        answer = httpx.post(f"{lonely.url}/v1/chat/completions", json=CHAT, timeout=60)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == code
        assert part in _missing(lonely.url)
    eventually(lambda: part not in _missing(lonely.url), BACK_S, "it is back")


def test_keys(lonely: Lonely) -> None:
    """Without keys all may come in (on loopback); with the first one nobody without; a revoked one not any more."""

    def status(**headers: str) -> int:
        return httpx.get(f"{lonely.url}/v1/models", headers=headers, timeout=30).status_code

    assert status() == 200
    key = _penstock(lonely, "keys", "create", "--tenant", "search", "--name", "test")
    eventually(lambda: status() == 401, BACK_S, "a key is needed")
    assert status(authorization=f"Bearer {key}") == 200
    assert status(**{"x-api-key": key}) == 200
    assert status(authorization="Bearer sk-ps-wrong") == 401
    listed = _penstock(lonely, "keys", "list")
    assert "search" in listed
    assert key not in listed
    other = _penstock(lonely, "keys", "create", "--tenant", "ads")
    _penstock(lonely, "keys", "revoke", listed.split("\t")[0])
    eventually(lambda: status(authorization=f"Bearer {key}") == 401, BACK_S, "the revoked key is refused")
    assert status(authorization=f"Bearer {other}") == 200
