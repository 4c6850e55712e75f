"""The parts of the demo: how each starts, when it is ready, and how all of them end."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

import httpx

from penstock.queue.errors import StoreUnavailable
from penstock.queue.local.kafka_broker import KafkaBroker
from penstock.queue.local.process import ServerError, ServerProcess, free_port
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.redis_client import connect_async
from penstock.queue.registry import Registry
from penstock.queue.settings import RedisSettings
from penstock.serving.demo.board import Board
from penstock.serving.demo.events import LogFollower, cause_of_death
from penstock.serving.demo.options import DemoOptions
from penstock.serving.demo.run import Run

POLL_S = 0.1
"""How often readiness is looked at: parts take seconds, and all of this shares two cores with them."""
PROBE_TIMEOUT_S = 5.0
"""For one ``GET /ready``, which itself gives each of its checks two seconds."""


class PartFailed(Exception):
    """A part did not start or died; ``cause`` is the innermost reason known."""

    def __init__(self, part: str, cause: str) -> None:
        super().__init__(f"{part}: {cause}")
        self.part = part
        self.cause = cause


class Stack:
    """All parts of one demo. :meth:`start` returns when an answer can be had from :attr:`url`."""

    def __init__(self, options: DemoOptions, run: Run) -> None:
        self._options = options
        self._redis = RedisServer(run.temporary / "redis")
        self._kafka = KafkaBroker(run.temporary / "kafka") if options.queue == "kafka" else None
        self._port = options.port or free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._workers = _penstock("workers", run)
        self._ingress = _penstock("ingress", run)
        self._workers_log = run.log("workers")
        self._ingress_log = run.log("ingress")
        self._events = LogFollower(self._workers_log)
        self._temporary = run.temporary
        self._ready = False

    def parts(self) -> list[str]:
        """Names of the parts, in the order they are shown."""
        kafka = ["kafka"] if self._kafka else []
        return ["redis", *kafka, "ray", *self._options.engines, "ingress"]

    async def start(self, board: Board) -> None:
        """Start everything side by side. Raises :class:`PartFailed` as soon as one part has failed."""
        os.environ.update(self._environment())
        await self._part("redis", _in_thread(self._redis.start), board)
        waits: dict[str, Awaitable[None]] = {"ray": self._ray(), "ingress": self._serving()}
        waits |= {role: self._engines(role, count) for role, count in self._options.engines.items()}
        if self._kafka:
            waits["kafka"] = _in_thread(self._kafka.start)
        for process in (self._workers, self._ingress):
            process.start(lambda: True)
        await _all(self._part(name, wait, board) for name, wait in waits.items())
        self._ready = True

    async def watch(self) -> None:
        """Return never; raises :class:`PartFailed` when a part dies."""
        while True:
            self._check_alive()
            await asyncio.sleep(POLL_S)

    async def stop(self) -> None:
        """End everything: in good order if it was up, else at once, for there is nothing to lose."""
        for process in (self._ingress, self._workers):
            await asyncio.to_thread(process.stop if self._ready else process.kill)
        if self._kafka:
            await asyncio.to_thread(self._kafka.stop)
        await asyncio.to_thread(self._redis.stop)

    async def _part(self, name: str, ready: Awaitable[None], board: Board) -> None:
        try:
            await ready
        except ServerError as error:
            raise PartFailed(name, str(error)) from error
        board.ready(name)

    async def _ray(self) -> None:
        await self._until(self._ray_is_up)

    async def _ray_is_up(self) -> bool:
        return "ray_ready" in self._events.events()

    async def _engines(self, role: str, count: int) -> None:
        settings = RedisSettings(url=self._redis.url)
        async with connect_async(settings) as client:
            registry = Registry(client, settings)

            async def enough() -> bool:
                self._check_engines()
                with suppress(StoreUnavailable):
                    return sum(r.role == role for r in (await registry.alive()).values()) >= count
                return False

            await self._until(enough)

    async def _serving(self) -> None:
        async with httpx.AsyncClient(timeout=PROBE_TIMEOUT_S, trust_env=False) as client:

            async def answers() -> bool:
                with suppress(httpx.TransportError):
                    return (await client.get(f"{self.url}/ready")).is_success
                return False

            await self._until(answers)

    async def _until(self, ready: Callable[[], Awaitable[bool]]) -> None:
        while not await ready():
            self._check_alive()
            await asyncio.sleep(POLL_S)

    def _check_alive(self) -> None:
        if not self._workers.alive:
            raise PartFailed("workers", cause_of_death(self._workers_log))
        if not self._ingress.alive:
            raise PartFailed("ingress", cause_of_death(self._ingress_log))

    def _check_engines(self) -> None:
        if failed := self._events.events().get("engine_failed"):
            raise PartFailed(f"{failed.get('role', 'an')} engine", str(failed.get("cause")))

    def _environment(self) -> dict[str, str]:
        from penstock.workers.demo_model import demo_model_path

        counts = {"prefill": 0, "decode": 0, "mixed": 0} | self._options.engines
        return {
            "PENSTOCK_REDIS_URL": self._redis.url,
            "PENSTOCK_QUEUE_BACKEND": self._options.queue,
            "PENSTOCK_QUEUE_BOOTSTRAP": self._kafka.bootstrap if self._kafka else "",
            "PENSTOCK_MODEL_PATH": self._options.model or str(demo_model_path()),
            "PENSTOCK_MODEL_NAME": "" if self._options.model else "penstock-demo",
            "PENSTOCK_INGRESS_HOST": "127.0.0.1",
            "PENSTOCK_INGRESS_PORT": str(self._port),
            "PENSTOCK_RAY_TEMP": str(self._temporary / "ray"),
            "TMPDIR": str(self._temporary),
            "PYTHONUNBUFFERED": "1",
            "RAY_COLOR_PREFIX": "0",
            "RAY_DEDUP_LOGS": "0",  # each engine's own words, as it said them
            "RAY_USAGE_STATS_ENABLED": "0",
            "VLLM_NO_USAGE_STATS": "1",
        } | {f"PENSTOCK_WORKERS_{role.upper()}": str(count) for role, count in counts.items()}


def _penstock(command: str, run: Run) -> ServerProcess:
    return ServerProcess([sys.executable, "-m", "penstock.serving.cli", command], run.log(command))


async def _all(coroutines: Any) -> None:
    """Run these side by side; the first failure cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(coroutine)
    except* PartFailed as failures:
        raise failures.exceptions[0] from None


def _in_thread(action: Callable[[], None]) -> Coroutine[Any, Any, None]:
    """Run a blocking start in a thread that nobody has to wait for when the demo ends meanwhile."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def work() -> None:
            try:
                action()
            except BaseException as error:
                result: BaseException | None = error
            else:
                result = None
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_resolve, done, result)

        threading.Thread(target=work, daemon=True).start()
        await done

    return run()


def _resolve(done: asyncio.Future[None], error: BaseException | None) -> None:
    if done.cancelled():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
