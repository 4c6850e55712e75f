"""Servers that only tests of this folder need."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.queue.local.process import ServerError
from penstock.queue.local.redis_server import RedisServer
from tests.support.batch_server import BatchServer, new_server
from tests.support.s3_server import S3Server


@pytest.fixture
def server(redis_server: RedisServer, tmp_path: Path) -> BatchServer:
    """An ingress as far as files and batches go."""
    return new_server(redis_server, tmp_path)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server for every test of the session."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    try:
        server.start()
    except ServerError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))
    yield server
    server.stop()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)
