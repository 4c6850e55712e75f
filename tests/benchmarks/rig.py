"""Everything but the model and HTTP, on this machine: Redis, a dispatcher, simulated engines, and a client.

All parts are the real ones in processes of their own. The client (:mod:`tests.benchmarks.rig_client`) publishes and
reads as an ingress does; the engines' steps take no time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import msgspec
import redis

from penstock.queue.local.process import ServerProcess, Startable
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.redis_client import connect
from penstock.queue.settings import RedisSettings
from tests.benchmarks.processes import cpu_by_group, sample

HOSTS_A_PROCESS = 25
"""Simulated engines that share a process. Each has four threads; two hundred processes would not fit."""
READY_TIMEOUT_S = 120.0
"""A process of engines is up in two seconds, eight of them in ten, on two idle cores."""
POLL_S = 0.05
MAX_SEQS = 256
"""Streams of one simulated engine: vLLM's default on a server GPU."""


class RigError(RuntimeError):
    """A part did not start or ended; the message says which and where its log is."""


class Taken(NamedTuple):
    """What one measurement took: the client's answer, and CPU seconds by group."""

    answer: dict[str, float]
    cpu_s: dict[str, float]


class Rig(Startable):
    """``with Rig(folder, replicas) as rig: rig.measure(["32", ...])``."""

    def __init__(self, folder: Path, replicas: int) -> None:
        self._folder = folder
        self._replicas = replicas
        self.redis = RedisServer(folder / "redis")
        self._parts: dict[str, ServerProcess] = {}

    def stop(self) -> None:
        """Stop what was started, last started first."""
        for part in reversed(self._parts.values()):
            part.stop()
        self.redis.stop()

    @property
    def environment(self) -> dict[str, str]:
        """Settings of every part."""
        return {
            "PENSTOCK_CONFIG": os.devnull,
            "PENSTOCK_REDIS_URL": self.redis.url,
            "PENSTOCK_MODEL_PATH": "simulated",
            "PENSTOCK_MODEL_ENGINE_ARGS": f'{{"max_num_seqs": {MAX_SEQS}}}',
            "PENSTOCK_WORKERS_ENGINE": "simulated",
            "PENSTOCK_WORKERS_STEP_PROFILE": "instant",
            "PENSTOCK_WORKERS_PREFILL": "0",
            "PENSTOCK_WORKERS_DECODE": "0",
            "PENSTOCK_WORKERS_MIXED": str(self._replicas),
        }

    def measure(self, module: str, order: Sequence[int]) -> Taken:
        """Run a client process through its measurement; its imports and connections do not count."""
        with Client(module, order, self.environment, self._folder / "client.log") as client:
            roots = {part.pid: name.partition("-")[0] for name, part in self._parts.items()}
            roots |= {self.redis.process.pid: "redis"} if self.redis.process else {}
            before = sample(roots)
            answer = client.go()
            spent = cpu_by_group(before, sample(roots))
        for name, part in self._parts.items():
            if not part.alive:
                raise RigError(f"{name} ended: see {self._log(name)}")
        return Taken(answer, spent | {"client": answer["cpu_s"]})

    def start(self) -> None:
        self.redis.start()
        self._run("dispatcher", "penstock.serving.cli", "dispatcher")
        for number, first in enumerate(range(0, self._replicas, HOSTS_A_PROCESS)):
            hosts = min(HOSTS_A_PROCESS, self._replicas - first)
            self._run(f"engines-{number}", "tests.benchmarks.rig_engines", str(hosts))
        self._await_leases()

    def _run(self, name: str, module: str, *words: str) -> None:
        settings = [f"{key}={value}" for key, value in self.environment.items()]
        part = ServerProcess(["env", *settings, sys.executable, "-m", module, *words], self._log(name))
        self._parts[name] = part
        part.start(lambda: part.alive)

    def _await_leases(self) -> None:
        settings, deadline = RedisSettings(url=self.redis.url), time.monotonic() + READY_TIMEOUT_S
        with connect(settings) as client:
            while self._leases(client, settings) < self._replicas:
                if time.monotonic() > deadline or not all(part.alive for part in self._parts.values()):
                    raise RigError(f"not all {self._replicas} engines came up: see {self._folder}")
                time.sleep(POLL_S)

    @staticmethod
    def _leases(client: redis.Redis, settings: RedisSettings) -> int:
        return sum(1 for _ in client.scan_iter(f"{settings.namespace}replica:*"))

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"


class Client:
    """A process that says when it is ready, measures whenever told to, and answers with one line of JSON."""

    def __init__(self, module: str, order: Sequence[int | str], environment: dict[str, str], log: Path) -> None:
        words = [sys.executable, "-m", module, *(str(word) for word in order)]
        self._module = module
        self._log = log
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=os.environ | environment,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        self._line()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.kill()
        self._process.communicate()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def go(self) -> dict[str, float]:
        """Measure. Raises :class:`RigError` when the process ends without an answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._line(), type=dict[str, float])

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line
        raise RigError(f"{self._module} ended: see {self._log}")


def serve_client(measure: Callable[[], dict[str, float]]) -> None:
    """The other end of :class:`Client`: ``measure`` is called for every line that comes in."""
    with os.fdopen(os.dup(1), "wb", buffering=0) as answers:
        os.dup2(2, 1)  # what libraries print is no answer
        answers.write(b"\n")
        while sys.stdin.readline():
            answers.write(msgspec.json.encode(measure()) + b"\n")
