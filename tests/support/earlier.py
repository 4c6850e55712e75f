"""A Redis that comes back as it was at an earlier moment: what a crash with ``appendfsync everysec`` does."""

from __future__ import annotations

import shutil
from pathlib import Path

from penstock.queue.local.redis_server import RedisServer


class Earlier:
    """Keeps a copy of a running server's append-only file as it is now.

    Every write is in the file as soon as it was answered (the second is for reaching the disk).
    """

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._copy = server.folder.with_name(f"{server.folder.name}-earlier")
        shutil.copytree(server.folder, self._copy, dirs_exist_ok=True)

    def restore(self) -> None:
        """Kill the server and start it with the copy. Blocks."""
        self._server.kill()
        for path in self._files(self._server.folder):
            path.unlink()
        for path in self._files(self._copy):
            target = self._server.folder / path.relative_to(self._copy)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
        self._server.start()

    @staticmethod
    def _files(folder: Path) -> list[Path]:
        return [path for path in folder.rglob("*") if "appendonly" in path.name and path.is_file()]
