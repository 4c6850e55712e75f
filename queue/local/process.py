"""One server process that lives exactly as long as whoever started it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

READY_TIMEOUT_S = 60.0
"""A cold JVM on a busy two-core machine needs 10 s; six times that is a server that will never come up."""
STOP_TIMEOUT_S = 10.0
"""An orderly stop flushes to disk within a second or two; after this the process is killed."""
POLL_S = 0.02
"""How often readiness is asked for; a start takes 20 ms (Redis) to 2 s (Kafka)."""
CONNECT_TIMEOUT_S = 1.0
"""A port on loopback accepts or refuses at once."""
LOG_TAIL_LINES = 20

# A watcher in the shell reads our end of a pipe, which only this process holds open: when this process is gone, however
# it went and whichever of its threads started the server, the read ends and the server is told to stop, and to go on
# if it had been stopped by a signal, for it would not hear otherwise.
# (PR_SET_PDEATHSIG would fire when the starting *thread* ends, and needs code between fork and exec.)
_SUPERVISOR = """
exec 3<&0
"$@" </dev/null >&2 3<&- & server=$!
echo $server
exec >/dev/null
{ read -r _ <&3; kill $server; kill -CONT $server; } & watcher=$!
wait $server
kill $watcher 2>/dev/null
"""


class ServerError(RuntimeError):
    """A local server is missing, did not start or died; the message carries the last lines of its log."""


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listens(port: int) -> bool:
    """Whether something accepts connections on this port of the loopback interface."""
    with socket.socket() as probe:
        probe.settimeout(CONNECT_TIMEOUT_S)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class ServerProcess:
    """Runs ``command`` with its output appended to ``log`` and stops it when this process ends."""

    def __init__(self, command: Sequence[str | Path], log: Path) -> None:
        self._command = [str(part) for part in command]
        self._log = log
        self._supervisor: subprocess.Popen[bytes] | None = None
        self.pid = 0

    def start(self, ready: Callable[[], bool]) -> None:
        """Start and wait until ``ready()`` is true.

        Raises:
            ServerError: another server answers there, or the process ended, or it was not ready within
                :data:`READY_TIMEOUT_S`.
        """
        if ready():
            raise ServerError(f"{self._command[0]} was not started: another server already uses its port")
        self._spawn()
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not ready():
            if not self.alive or time.monotonic() > deadline:
                self.kill()
                raise ServerError(f"{self._command[0]} did not start:\n{self._tail()}")
            time.sleep(POLL_S)

    @property
    def alive(self) -> bool:
        """Whether the server process itself is running."""
        return self._supervisor is not None and self._supervisor.poll() is None

    def stop(self) -> None:
        """Stop in good order, or by force after :data:`STOP_TIMEOUT_S`. Idempotent."""
        if (supervisor := self._supervisor) is None:
            return
        assert supervisor.stdin is not None
        supervisor.stdin.close()
        try:
            supervisor.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._forget()

    def kill(self) -> None:
        """Kill the server at once, as a crash would (SIGKILL)."""
        if (supervisor := self._supervisor) is None:
            return
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)
        assert supervisor.stdin is not None
        supervisor.stdin.close()
        supervisor.wait()
        self._forget()

    def _spawn(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._supervisor = subprocess.Popen(
                ["/bin/sh", "-c", _SUPERVISOR, "sh", *self._command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # a Ctrl-C at the terminal is for the starter, which then stops us in order
            )
        assert self._supervisor.stdout is not None
        self.pid = int(self._supervisor.stdout.readline())

    def _forget(self) -> None:
        supervisor, self._supervisor, self.pid = self._supervisor, None, 0
        if supervisor is not None and supervisor.stdout is not None:
            supervisor.stdout.close()

    def _tail(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])


class Startable(ABC):
    """``with`` starts it, and stops it in the end, also when only a part of it has started."""

    @abstractmethod
    def start(self) -> None:
        """Start and wait until it can be used. Raises :class:`ServerError`."""

    @abstractmethod
    def stop(self) -> None:
        """Stop in good order. Idempotent."""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Server(Startable):
    """A server that is one process; :meth:`start` sets it, and brings it back on the same port with its data."""

    process: ServerProcess | None = None

    def stop(self) -> None:
        """Stop in good order. Idempotent."""
        if self.process is not None:
            self.process.stop()

    def kill(self) -> None:
        """Kill it as a crash would."""
        if self.process is not None:
            self.process.kill()
