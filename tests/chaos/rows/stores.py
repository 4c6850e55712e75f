"""Brokers and Redis that die, stall, fill up or come back without their last second."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from penstock.queue.kafka_client import REQUEST_TIMEOUT_S, Topics, ensure_topics, open_client
from penstock.queue.local.kafka_broker import KafkaBroker, KafkaCluster
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.redis_client import connect
from penstock.queue.settings import QueueSettings
from tests.chaos.load import Load
from tests.chaos.outcome import Scale, Size
from tests.chaos.round import Round
from tests.chaos.row import Row
from tests.chaos.rows.engines import PATIENT
from tests.support.simulated_stack import POOL, Shape
from tests.support.waiting import eventually_async

MIXED_REDIS = Shape(prefill=0, decode=0, mixed=2, settings=PATIENT)
MIXED_KAFKA = Shape(prefill=0, decode=0, mixed=2, queue="kafka", settings=PATIENT)
THREE_BROKERS = Shape(prefill=0, decode=0, mixed=2, queue="kafka", brokers=3, settings=PATIENT)
IN_SYNC_S = 60.0
"""For a restarted broker to have caught up: another may not die before, or nobody could be written to."""
LOST_BYTES = 20_000
"""Cut off the append-only file: some hundred appends, what a second of a busy Redis may lose with its host."""


async def broker_kill(round_: Round) -> None:
    """SIGKILL of the broker that holds the accepted work, and its start again."""
    server = round_.stack.kafka or round_.stack.redis
    assert not isinstance(server, KafkaCluster)
    await _faults(round_, lambda round_: round_.inject("kill -9 of the broker", bounce, server))


async def leader_kill(round_: Round) -> None:
    """SIGKILL of the broker that leads most partitions, and its start again: the others lead meanwhile."""
    cluster = round_.stack.kafka
    assert isinstance(cluster, KafkaCluster)
    watch = await asyncio.to_thread(Leaders, round_.stack.queue_settings)

    async def fault(round_: Round) -> None:
        leader = await asyncio.to_thread(watch.leader)
        victim = next(broker for broker in cluster.brokers if broker.node == leader)
        await round_.inject(f"kill -9 of broker {leader}", victim.kill)
        await eventually_async(lambda: _elsewhere(watch, leader), IN_SYNC_S, "other brokers lead")
        await asyncio.to_thread(victim.start)
        await eventually_async(lambda: asyncio.to_thread(watch.in_sync), IN_SYNC_S, "all brokers are in sync")

    await _faults(round_, fault)


async def _elsewhere(watch: Leaders, node: int) -> bool:
    return await asyncio.to_thread(watch.leader) not in (None, node)


async def redis_kill(round_: Round) -> None:
    """SIGKILL of the Redis that holds the emitted tokens; every other time its last appends are lost, too."""

    def fault(round_: Round) -> Awaitable[None]:
        damage = _truncate if round_.outcome.injected % 2 == 0 else None
        return round_.inject("kill -9 of Redis", bounce, round_.stack.redis, damage)

    await _faults(round_, fault, exact_logs=False)


async def redis_stall(round_: Round) -> None:
    """SIGSTOP of Redis."""
    await _faults(round_, _stall)


async def redis_full(round_: Round) -> None:
    """Redis refuses writes (OOM) for a while."""
    await _faults(round_, _fill)


async def trouble(round_: Round, turn: int) -> None:
    """A kill, a stall, a time of no room: one of them, by turns."""
    kinds = (_stall, _fill, lambda round_: round_.inject("kill -9 of Redis", bounce, round_.stack.redis))
    await kinds[turn % len(kinds)](round_)


async def _stall(round_: Round) -> None:
    server = round_.stack.redis.process
    assert server is not None
    await round_.inject("SIGSTOP of Redis", os.kill, server.pid, signal.SIGSTOP)
    await round_.sleep(round_.size.seconds)
    os.kill(server.pid, signal.SIGCONT)


async def _fill(round_: Round) -> None:
    with connect(round_.stack.redis_settings) as client:
        await round_.inject("Redis is full", client.config_set, "maxmemory", 1)
        await round_.sleep(round_.size.seconds)
        await asyncio.to_thread(client.config_set, "maxmemory", 0)


class Leaders:
    """Who leads the partitions of the pool's topics, and whether their copies are complete. Blocking."""

    def __init__(self, queue: QueueSettings) -> None:
        self._admin = open_client(AdminClient, queue)
        self._topics = Topics.of(POOL)
        ensure_topics(self._admin, queue, self._topics)

    def leader(self) -> int | None:
        """The node that leads most partitions; None while any has no leader, or nobody answers."""
        leaders = Counter(partition.leader for partition in self._partitions())
        return None if not leaders or -1 in leaders else leaders.most_common(1)[0][0]

    def in_sync(self) -> bool:
        """Whether every broker has every record."""
        partitions = self._partitions()
        return bool(partitions) and all(len(partition.isrs) == len(partition.replicas) for partition in partitions)

    def _partitions(self) -> list[Any]:
        try:
            found = self._admin.list_topics(timeout=REQUEST_TIMEOUT_S).topics
        except KafkaException:
            return []
        return [partition for topic in self._topics.classes for partition in found[topic].partitions.values()]


def bounce(server: RedisServer | KafkaBroker, damage: Callable[[Path], None] | None = None) -> None:
    """SIGKILL and start again; in between, ``damage`` what Redis has appended to."""
    server.kill()
    if damage is not None:
        damage(append_only_file(server.folder))
    server.start()


def append_only_file(folder: Path) -> Path:
    """The one Redis appends to now."""
    return max((*folder.glob("appendonlydir/*.incr.aof"), *folder.glob("appendonly.aof")), key=os.path.getmtime)


def _truncate(file: Path) -> None:
    """What a host that lost power would find: the append-only file without its end."""
    os.truncate(file, max(0, file.stat().st_size - LOST_BYTES))


async def _faults(round_: Round, fault: Callable[[Round], Awaitable[None]], *, exact_logs: bool = True) -> None:
    async def faults(load: Load) -> None:
        for _ in range(round_.size.faults):
            await load.progressed(_some(round_))
            await fault(round_)

    async with round_.load() as load:
        await round_.steady(load, faults)
        await round_.conclude(load, exact_logs=exact_logs)


def _some(round_: Round) -> int:
    return round_.rng.randint(1, round_.size.streams * round_.size.tokens)


ROWS = [
    Row(
        "broker-kill-redis",
        "broker hard kill: Redis Streams",
        MIXED_REDIS,
        {Scale.TEST: Size(3, 32, 128), Scale.SHORT: Size(10, 64, 256), Scale.LONG: Size(20, 64, 256)},
        broker_kill,
    ),
    Row(
        "redis-stall",
        "Redis stalls",
        MIXED_REDIS,
        {
            Scale.TEST: Size(1, 32, 128, seconds=3),
            Scale.SHORT: Size(2, 64, 256, seconds=5),
            Scale.LONG: Size(5, 64, 256, seconds=5),
        },
        redis_stall,
    ),
    Row(
        "redis-full",
        "Redis is full (OOM)",
        MIXED_REDIS,
        {
            Scale.TEST: Size(1, 32, 128, seconds=2),
            Scale.SHORT: Size(2, 64, 256, seconds=5),
            Scale.LONG: Size(5, 64, 256, seconds=10),
        },
        redis_full,
    ),
    Row(
        "broker-kill-kafka",
        "broker hard kill: Apache Kafka",
        MIXED_KAFKA,
        {Scale.TEST: Size(1, 32, 128), Scale.SHORT: Size(5, 64, 256), Scale.LONG: Size(20, 64, 256)},
        broker_kill,
    ),
    Row(
        "redis-kill",
        "Redis kill -9, half of them losing the last appends",
        MIXED_KAFKA,
        {Scale.TEST: Size(2, 32, 128), Scale.SHORT: Size(10, 64, 256), Scale.LONG: Size(20, 64, 256)},
        redis_kill,
    ),
    Row(
        "leader-kill-kafka",
        "kill -9 of the leader, three brokers",
        THREE_BROKERS,
        {Scale.TEST: Size(1, 16, 64), Scale.SHORT: Size(4, 64, 256), Scale.LONG: Size(20, 64, 256)},
        leader_kill,
    ),
]
