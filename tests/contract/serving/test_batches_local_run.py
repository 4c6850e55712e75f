"""A local run that is given up in the middle of its batch ends, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import openai
import pytest

from penstock.queue.local.redis_server import RedisServer
from tests.support.batch_server import jsonl, line, new_server
from tests.support.waiting import eventually_async

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]
END_S = 30.0
"""Ample for a process that has nothing left to wait for."""


@asynccontextmanager
async def under_way(redis_server: RedisServer, folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A local run whose batch was created and will never end."""
    server = new_server(redis_server, folder, batches={"coordinate": False})
    lines = folder / "in.jsonl"
    lines.write_bytes(jsonl([line("a")]))
    async with server.serving() as api:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.support.local_run_beside"),
            *(server.url, lines, folder / "out.jsonl", folder / "death"),
            env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")},
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            await eventually_async(lambda: _has_batch(api), END_S, "there is a batch")
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def test_ctrl_c(redis_server: RedisServer, tmp_path: Path) -> None:
    async with under_way(redis_server, tmp_path) as process:
        process.send_signal(signal.SIGINT)
        _, said = await asyncio.wait_for(process.communicate(), END_S)
    assert process.returncode == 130, said.decode()
    assert list((tmp_path / "cache" / "penstock" / "demo").iterdir()) == []
    assert b"Traceback" not in said


async def test_a_part_that_dies(redis_server: RedisServer, tmp_path: Path) -> None:
    async with under_way(redis_server, tmp_path) as process:
        (tmp_path / "death").touch()
        _, said = await asyncio.wait_for(process.communicate(), END_S)
    assert process.returncode == 1, said.decode()
    assert b"engine: it died" in said
    assert b"Traceback" not in said


async def _has_batch(api: openai.AsyncOpenAI) -> bool:
    return bool((await api.batches.list()).data)
