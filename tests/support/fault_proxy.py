"""A TCP proxy that delays, cuts and silences: Shopify's toxiproxy, built once by Go from its pinned version."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx

from penstock.queue.local.process import Server, ServerError, ServerProcess, free_port

VERSION = "v2.5.0"
CACHE = Path("~/.cache/penstock").expanduser() / f"toxiproxy-{VERSION}"
BUILD_TIMEOUT_S = 600.0
"""Fetching and compiling takes a minute on two cores; a busy machine gets ten."""
CALL_TIMEOUT_S = 5.0
"""Its control interface answers in milliseconds."""


def toxiproxy(folder: Path = CACHE) -> Path:
    """The server's binary, built on the first call.

    Raises:
        ServerError: there is no Go, or it could not build it.
    """
    binary = folder / "server"
    if binary.exists():
        return binary
    go = shutil.which("go")
    if go is None:
        raise ServerError("no go found: the network faults need toxiproxy (install Go 1.19 or later)")
    command = [go, "install", f"github.com/Shopify/toxiproxy/v2/cmd/server@{VERSION}"]
    environment = os.environ | {"GOBIN": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, env=environment)
    if done.returncode:
        raise ServerError(f"toxiproxy could not be built:\n{done.stderr[-2000:]}")
    return binary


class FaultProxy(Server):
    """Clients connect to ``port`` instead of the target, and what they meet can be changed while they are connected."""

    def __init__(self, folder: Path, target_port: int) -> None:
        self.port = free_port()
        self._target = target_port
        self._api = f"http://127.0.0.1:{free_port()}"
        self._log = folder / "toxiproxy.log"

    def start(self) -> None:
        """Start it with an open way to the target."""
        port = self._api.rpartition(":")[2]
        self.process = ServerProcess([toxiproxy(), "-host", "127.0.0.1", "-port", port], self._log)
        self.process.start(self._answers)
        listen, upstream = f"127.0.0.1:{self.port}", f"127.0.0.1:{self._target}"
        self._call("POST", "/proxies", {"name": "p", "listen": listen, "upstream": upstream, "enabled": True})

    def delay(self, latency_ms: int, jitter_ms: int) -> None:
        """Hold back every packet in both directions."""
        for stream in ("upstream", "downstream"):
            self._toxic("latency", stream, {"latency": latency_ms, "jitter": jitter_ms})

    def silence(self) -> None:
        """Half-open: connections stay, and nothing comes through any more, in either direction."""
        for stream in ("upstream", "downstream"):
            self._toxic("timeout", stream, {"timeout": 0})

    def cut(self) -> None:
        """Close all connections and refuse new ones."""
        self._call("POST", "/proxies/p", {"enabled": False})

    def heal(self) -> None:
        """Everything as it was; connections that were silenced are closed."""
        self._call("POST", "/reset")

    def _toxic(self, kind: str, stream: str, attributes: dict[str, int]) -> None:
        self._call("POST", "/proxies/p/toxics", {"type": kind, "stream": stream, "attributes": attributes})

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> None:
        httpx.request(method, self._api + path, json=body, timeout=CALL_TIMEOUT_S, trust_env=False).raise_for_status()

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self._api}/version", timeout=CALL_TIMEOUT_S, trust_env=False).is_success
        except httpx.TransportError:
            return False
