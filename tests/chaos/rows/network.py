"""The network between the parts and Redis or Kafka: late, cut, or connected to nobody."""

from __future__ import annotations

from collections.abc import Callable

from tests.chaos.load import Load
from tests.chaos.outcome import Scale, Size
from tests.chaos.round import Round
from tests.chaos.row import Row
from tests.chaos.rows.engines import PATIENT
from tests.support.fault_proxy import FaultProxy
from tests.support.simulated_stack import Shape

BEHIND_PROXY = Shape(prefill=0, decode=0, mixed=2, proxied="redis", settings=PATIENT)
KAFKA_BEHIND_PROXY = Shape(prefill=0, decode=0, mixed=2, queue="kafka", proxied="kafka", settings=PATIENT)
LATENCY_MS = 30
"""Another region, or a switch in trouble."""


async def network(round_: Round) -> None:
    """Latency, a cut and a half-open connection, one after the other, in a drawn order."""
    proxy = round_.stack.proxy
    assert proxy is not None
    kinds: list[Callable[[FaultProxy], None]] = [
        lambda proxy: proxy.delay(LATENCY_MS, LATENCY_MS // 3),
        FaultProxy.cut,
        FaultProxy.silence,
    ]

    async def faults(load: Load) -> None:
        for turn in range(round_.size.faults):
            if turn % len(kinds) == 0:
                round_.rng.shuffle(kinds)
            await load.progressed(round_.rng.randint(1, round_.size.streams * round_.size.tokens // 2))
            await round_.inject("network fault", kinds[turn % len(kinds)], proxy)
            await round_.sleep(round_.size.seconds)
            proxy.heal()

    async with round_.load(redis=round_.stack.proxied_redis_settings) as load:
        await round_.steady(load, faults)
        await round_.conclude(load)


ROWS = [
    Row(
        "network",
        "network to Redis: latency, cut, half-open",
        BEHIND_PROXY,
        {
            Scale.TEST: Size(3, 32, 128, seconds=1.5),
            Scale.SHORT: Size(6, 64, 256, seconds=5),
            Scale.LONG: Size(30, 64, 256, seconds=8),
        },
        network,
    ),
    Row(
        "network-kafka",
        "network to Kafka: latency, cut, half-open",
        KAFKA_BEHIND_PROXY,
        {
            Scale.TEST: Size(3, 16, 64, seconds=3),
            Scale.SHORT: Size(6, 64, 256, seconds=8),
            Scale.LONG: Size(30, 64, 256, seconds=8),
        },
        network,
    ),
]
