"""A whole deployment on this machine, each part a process of its own that can be killed, stalled and replaced.

Redis and Kafka are real, dispatchers, engines and ingresses are Penstock's own commands. The engines are simulated
unless told otherwise: dozens of streams in step times worth killing something in, on two cores.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import httpx
import redis
from msgspec.msgpack import decode

from penstock.queue.local.kafka_broker import KafkaBroker, KafkaCluster
from penstock.queue.local.process import ServerProcess, Startable, free_port
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.redis_client import connect
from penstock.queue.registry import Replica
from penstock.queue.settings import QueueSettings, RedisSettings
from penstock.workers.demo_model import demo_model_path
from tests.support.fault_proxy import FaultProxy
from tests.support.waiting import eventually

MODEL = "penstock-demo"
POOL = "default"
ENGINE_START_S = 60.0
"""A simulated engine is up in a second or two, on a machine that does nothing else."""
INGRESS_START_S = 600.0
"""An ingress imports vLLM: 15 s alone, minutes beside others on two cores."""
LIMITS = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "num_gpu_blocks_override": 8192, "block_size": 16}
"""Room for 64 streams a replica, so that one survivor can carry what two did."""
REAL = {"max_num_seqs": 64}
"""Engine arguments of real engines: as many streams."""
COMMAND = "penstock.serving.cli"
FAULTY = "tests.support.faulty_engine"
STEPS = "h100/llama3.1-8b"
"""7 ms a step: an answer of 512 tokens takes four seconds, in which a good deal can be killed."""


class PartEnded(RuntimeError):
    """A process ended although nobody told it to."""


@dataclass(frozen=True)
class Shape:
    """What to start. ``settings`` are further settings of all parts, as environment variables.

    ``brokers``: nodes of Kafka, when that is the queue; with three, records are on all of them.
    ``lease_s``: how long real engines keep KV for their readers; 0: as long as they do.
    ``proxied``: a :class:`FaultProxy` stands between the parts and ``redis``, or the one broker of ``kafka``.
    """

    prefill: int = 1
    decode: int = 2
    mixed: int = 0
    dispatchers: int = 2
    ingresses: int = 0
    queue: str = "redis"
    brokers: int = 1
    proxied: str = ""
    engine: str = "simulated"
    profile: str = STEPS
    limits: dict[str, int] = field(default_factory=lambda: dict(LIMITS))
    settings: dict[str, str] = field(default_factory=dict)
    lease_s: int = 0

    @property
    def roles(self) -> list[str]:
        """One entry an engine."""
        return ["prefill"] * self.prefill + ["decode"] * self.decode + ["mixed"] * self.mixed


@dataclass
class Part:
    """One process. ``kind`` is dispatcher, ingress, or an engine's role."""

    name: str
    kind: str
    process: ServerProcess
    log: Path
    url: str = ""

    @property
    def pid(self) -> int:
        """Of the process itself; 0 when it is gone."""
        return self.process.pid


class SimulatedStack(Startable):
    """``with SimulatedStack(folder, Shape()) as stack``: everything is up and every engine has its lease."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.folder = folder
        self.shape = shape
        self.redis = RedisServer(folder / "redis")
        self.parts: dict[str, Part] = {}
        broker = free_port()
        target = {"redis": self.redis.port, "kafka": broker, "": 0}[shape.proxied]
        self.proxy = FaultProxy(folder, target) if target else None
        self.kafka = self._kafka(folder / "kafka", broker) if shape.queue == "kafka" else None
        self._started = 0

    def _kafka(self, folder: Path, port: int) -> KafkaBroker | KafkaCluster:
        if self.shape.brokers > 1:
            return KafkaCluster(folder, nodes=self.shape.brokers)
        through = self.proxy.port if self.proxy is not None and self.shape.proxied == "kafka" else None
        return KafkaBroker(folder, port=port, advertised=through)  # clients go where a broker says that it is

    # -- addresses

    @property
    def redis_settings(self) -> RedisSettings:
        """The server itself, not what may stand before it."""
        return RedisSettings(url=self.redis.url)

    @property
    def proxied_redis_settings(self) -> RedisSettings:
        """Redis as the parts see it."""
        if self.proxy is None or self.shape.proxied != "redis":
            return self.redis_settings
        return RedisSettings(url=f"redis://127.0.0.1:{self.proxy.port}/0")

    @property
    def queue_settings(self) -> QueueSettings:
        """The queue the parts use."""
        if self.kafka is None:
            return QueueSettings()
        through = f"127.0.0.1:{self.proxy.port}" if self.proxy is not None and self.shape.proxied == "kafka" else ""
        return QueueSettings(
            backend="kafka",
            bootstrap=through or self.kafka.bootstrap,
            partitions=2,
            replication=self.shape.brokers,
        )

    def of_kind(self, *kinds: str) -> list[Part]:
        """The parts of these kinds, oldest first."""
        return [part for part in self.parts.values() if part.kind in kinds]

    @property
    def engines(self) -> list[Part]:
        """All engines."""
        return self.of_kind("prefill", "decode", "mixed")

    @property
    def urls(self) -> list[str]:
        """Base addresses of the ingresses."""
        return [part.url for part in self.of_kind("ingress")]

    # -- life

    def start(self) -> None:
        """Start everything side by side and wait until engines have leases and ingresses are ready."""
        self.redis.start()
        if self.kafka is not None:
            self.kafka.start()
        if self.proxy is not None:
            self.proxy.start()
        for role in self.shape.roles:
            self.add(role)
        for _ in range(self.shape.dispatchers):
            self.add("dispatcher")
        for _ in range(self.shape.ingresses):
            self.add("ingress")
        self.await_ready(self.parts.values())

    def stop(self) -> None:
        """Stop all parts in order, then the servers."""
        for part in self.parts.values():  # all at once: each takes its time to end
            self.wake(part)
            self._signal(part, signal.SIGTERM)
        for part in list(self.parts.values()):
            self.remove(part)
        if self.proxy is not None:
            self.proxy.stop()
        if self.kafka is not None:
            self.kafka.stop()
        self.redis.stop()

    def add(self, kind: str, **settings: str) -> Part:
        """Start one more part, with settings of its own; does not wait for it."""
        if kind in ("dispatcher", "ingress"):
            return self._add(kind, [COMMAND, kind], settings)
        engine = [FAULTY] if self.shape.lease_s else [COMMAND, "engine"]
        return self._add(kind, [*engine, "--role", kind], settings)

    def add_failing(self, kind: str, every: int) -> Part:
        """Start an engine of which every so manieth read of a KV cache fails."""
        if self.shape.engine == "vllm":
            return self._add(kind, [FAULTY, "--role", kind], {"FAULTY_READS": str(every)})
        failing = json.dumps(self.shape.limits | {"kv_load_fails_every": every})
        return self.add(kind, PENSTOCK_MODEL_ENGINE_ARGS=failing)

    def _add(self, kind: str, words: list[str], settings: dict[str, str]) -> Part:
        self._started += 1
        name = f"{kind}-{self._started}"
        port = free_port() if kind == "ingress" else 0
        environment = self.environment() | settings | ({"PENSTOCK_INGRESS_PORT": str(port)} if port else {})
        prefix = ["env", *(f"{key}={value}" for key, value in environment.items())]
        log = self.folder / f"{name}.log"
        process = ServerProcess([*prefix, sys.executable, "-m", *words], log)
        process.start(lambda: process.alive)
        url = f"http://127.0.0.1:{port}" if port else ""
        part = self.parts[name] = Part(name, kind, process, log, url)
        return part

    def heal(self) -> None:
        """Bring everything back that a row has taken away."""
        wanted = [*self.shape.roles, *["dispatcher"] * self.shape.dispatchers, *["ingress"] * self.shape.ingresses]
        for part in list(self.parts.values()):
            self.wake(part)
            if part.kind in wanted and part.process.alive:
                wanted.remove(part.kind)
            else:
                self.remove(part)
        for kind in wanted:
            self.add(kind)
        self.await_ready(self.parts.values())

    def environment(self) -> dict[str, str]:
        """Settings of every part."""
        shape = self.shape
        values = {
            "PENSTOCK_REDIS_URL": self.proxied_redis_settings.url,
            "PENSTOCK_FILES_ROOT": str(self.folder / "files"),
            "PENSTOCK_MODEL_PATH": str(demo_model_path()),
            "PENSTOCK_MODEL_NAME": MODEL,
            "PENSTOCK_MODEL_MAX_MODEL_LEN": "4096",
            "PENSTOCK_MODEL_ENGINE_ARGS": json.dumps(shape.limits if shape.engine == "simulated" else REAL),
            "PENSTOCK_MODEL_DTYPE": "float32",
            "PENSTOCK_WORKERS_ENGINE": shape.engine,
            "PENSTOCK_WORKERS_STEP_PROFILE": shape.profile,
            "PENSTOCK_WORKERS_PREFILL": str(shape.prefill),
            "PENSTOCK_WORKERS_DECODE": str(shape.decode),
            "PENSTOCK_WORKERS_MIXED": str(shape.mixed),
            "PENSTOCK_WORKERS_DISPATCHERS": str(shape.dispatchers),
        }
        if self.kafka is not None:
            values |= {
                "PENSTOCK_QUEUE_BACKEND": "kafka",
                "PENSTOCK_QUEUE_BOOTSTRAP": self.queue_settings.bootstrap,
                "PENSTOCK_QUEUE_PARTITIONS": str(self.queue_settings.partitions),
                "PENSTOCK_QUEUE_REPLICATION": str(self.queue_settings.replication),
            }
        if shape.lease_s:
            values["FAULTY_LEASE_S"] = str(shape.lease_s)
        return values | shape.settings

    def await_ready(self, parts: Iterable[Part]) -> None:
        """Engines have their lease, ingresses answer. A dispatcher needs no waiting: work waits for it."""
        for part in list(parts):
            if part.kind == "ingress":
                eventually(lambda part=part: self._serves(part), INGRESS_START_S, f"{part.name} is ready", 0.25)  # type: ignore[misc]
            elif part.kind != "dispatcher":
                eventually(lambda part=part: self._leased(part), self.engine_start_s, f"{part.name} has a lease")  # type: ignore[misc]

    @property
    def engine_start_s(self) -> float:
        """How long an engine may take to start."""
        return INGRESS_START_S if self.shape.engine == "vllm" else ENGINE_START_S

    # -- faults

    def kill(self, part: Part) -> None:
        """SIGKILL; the part is gone from the list."""
        self.parts.pop(part.name, None)
        part.process.kill()

    def pause(self, part: Part) -> None:
        """SIGSTOP: alive to the kernel, dead to everybody else."""
        self._signal(part, signal.SIGSTOP)

    def wake(self, part: Part) -> None:
        """SIGCONT."""
        self._signal(part, signal.SIGCONT)

    def remove(self, part: Part) -> None:
        """SIGTERM and wait until it has ended."""
        self.parts.pop(part.name, None)
        part.process.stop()

    def replace(self, part: Part) -> Part:
        """A rolling replacement: the successor is ready before the old one is told to end."""
        successor = self.add(part.kind)
        self.await_ready([successor])
        self.remove(part)
        return successor

    # -- what is seen from outside

    def dead_parts(self) -> list[Part]:
        """Parts that ended although nobody told them to."""
        return [part for part in self.parts.values() if not part.process.alive]

    def assert_alive(self) -> None:
        """Raise :class:`PartEnded` when a part ended by itself: there is nobody here to start it again."""
        if dead := self.dead_parts():
            raise PartEnded(f"ended by itself: {[str(part.log) for part in dead]}")

    def replicas(self) -> dict[int, Replica]:
        """Engines with a valid lease, by pid; empty when Redis does not answer."""
        settings = self.redis_settings
        with connect(settings) as client, suppress(redis.RedisError):
            keys = list(client.scan_iter(f"{settings.namespace}replica:*"))
            values = cast("list[bytes | None]", client.mget(keys) if keys else [])
            found = [decode(value, type=Replica) for value in values if value is not None]
            return {replica.pid: replica for replica in found}
        return {}

    def kv_used(self) -> int:
        """Tokens of KV cache in use over all live engines."""
        return sum(replica.kv_used for replica in self.replicas().values())

    def rss_bytes(self, part: Part) -> int:
        """Resident memory of a part."""
        fields = Path(f"/proc/{part.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def log_lines(self, text: str) -> Iterator[str]:
        """Lines with ``text`` in any part's log."""
        for path in sorted(self.folder.glob("*.log")):
            yield from (line for line in path.read_text(errors="replace").splitlines() if text in line)

    @staticmethod
    def _signal(part: Part, number: signal.Signals) -> None:
        if part.process.alive:
            os.kill(part.pid, number)

    def _leased(self, part: Part) -> bool:
        assert part.process.alive, f"{part.name} has ended; see {part.log}"
        return part.pid in self.replicas()

    def _serves(self, part: Part) -> bool:
        assert part.process.alive, f"{part.name} has ended; see {part.log}"
        try:
            return httpx.get(f"{part.url}/ready", timeout=5, trust_env=False).is_success
        except httpx.TransportError:
            return False
