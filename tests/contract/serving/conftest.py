"""Servers that only tests of this folder need."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from penstock.queue.local.process import ServerError
from tests.support.s3_server import S3Server


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
