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
from tests.benchmarks.processes import Sample, sample, signal_all

MODEL_NAME = "bench"
READY_TIMEOUT_S = 600.0
"""A cold start takes 40 to 140 s on two idle cores; four times that is a server that will never come up."""
PROBE_TIMEOUT_S = 5.0
"""For one probe; Penstock's gives each of its checks two seconds."""
ANSWER_TIMEOUT_S = 60.0
"""For the first answer: memory is touched, kernels are chosen and engines meet for the first time."""
THAW_S = 0.3
"""After a contender answers again: what its timers had missed is done, too."""
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
    workers: tuple[str, ...] = ("engine",)
    """Groups of processes that have to do something in every round."""

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
            self._await_answer()
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

    def freeze(self) -> None:
        """Stop all its processes where they are, so that it costs nothing while another contender is measured."""
        signal_all(self.sample(), signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on; returns when it answers and has settled."""
        signal_all(self.sample(), signal.SIGCONT)
        self._await_answer()
        time.sleep(THAW_S)

    def stop(self) -> None:
        """Stop in good order; what is left then is noted in :attr:`left_behind` and ended."""
        members = self.sample()
        signal_all(members, signal.SIGCONT)
        self._stop_parts()
        if lingering := _lingering(set(members)):
            self.left_behind = [members[process].title for process in lingering]
            end(lingering)

    def _stop_parts(self) -> None:
        """Stop what was started, last started first."""
        for process in reversed(self._processes.values()):
            _terminate(process)
            process.stop()

    def _run(self, part: str, *words: str | Path, python: str | Path = sys.executable, **environment: str) -> None:
        """Start ``python words...`` as a part of this contender."""
        assignments = [f"{name}={value}" for name, value in (ENVIRONMENT | environment).items()]
        process = ServerProcess(["env", *assignments, python, *words], self._log(part))
        self._processes[part] = process
        process.start(lambda: process.alive)  # when it answers is asked for all parts together

    def _log(self, part: str) -> Path:
        return self._folder / f"{part}.log"

    def _await_answer(self) -> None:
        """Until it says that it is ready, and until it answers a request with tokens: not everyone means the same."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        with httpx.Client(base_url=self.url, trust_env=False) as client:
            while not (_is_ready(client, self.ready_path) and self._completes(client)):
                self.check_alive()
                if time.monotonic() > deadline:
                    raise ContenderError(f"{self.name} was not ready after {READY_TIMEOUT_S:.0f} s: see {self._folder}")
                time.sleep(POLL_S)

    def _completes(self, client: httpx.Client) -> bool:
        question = {"model": MODEL_NAME, "prompt": "What is a penstock, and what is it for?" * 4, "max_tokens": 4}
        try:
            answer = client.post("/v1/completions", json=question, timeout=ANSWER_TIMEOUT_S)
        except httpx.TransportError:
            return False
        if answer.status_code == httpx.codes.INTERNAL_SERVER_ERROR:
            raise ContenderError(f"{self.name} is ready but fails: {answer.text[:500]}; see {self._folder}")
        return answer.is_success


def _is_ready(client: httpx.Client, path: str) -> bool:
    try:
        return client.get(path, timeout=PROBE_TIMEOUT_S).is_success
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
