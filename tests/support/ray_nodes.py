"""A Ray of two nodes on this machine, as a cluster has them: a head that can be lost, and a node that works.

The head keeps its state in Redis, so that it can be lost and started again while the other node works on.
"""

from __future__ import annotations

import os
import signal
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import psutil

from penstock.queue.local.process import ServerError, ServerProcess, Startable, free_port
from penstock.queue.local.redis_server import RedisServer
from tests.support.ray_node import HOST, STARTED
from tests.support.waiting import eventually

START_S = 240.0
"""A node is up in ten seconds, and in minutes on a machine that is doing other things."""
START_TRIES = 10
CONTROLLER, REPLICA = "ray::ServeController", "ray::ServeReplica"
"""As Ray names the processes."""


class RayNodes(Startable):
    """``with RayNodes(folder, redis, environment) as ray: ray.address``; ``environment`` is that of all replicas."""

    def __init__(self, folder: Path, redis: RedisServer, environment: dict[str, str]) -> None:
        self.folder = folder
        self.port = free_port()
        self.address = f"{HOST}:{self.port}"
        self.environment = environment | {
            "RAY_ADDRESS": self.address,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else a driver takes the machine's outer address for loopback
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": uuid.uuid4().hex,
            "RAY_REDIS_ADDRESS": f"{HOST}:{redis.port}",
            "RAY_external_storage_namespace": "chaos",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
            "RAY_worker_niceness": "0",
            "PYTHONUNBUFFERED": "1",
        }
        self.head = self._node("head")
        self.worker = self._node("worker")

    def _node(self, role: str) -> ServerProcess:
        return self.process(role, "-m", "tests.support.ray_node", role, str(self.port), str(self.folder / "ray"))

    def process(self, name: str, *words: str) -> ServerProcess:
        """A Python process in this environment, not started yet."""
        settings = [f"{key}={value}" for key, value in self.environment.items()]
        return ServerProcess(["env", *settings, sys.executable, *words], self.folder / f"{name}.log")

    def start(self) -> None:
        """Start both nodes."""
        self.start_head()
        self._start(self.worker, "worker")

    def start_head(self) -> None:
        """Start the head, or start it again after :meth:`kill_head`."""
        self._start(self.head, "head")

    def _start(self, node: ServerProcess, name: str) -> None:
        """Ray gives its agents a fixed 15 s to name their ports, and itself 30 s, which a busy machine can exceed."""
        for _ in range(START_TRIES):
            if self._try(node, self.folder / f"{name}.log"):
                return
        raise ServerError(f"the {name} of Ray did not start; see {self.folder}/{name}.log")

    @staticmethod
    def _try(node: ServerProcess, log: Path) -> bool:
        before = log.stat().st_size if log.exists() else 0
        node.start(lambda: node.alive)

        def started() -> bool:
            return STARTED.encode() in log.read_bytes()[before:]

        eventually(lambda: started() or not node.alive, START_S, f"Ray starts; see {log}")
        if not node.alive:
            node.kill()
        return node.alive

    def kill_head(self) -> None:
        """What the loss of the head's machine does: everything on it is gone at once."""
        self._kill(self.head)

    def kill_controller(self) -> None:
        """SIGKILL of Serve's controller."""
        os.kill(self.controller(), signal.SIGKILL)

    def controller(self) -> int:
        """Process id of Serve's controller; 0 when there is none. After a loss of the head it may be on the other."""
        found = [one.pid for node in (self.head, self.worker) for one in self._tree(node) if CONTROLLER in _title(one)]
        return next(iter(found), 0)

    def on_head(self) -> list[str]:
        """Replicas that the loss of the head would take along."""
        return [_title(one) for one in self._tree(self.head) if REPLICA in _title(one)]

    def stop(self) -> None:
        """End both nodes and all that runs on them."""
        for node in (self.worker, self.head):
            self._kill(node)

    def _kill(self, node: ServerProcess) -> None:
        everything = self._tree(node)
        node.kill()
        for process in everything:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(everything, timeout=10)

    @staticmethod
    def _tree(node: ServerProcess) -> list[psutil.Process]:
        if not node.alive:
            return []
        with suppress(psutil.NoSuchProcess):
            return list(psutil.Process(node.pid).children(recursive=True))
        return []


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()
    return ""
