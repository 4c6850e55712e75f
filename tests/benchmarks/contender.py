"""The life of one server under test: start, readiness, its processes, stop."""

from __future__ import annotations

import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import httpx

from penstock.queue.local.process import ServerProcess, free_port
from penstock.serving.demo.events import cause_of_death
from penstock.serving.demo.processes import Process, descendants, end
from tests.benchmarks.processes import Sample, sample

READY_TIMEOUT_S = 300.0
"""A cold start takes 40 to 60 s on two idle cores; five times that is a server that will never come up."""
PROBE_TIMEOUT_S = 5.0
"""For one probe; Penstock's gives each of its checks two seconds."""
POLL_S = 0.1
"""How often readiness is asked for: the resolution of the times until ready."""
STOP_TIMEOUT_S = 40.0
"""Ray Serve gives each replica up to 30 s; then comes the force of :meth:`ServerProcess.stop`."""
LINGER_S = 5.0
"""How long processes may outlive the orderly stop of their parent before they count as left behind."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}
"""For every process of every contender. One thread an engine: there are two cores."""


class ContenderError(RuntimeError):
    """A contender did not start or died; the message says why."""


class Model(NamedTuple):
    """A model folder and its dtype."""

    path: str
    dtype: str


class Contender(ABC):
    """One server under test: ``with contender: ...`` runs it; :attr:`url` answers OpenAI requests meanwhile.

    Its files and logs live in ``folder``, whose path must be short: Ray puts sockets there.
    """

    ready_path: str

    def __init__(self, name: str, folder: Path, model: Model) -> None:
        self.name = name
        self.left_behind: list[str] = []
        self._folder = folder
        self._model = model
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._processes: dict[str, ServerProcess] = {}
        self._ready_s: dict[str, float] = {}

    @abstractmethod
    def _launch(self) -> None:
        """Start all processes without waiting for them."""

    @abstractmethod
    def roots(self) -> dict[int, str]:
        """The process ids at the top of this contender's trees, with the group each belongs to."""

    def ready_s(self) -> dict[str, float]:
        """Seconds from the start until each part was ready; ``all``: until requests are answered."""
        return self._ready_s

    def sample(self) -> Sample:
        """Its processes now."""
        return sample(self.roots())

    def __enter__(self) -> Self:
        started = time.time()
        try:
            self._launch()
            self._await_ready()
        except BaseException:
            self.stop()
            raise
        self._ready_s["all"] = round(time.time() - started, 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def check_alive(self) -> None:
        """Raises :class:`ContenderError` when one of its processes has ended."""
        for part, process in self._processes.items():
            if not process.alive:
                raise ContenderError(f"{self.name}: {part} ended: {cause_of_death(self._log(part))}")

    def stop(self) -> None:
        """Stop in good order; what is left then is noted in :attr:`left_behind` and ended."""
        members = self.sample()
        self._stop_parts()
        if lingering := _lingering(set(members)):
            self.left_behind = [members[process].title for process in lingering]
            end(lingering)

    def _stop_parts(self) -> None:
        """Stop what was started, last started first."""
        for process in reversed(self._processes.values()):
            _terminate(process)
            process.stop()

    def _run(self, part: str, module: str, *arguments: str, **environment: str) -> None:
        """Start ``python -m module`` as a part of this contender."""
        assignments = [f"{name}={value}" for name, value in (ENVIRONMENT | environment).items()]
        process = ServerProcess(["env", *assignments, sys.executable, "-m", module, *arguments], self._log(part))
        self._processes[part] = process
        process.start(lambda: process.alive)  # when it answers is asked for all parts together

    def _log(self, part: str) -> Path:
        return self._folder / f"{part}.log"

    def _await_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        with httpx.Client(timeout=PROBE_TIMEOUT_S, trust_env=False) as client:
            while not _answers(client, self.url + self.ready_path):
                self.check_alive()
                if time.monotonic() > deadline:
                    raise ContenderError(f"{self.name} was not ready after {READY_TIMEOUT_S:.0f} s: see {self._folder}")
                time.sleep(POLL_S)


def _answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).is_success
    except httpx.TransportError:
        return False


def _terminate(process: ServerProcess) -> None:
    """Ask a process to stop and give it the time that taking down a Ray needs."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    if process.alive:
        os.kill(process.pid, signal.SIGTERM)
    while process.alive and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _lingering(members: set[Process]) -> list[Process]:
    """Those of ``members`` that outlive a grace period; this process adopts orphans, so it sees them."""
    deadline = time.monotonic() + LINGER_S
    while living := [process for process in descendants(os.getpid()) if process in members]:
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    return living
