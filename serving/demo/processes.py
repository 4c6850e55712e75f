"""Linux processes below this one: adopt them, list them, end them.

A process is named by its id *and* its start time, for ids are used again.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
KILL_TIMEOUT_S = 10.0
"""A killed process is gone within milliseconds, unless the kernel holds it (a device, a core dump)."""
POLL_S = 0.02
"""How often the process table is read while waiting for killed processes to vanish."""


class Process(NamedTuple):
    """One process; ``started`` is in clock ticks since boot."""

    pid: int
    started: int


class _Entry(NamedTuple):
    process: Process
    parent: int
    zombie: bool


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, however it was detached."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Get SIGTERM when the parent dies. Exits at once if that has happened already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit(1)


def descendants(root: int) -> list[Process]:
    """All living processes below ``root``, parents before children."""
    table = list(_table())
    found: list[Process] = []
    generation = {root}
    while generation:
        below = [entry for entry in table if entry.parent in generation]
        found += [entry.process for entry in below if not entry.zombie]
        generation = {entry.process.pid for entry in below}
    return found


def end(processes: Iterable[Process]) -> None:
    """Kill these, if they still are who they were."""
    for process in processes:
        with suppress(ProcessLookupError):
            handle = os.pidfd_open(process.pid)  # from here on the id cannot become another process'
            try:
                if _entry(process.pid) == process:
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)


def end_descendants() -> None:
    """Kill everything below this process and reap it; returns when nothing is left (or
    :data:`KILL_TIMEOUT_S` passed).
    """
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while (living := descendants(os.getpid())) and time.monotonic() < deadline:
        end(living)
        _reap()
        time.sleep(POLL_S)
    _reap()


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue


def _table() -> Iterator[_Entry]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                yield _parse(int(folder.name), (folder / "stat").read_bytes())


def _entry(pid: int) -> Process | None:
    try:
        return _parse(pid, Path(f"/proc/{pid}/stat").read_bytes()).process
    except OSError:
        return None


def _parse(pid: int, stat: bytes) -> _Entry:
    fields = stat[stat.rindex(b")") + 2 :].split()  # the name before it may hold spaces and parentheses
    return _Entry(Process(pid, int(fields[19])), int(fields[1]), fields[0] == b"Z")


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl failed")
