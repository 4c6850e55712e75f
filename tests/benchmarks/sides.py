"""What is measured: vLLM's own server, Ray Serve LLM's prefill/decode application, and Penstock in several shapes, all
with the same engine arguments."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

from penstock.queue.local.kafka_broker import KafkaBroker
from penstock.queue.local.redis_server import RedisServer
from penstock.serving.demo.events import parse_event
from tests.benchmarks.contender import MODEL_NAME, Contender, ContenderError, Model

MAX_MODEL_LEN = 2048
ENGINE_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "enable_prefix_caching": True,
    "max_num_seqs": 128,
    "max_num_batched_tokens": 2048,
}
"""For every engine. The limits are named, for vLLM's defaults depend on who makes the engine."""


ENGINE_GROUPS = {"prefill": "prefill engine", "decode": "decode engine", "mixed": "engine"}
HERE = Path(__file__).parent
RAY_LLM_PYTHON = HERE.parents[1] / ".venv-bench" / "bin" / "python"
RAY_LLM_TAMED = {
    "PYTHONPATH": str(HERE / "ray_llm_tamed"),
    "NIXL_PROGRESS_DELAY_US": "1000",
    "RAY_worker_niceness": "0",
}


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
        self._run("server", "-m", "vllm.entrypoints.openai.api_server", *flags)

    def roots(self) -> dict[int, str]:
        """One tree: the API server and its engine."""
        return {process.pid: "api server" for process in self._processes.values() if process.alive}


class RayServeLlm(Contender):
    """Ray Serve LLM's ``build_pd_openai_app``: one prefill and one decode engine, in a virtual environment of its own.

    ``tamed``: with two settings of Penstock's, so that what is left is design. NIXL's progress thread pauses between
    polls, and Ray does not make its workers nice.
    """

    ready_path = "/v1/models"
    workers = ("prefill engine", "decode engine")

    def __init__(self, name: str, folder: Path, model: Model, *, tamed: bool) -> None:
        super().__init__(name, folder, model)
        self._tamed = tamed
        if not RAY_LLM_PYTHON.exists():
            raise ContenderError(f"{name} needs {RAY_LLM_PYTHON}: run `make bench-venv`")

    def _launch(self) -> None:
        settings = {
            "--model": self._model.path,
            "--name": MODEL_NAME,
            "--dtype": self._model.dtype,
            "--max-model-len": str(MAX_MODEL_LEN),
            "--engine-args": json.dumps(ENGINE_ARGS),
            "--port": str(self._port),
            "--temp-dir": str(self._folder / "ray"),
        }
        flags = [word for item in settings.items() for word in item]
        environment = {"RAY_COLOR_PREFIX": "0"} | (RAY_LLM_TAMED if self._tamed else {})
        self._run("ray-llm", HERE / "ray_llm_app.py", *flags, python=RAY_LLM_PYTHON, **environment)

    def roots(self) -> dict[int, str]:
        """One tree, whose engines and servers are told apart by their titles."""
        return {process.pid: "ray" for process in self._processes.values() if process.alive}


class Penstock(Contender):
    """Penstock on a Ray, a Redis and, with ``queue`` kafka, a Kafka of its own; ``replicas`` by role."""

    ready_path = "/ready"

    def __init__(
        self, name: str, folder: Path, model: Model, *, queue: str, replicas: dict[str, int], engine: str = "vllm"
    ) -> None:
        super().__init__(name, folder, model)
        self.workers = (*(ENGINE_GROUPS[role] for role in replicas), "ingress", "dispatcher", "redis")
        if queue == "kafka":
            self.workers += ("kafka",)
        self._queue = queue
        self._engine = engine
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
        self._run("workers", "-m", "penstock.workers.app", **environment)
        self._run("ingress", "-m", "penstock.serving.ingress", **environment)

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
                "PENSTOCK_WORKERS_ENGINE": self._engine,
                "PENSTOCK_WORKERS_STEP_PROFILE": "instant",
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


SIMULATED = "simulated"
"""Penstock without a model: no contender, but the whole path at no step cost."""
_MAKERS: dict[str, Callable[..., Contender]] = {
    "vllm": VllmServer,
    "mixed-redis": partial(Penstock, queue="redis", replicas={"mixed": 1}),
    "mixed-kafka": partial(Penstock, queue="kafka", replicas={"mixed": 1}),
    "pd-redis": partial(Penstock, queue="redis", replicas={"prefill": 1, "decode": 1}),
    "pd-kafka": partial(Penstock, queue="kafka", replicas={"prefill": 1, "decode": 1}),
    "ray-serve-llm": partial(RayServeLlm, tamed=False),
    "ray-serve-llm-tamed": partial(RayServeLlm, tamed=True),
    SIMULATED: partial(Penstock, queue="redis", replicas={"mixed": 1}, engine="simulated"),
}
NAMES = tuple(name for name in _MAKERS if name != SIMULATED)
PAIRS = (
    ("vllm", "mixed-redis"),
    ("vllm", "mixed-kafka"),
    ("vllm", "pd-redis"),
    ("vllm", "pd-kafka"),
    ("ray-serve-llm", "pd-kafka"),
    ("ray-serve-llm-tamed", "pd-kafka"),
)
"""Reference and subject; neighbours share a contender, which stays up between them."""
MAIN = {("vllm", "mixed-redis"), ("vllm", "pd-kafka"), ("ray-serve-llm", "pd-kafka")}
"""Each shape against what a user would pick instead. The other pairs vary the queue or a setting."""


def pairs_of(contenders: Collection[str]) -> list[tuple[str, str]]:
    """Each shape of Penstock against vLLM's server, and ``pd-kafka`` against each Ray Serve LLM."""
    return [pair for pair in PAIRS if (pair[1] if pair[0] == "vllm" else pair[0]) in contenders]


def make_contender(name: str, base: Path, model: Model) -> Contender:
    """The contender of this name, with a folder of its own below ``base``."""
    folder = base / name
    folder.mkdir(parents=True, exist_ok=True)
    return _MAKERS[name](name, folder, model)


def _flag(name: str, value: Any) -> list[str]:
    """An engine argument as a command-line flag of vLLM."""
    flag = "--" + name.replace("_", "-")
    return [flag] if value is True else [flag, str(value)]


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
