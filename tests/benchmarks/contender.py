"""What is measured: vLLM's own server, and Penstock in several shapes, with the same engine arguments."""

from __future__ import annotations

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx

from penstock.queue.local.kafka_broker import KafkaBroker
from penstock.queue.local.process import ServerProcess, free_port
from penstock.queue.local.redis_server import RedisServer
from penstock.serving.demo.events import cause_of_death, parse_event
from penstock.serving.demo.processes import Process, descendants, end
from tests.benchmarks.processes import Sample, sample

READY_TIMEOUT_S = 300.0
"""A cold start takes 40 to 60 s on two idle cores; five times that is a server that will never come up."""
PROBE_TIMEOUT_S = 5.0
"""For one probe; Penstock's gives each of its checks two seconds."""
POLL_S = 0.1
"""How often readiness is asked for: the resolution of the times until ready."""
LINGER_S = 5.0
"""How long processes may outlive the orderly stop of their parent before they count as left behind."""
MODEL_NAME = "bench"
MAX_MODEL_LEN = 2048
ENGINE_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "enable_prefix_caching": True,
    "max_num_seqs": 128,
    "max_num_batched_tokens": 2048,
}
"""For every engine. The limits are named, for vLLM's defaults depend on who makes the engine."""
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
            process.stop()

    def _run(self, part: str, module: str, *arguments: str, **environment: str) -> None:
        """Start ``python -m module`` as a part of this contender."""
        assignments = [f"{name}={value}" for name, value in (ENVIRONMENT | environment).items()]
        process = ServerProcess(
            ["env", *assignments, sys.executable, "-m", module, *arguments], self._log(part)
        )
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
                    raise ContenderError(
                        f"{self.name} was not ready after {READY_TIMEOUT_S:.0f} s: see {self._folder}"
                    )
                time.sleep(POLL_S)


class VllmServer(Contender):
    """vLLM's own OpenAI server with one engine."""

    ready_path = "/health"

    def _launch(self) -> None:
        flags = ["--model", self._model.path, "--dtype", self._model.dtype, "--served-model-name", MODEL_NAME]
        flags += ["--max-model-len", str(MAX_MODEL_LEN), "--host", "127.0.0.1", "--port", str(self._port)]
        flags += [
            "--disable-uvicorn-access-log",
            *(word for item in ENGINE_ARGS.items() for word in _flag(*item)),
        ]
        self._run("server", "vllm.entrypoints.openai.api_server", *flags)

    def roots(self) -> dict[int, str]:
        """One tree: the API server and its engine."""
        return {process.pid: "api server" for process in self._processes.values() if process.alive}


class Penstock(Contender):
    """Penstock on a Ray, a Redis and, with ``queue`` kafka, a Kafka of its own; ``replicas`` by role."""

    ready_path = "/ready"

    def __init__(
        self, name: str, folder: Path, model: Model, *, queue: str, replicas: dict[str, int]
    ) -> None:
        super().__init__(name, folder, model)
        self._queue = queue
        self._replicas = {"prefill": 0, "decode": 0, "mixed": 0} | replicas
        self._redis = RedisServer(folder / "redis")
        self._kafka = KafkaBroker(folder / "kafka") if queue == "kafka" else None

    def __enter__(self) -> Self:
        """Redis and Kafka first: whoever runs a queue has them running, so ``all`` counts from after them."""
        try:
            self._start_store("redis", self._redis)
            if self._kafka:
                self._start_store("kafka", self._kafka)
        except BaseException:
            self.stop()
            raise
        return super().__enter__()

    def _start_store(self, name: str, server: RedisServer | KafkaBroker) -> None:
        started = time.monotonic()
        server.start()
        self._ready_s[name] = round(time.monotonic() - started, 1)

    def _launch(self) -> None:
        self._launched = time.time()
        environment = self._environment()
        self._run("workers", "penstock.workers.app", **environment)
        self._run("ingress", "penstock.serving.ingress", **environment)

    def _stop_parts(self) -> None:
        """As any contender; then the stores."""
        super()._stop_parts()
        if self._kafka:
            self._kafka.stop()
        self._redis.stop()

    def roots(self) -> dict[int, str]:
        """Ray with the engines and the dispatcher, the ingress, Redis and Kafka."""
        groups = {"workers": "ray", "ingress": "ingress"}
        roots = {process.pid: groups[part] for part, process in self._processes.items() if process.alive}
        stores = {"redis": self._redis.process, "kafka": self._kafka and self._kafka.process}
        return roots | {process.pid: name for name, process in stores.items() if process and process.alive}

    def ready_s(self) -> dict[str, float]:
        """The parts' own words are read from the logs, to which Ray brings them with a delay."""
        parts = dict(self._ready_s)
        for event in _events(self._log("workers"), self._log("ingress")):
            if part := _part_made_ready(event):
                at = datetime.fromisoformat(event["timestamp"]).timestamp()
                parts[part] = round(at - self._launched, 1)
        return parts

    def _environment(self) -> dict[str, str]:
        kafka = {"PENSTOCK_QUEUE_BOOTSTRAP": self._kafka.bootstrap} if self._kafka else {}
        replicas = {f"PENSTOCK_WORKERS_{role.upper()}": str(count) for role, count in self._replicas.items()}
        return (
            kafka
            | replicas
            | {
                "PENSTOCK_CONFIG": os.devnull,
                "PENSTOCK_QUEUE_BACKEND": self._queue,
                "PENSTOCK_REDIS_URL": self._redis.url,
                "PENSTOCK_MODEL_PATH": self._model.path,
                "PENSTOCK_MODEL_NAME": MODEL_NAME,
                "PENSTOCK_MODEL_DTYPE": self._model.dtype,
                "PENSTOCK_MODEL_MAX_MODEL_LEN": str(MAX_MODEL_LEN),
                "PENSTOCK_MODEL_ENGINE_ARGS": json.dumps(ENGINE_ARGS),
                "PENSTOCK_INGRESS_PORT": str(self._port),
                "PENSTOCK_RAY_TEMP": str(self._folder / "ray"),
                "RAY_COLOR_PREFIX": "0",
                "RAY_DEDUP_LOGS": "0",  # each engine says when it is ready
            }
        )


REFERENCE = "vllm"
PENSTOCK_SHAPES: dict[str, dict[str, Any]] = {
    "mixed-redis": {"queue": "redis", "replicas": {"mixed": 1}},
    "mixed-kafka": {"queue": "kafka", "replicas": {"mixed": 1}},
    "pd-redis": {"queue": "redis", "replicas": {"prefill": 1, "decode": 1}},
    "pd-kafka": {"queue": "kafka", "replicas": {"prefill": 1, "decode": 1}},
}


def make_contender(name: str, base: Path, model: Model) -> Contender:
    """The contender of this name, with a folder of its own below ``base``."""
    folder = base / name
    folder.mkdir(parents=True)
    if name == REFERENCE:
        return VllmServer(name, folder, model)
    return Penstock(name, folder, model, **PENSTOCK_SHAPES[name])


def _flag(name: str, value: Any) -> list[str]:
    """An engine argument as a command-line flag of vLLM."""
    flag = "--" + name.replace("_", "-")
    return [flag] if value is True else [flag, str(value)]


def _answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).is_success
    except httpx.TransportError:
        return False


def _events(*logs: Path) -> list[dict[str, Any]]:
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    return [event for line in lines if (event := parse_event(line))]


def _part_made_ready(event: dict[str, Any]) -> str | None:
    """The part that this log event says is ready."""
    names = {
        "ray_ready": "ray",
        "ingress_listening": "ingress",
        "replica_ready": f"{event.get('role')} engine",
    }
    return names.get(event["event"])


def _lingering(members: set[Process]) -> list[Process]:
    """Those of ``members`` that outlive a grace period; this process adopts orphans, so it sees them."""
    deadline = time.monotonic() + LINGER_S
    while living := [process for process in descendants(os.getpid()) if process in members]:
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    return living
