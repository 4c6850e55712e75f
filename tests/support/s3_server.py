"""A real S3 server on loopback: versitygw, which serves a folder by the S3 protocol.

``GOBIN=~/.cache/penstock/bin go install github.com/versity/versitygw/cmd/versitygw@v1.8.0`` builds it (some minutes).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from penstock.queue.local.process import Server, ServerError, ServerProcess, free_port, listens

BUILT = Path("~/.cache/penstock/bin/versitygw")
KEY, SECRET = "penstock", "penstock-secret"


class S3Server(Server):
    """``start``, then use :attr:`storage_options` with ``s3://BUCKET``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()

    @property
    def storage_options(self) -> dict[str, Any]:
        """Arguments of fsspec's S3 file system. One try each: a test must see a failure, not wait it out."""
        client = {"endpoint_url": f"http://127.0.0.1:{self._port}", "region_name": "us-east-1"}
        config = {"retries": {"max_attempts": 1}, "connect_timeout": 2}
        return {"key": KEY, "secret": SECRET, "client_kwargs": client, "config_kwargs": config}

    def start(self) -> None:
        """Raises :class:`ServerError` when there is none to start."""
        binary = shutil.which("versitygw") or shutil.which(BUILT.expanduser())
        if binary is None:
            raise ServerError(f"no versitygw on PATH or at {BUILT}; {(__doc__ or '').splitlines()[2]}")
        (self._folder / "root").mkdir(parents=True, exist_ok=True)
        words = [binary, "--access", KEY, "--secret", SECRET, "--port", f"127.0.0.1:{self._port}", "posix"]
        self.process = ServerProcess([*words, self._folder / "root"], self._folder / "s3.log")
        self.process.start(lambda: listens(self._port))

    def make_bucket(self, name: str) -> str:
        """A fresh bucket's URL: to this server a folder is one."""
        (self._folder / "root" / name).mkdir()
        return f"s3://{name}"

    def objects(self, bucket: str) -> list[str]:
        """What is in a bucket, uploads under way included."""
        root = self._folder / "root" / bucket.removeprefix("s3://")
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
