"""A private Apache Kafka of one node or several (KRaft), run from Maven's jars: no distribution to download."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from penstock.queue.local.process import Server, ServerError, ServerProcess, Startable, free_port, listens

KAFKA_VERSION = "4.1.0"
CACHE = Path("~/.cache/penstock").expanduser() / f"kafka-{KAFKA_VERSION}"
"""Where the jars are kept (43 MB) unless the caller names another folder."""
MAVEN_TIMEOUT_S = 600.0
"""Fetching the jars takes seconds from a near mirror; a slow link gets ten minutes."""
FORMAT_TIMEOUT_S = 60.0
"""Formatting the data folder is one short JVM run."""
_JVM_FLAGS = ("-Xmx384m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xshare:auto")


def kafka_jars(folder: Path = CACHE) -> Path:
    """The folder with Kafka's jars, filled by Maven on the first call (atomically, so that several may call).

    Raises:
        ServerError: Maven is missing or could not fetch them.
    """
    if folder.is_dir():
        return folder
    maven = _need("mvn", "Maven (apt install maven)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        shutil.copy(Path(__file__).with_name("pom.xml"), work)
        command = [maven, "-q", "-B", "dependency:copy-dependencies", "-DoutputDirectory=jars"]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=MAVEN_TIMEOUT_S)
        if done.returncode:
            raise ServerError(
                f"Maven could not fetch Kafka {KAFKA_VERSION}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        try:
            os.rename(Path(work, "jars"), folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


def _cluster_id() -> str:
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")


@dataclass(frozen=True)
class Quorum:
    """What the nodes of one cluster must agree on: its id, and each node's controller port by node id."""

    controllers: dict[int, int] = field(default_factory=lambda: {1: free_port()})
    cluster_id: str = field(default_factory=_cluster_id)

    @property
    def replicas(self) -> int:
        """Copies of each of Kafka's own topics: three, where there are as many nodes."""
        return min(3, len(self.controllers))


class KafkaBroker(Server):
    """``with KafkaBroker(folder) as broker: broker.bootstrap``; data and log live in ``folder`` and survive a
    restart.

    Args:
        advertised: the port that clients are told to use, when something (a proxy) stands before this broker.
        quorum: the cluster it belongs to as ``node``; default: one of its own.
    """

    def __init__(
        self,
        folder: Path,
        *,
        jars: Path = CACHE,
        port: int | None = None,
        advertised: int | None = None,
        quorum: Quorum | None = None,
        node: int = 1,
    ) -> None:
        self.folder = folder
        self.port = port or free_port()
        self.bootstrap = f"127.0.0.1:{self.port}"
        self.node = node
        self._advertised = advertised or self.port
        self._quorum = quorum or Quorum()
        self._jars = jars

    def start(self) -> None:
        """Start and wait until it accepts connections (2-3 s). Raises :class:`ServerError` with the end of its log."""
        properties = self._configure()
        if not (self.folder / "data" / "meta.properties").exists():
            self._format(properties)
        self.process = ServerProcess([*self._java(), "kafka.Kafka", properties], self.folder / "kafka.log")
        self.process.start(lambda: listens(self.port))

    def _java(self) -> list[str]:
        java = _need("java", "a Java runtime, 17 or later (apt install openjdk-17-jre-headless)")
        return [java, *_JVM_FLAGS, "-cp", f"{kafka_jars(self._jars)}/*"]

    def _configure(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        quorum = self._quorum
        voters = [f"{node}@127.0.0.1:{port}" for node, port in quorum.controllers.items()]
        options = {
            "process.roles": "broker,controller",
            "node.id": self.node,
            "controller.quorum.voters": ",".join(voters),
            "listeners": f"PLAINTEXT://{self.bootstrap},CONTROLLER://127.0.0.1:{quorum.controllers[self.node]}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self._advertised}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": self.folder / "data",
            "offsets.topic.replication.factor": quorum.replicas,
            "offsets.topic.num.partitions": 4,
            "transaction.state.log.replication.factor": quorum.replicas,
            "transaction.state.log.min.isr": 1,
            "group.initial.rebalance.delay.ms": 0,
            "group.min.session.timeout.ms": 1000,  # consumers choose; by default a dead one keeps its records for 6 s
            "broker.heartbeat.interval.ms": 500,
            "broker.session.timeout.ms": 2000,  # else a killed broker waits 9 s for its own old session to expire
            "auto.create.topics.enable": "false",
        }
        properties = self.folder / "server.properties"
        properties.write_text("".join(f"{name}={value}\n" for name, value in options.items()))
        return properties

    def _format(self, properties: Path) -> None:
        command = [
            *self._java(),
            "kafka.tools.StorageTool",
            "format",
            f"--cluster-id={self._quorum.cluster_id}",
            "-c",
            str(properties),
        ]  # it may begin with "-"
        done = subprocess.run(command, capture_output=True, text=True, timeout=FORMAT_TIMEOUT_S)
        if done.returncode:
            raise ServerError(f"Kafka could not format {self.folder}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


class KafkaCluster(Startable):
    """``with KafkaCluster(folder) as cluster: cluster.bootstrap``; each of ``brokers`` can be killed by itself."""

    def __init__(self, folder: Path, *, nodes: int = 3, jars: Path = CACHE) -> None:
        quorum = Quorum({node: free_port() for node in range(1, nodes + 1)})
        self.brokers = [
            KafkaBroker(folder / str(node), jars=jars, quorum=quorum, node=node) for node in quorum.controllers
        ]
        self.bootstrap = ",".join(broker.bootstrap for broker in self.brokers)

    def start(self) -> None:
        """Start all side by side: a node accepts no connection before a majority of them has found together."""
        with ThreadPoolExecutor(len(self.brokers)) as pool:
            list(pool.map(KafkaBroker.start, self.brokers))

    def stop(self) -> None:
        """Stop all in good order, side by side. Idempotent."""
        with ThreadPoolExecutor(len(self.brokers)) as pool:
            list(pool.map(KafkaBroker.stop, self.brokers))


def _need(program: str, what: str) -> str:
    if path := shutil.which(program):
        return path
    raise ServerError(f"no {program} found: install {what}")
