"""One deployment for all tests that ask real ingresses for answers again."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from penstock.queue.local.redis_server import RedisServer
from tests.contract.servers import start
from tests.support.simulated_stack import Shape, SimulatedStack

SHAPE = Shape(
    prefill=0,
    decode=0,
    mixed=1,
    dispatchers=1,
    ingresses=2,
    settings={"PENSTOCK_INGRESS_TOOL_CALL_PARSER": "hermes"},
)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatedStack]:
    """Two ingresses, a dispatcher and a simulated engine, each a process of its own."""
    folder = tmp_path_factory.mktemp("stack")
    probe = RedisServer(folder / "probe")
    start(probe)  # skips, or fails in CI, where there is no Redis
    probe.stop()
    with SimulatedStack(folder, SHAPE) as running:
        yield running


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=60, trust_env=False) as client:
        yield client
