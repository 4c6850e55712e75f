"""The folder of one run: its logs, its lock, its temporary files and who belongs to it.

``~/.cache/penstock/demo/<id>/`` is locked as long as guard or supervisor lives. A folder nobody locks is
what a run left behind that was killed together with its guard; :func:`sweep` ends its processes and removes
it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec

from penstock.serving.demo.processes import Process, end

MAX_SOCKET_FOLDER = 40
"""Ray adds 65 bytes to its folder for its sockets, and the path of a socket holds 107."""


class _State(msgspec.Struct):
    temporary: str
    processes: list[Process] = []


class Run:
    """One run's folder. Open it with :meth:`create` or, in a process that inherits the lock, :meth:`join`."""

    def __init__(self, folder: Path, state: _State) -> None:
        self.folder = folder
        self.temporary = Path(state.temporary)
        self._state = state

    @classmethod
    def create(cls) -> tuple[Run, int]:
        """A new run and the descriptor that locks it; the lock lasts until every copy of it is closed."""
        _root().mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=_root()))
        lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = cls(folder, _State(_short_temporary_folder()))
        run._save()
        return run, lock

    @classmethod
    def join(cls, folder: Path) -> Run:
        """The run of ``folder``, made by the guard."""
        return cls(folder, _load(folder))

    def log(self, part: str) -> Path:
        """Where ``part`` writes its log."""
        return self.folder / f"{part}.log"

    def record(self, processes: list[Process]) -> None:
        """Remember who belongs to this run."""
        if processes != self._state.processes:
            self._state.processes = processes
            self._save()

    def remove(self, *, keep_logs: bool) -> None:
        """Remove the temporary files and, unless the logs are still wanted, the folder. Idempotent."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        if keep_logs:
            (self.folder / "state").unlink(missing_ok=True)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _save(self) -> None:
        new = self.folder / "state.new"
        new.write_bytes(msgspec.json.encode(self._state))
        new.replace(self.folder / "state")


def sweep() -> None:
    """End and remove what earlier runs left behind, logs of failed ones included; leaves running ones
    alone.
    """
    for folder in _root().glob("*/"):
        with suppress(FileNotFoundError), (folder / "lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            _end_left_over(folder)


def _end_left_over(folder: Path) -> None:
    with suppress(FileNotFoundError):
        state = _load(folder)
        end(state.processes)
        shutil.rmtree(state.temporary, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def _load(folder: Path) -> _State:
    return msgspec.json.decode((folder / "state").read_bytes(), type=_State)


def _root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "penstock" / "demo"


def _short_temporary_folder() -> str:
    base = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="penstock-", dir=base if len(base) < MAX_SOCKET_FOLDER - 20 else "/tmp")
