"""Brokers and Redis that die, stall, fill up or come back without their last second."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

from penstock.queue.local.kafka_broker import KafkaBroker
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.redis_client import connect
from tests.chaos.load import Load
from tests.chaos.outcome import Scale, Size
from tests.chaos.round import Round
from tests.chaos.row import Row
from tests.chaos.rows.engines import PATIENT
from tests.support.simulated_stack import Shape

MIXED_REDIS = Shape(prefill=0, decode=0, mixed=2, settings=PATIENT)
MIXED_KAFKA = Shape(prefill=0, decode=0, mixed=2, queue="kafka", settings=PATIENT)
LOST_BYTES = 20_000
"""Cut off the append-only file: some hundred appends, what a second of a busy Redis may lose with its host."""


async def broker_kill(round_: Round) -> None:
    """SIGKILL of the broker that holds the accepted work, and its start again."""
    server = round_.stack.kafka or round_.stack.redis
    await _faults(round_, lambda round_: round_.inject("kill -9 of the broker", bounce, server))


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
]
