"""The parts of the demo: how each starts, when it is ready, and how all of them end."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
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
        self._run = run
        self._processes: dict[str, ServerProcess] = {}
        self._events = LogFollower(run.log("workers"))
        self._ready = False

    def parts(self) -> list[str]:
        """Names of the parts, in the order they are shown."""
        kafka = ["kafka"] if self._kafka else []
        return ["redis", *kafka, "ray", *self._options.engines, "ingress"]

    async def start(self, board: Board) -> None:
        """Start everything side by side. Raises :class:`PartFailed` as soon as one part has failed."""
        os.environ.update(self._environment())
        self._check_port()
        await self._part("redis", _in_thread(self._redis.start), board)
        self._launch("workers")
        await _all([self._ray_then_ingress(board), *(self._part(*part, board) for part in self._beside_ray())])
        self._ready = True

    async def watch(self) -> None:
        """Return never; raises :class:`PartFailed` when a part dies."""
        while True:
            self._check_alive()
            await asyncio.sleep(POLL_S)

    async def stop(self) -> None:
        """End everything: in good order if it was up, else at once, for there is nothing to lose."""
        for process in reversed(self._processes.values()):
            await asyncio.to_thread(process.stop if self._ready else process.kill)
        if self._kafka:
            await asyncio.to_thread(self._kafka.stop)
        await asyncio.to_thread(self._redis.stop)

    def _beside_ray(self) -> Iterator[tuple[str, Awaitable[None]]]:
        if self._kafka:
            yield "kafka", _in_thread(self._kafka.start)
        for role, count in self._options.engines.items():
            yield role, self._engines(role, count)

    async def _ray_then_ingress(self, board: Board) -> None:
        """Ray gives itself 30 s to start: the ingress, which the engines outlast anyway, waits for it."""
        await self._part("ray", self._until(self._ray_is_up), board)
        self._launch("ingress")
        await self._part("ingress", self._serving(), board)

    def _launch(self, command: str) -> None:
        words = [sys.executable, "-m", "penstock.serving.cli", command]
        self._processes[command] = process = ServerProcess(words, self._run.log(command))
        process.start(lambda: process.alive)  # enough here: what makes it ready is asked by its own part

    async def _part(self, name: str, ready: Awaitable[None], board: Board) -> None:
        try:
            await ready
        except ServerError as error:
            raise PartFailed(name, str(error)) from error
        board.ready(name)

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

    def _check_port(self) -> None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self._port))
            except OSError as error:
                raise PartFailed("ingress", f"port {self._port}: {error.strerror}") from error

    def _check_alive(self) -> None:
        for command, process in self._processes.items():
            if not process.alive:
                raise PartFailed(command, cause_of_death(self._run.log(command)))

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
            "PENSTOCK_FILES_ROOT": str(self._run.temporary / "files"),
            "PENSTOCK_RAY_TEMP": str(self._run.temporary / "ray"),
            "TMPDIR": str(self._run.temporary),
            "PYTHONUNBUFFERED": "1",
            "RAY_COLOR_PREFIX": "0",
            "RAY_DEDUP_LOGS": "0",  # each engine's own words, as it said them
            "RAY_USAGE_STATS_ENABLED": "0",
            "VLLM_NO_USAGE_STATS": "1",
        } | {f"PENSTOCK_WORKERS_{role.upper()}": str(count) for role, count in counts.items()}


async def _all(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
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
