"""Where a batch's results are kept: on S3, while Redis is away, when the disk is full."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from penstock.queue.local.redis_server import RedisServer
from penstock.queue.records import new_request_id
from penstock.queue.settings import RedisSettings
from penstock.serving.batches.answers import Reply
from penstock.serving.batches.runner import LineRequest
from penstock.serving.files.orphans import MARKER
from tests.support.batch_server import (
    BatchServer,
    Fleet,
    chat_reply,
    ids,
    jsonl,
    line,
    new_server,
    rows,
    submit,
    until,
)
from tests.support.s3_server import S3Server
from tests.support.waiting import until_true

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]


async def test_on_s3(redis_server: RedisServer, s3_server: S3Server) -> None:
    bucket = s3_server.make_bucket(f"b{new_request_id()}")
    server = BatchServer(RedisSettings(url=redis_server.url, namespace=f"{bucket}:"), bucket)
    server.files = {"storage_options": s3_server.storage_options}
    async with server.serving() as api:
        batch = await submit(api, jsonl([line(f"c{i}") for i in range(1300)]), metadata={"ordered": "true"})
        batch = await until(api, batch.id, "completed")
        assert ids(await rows(api, batch.output_file_id)) == [f"c{i}" for i in range(1300)]
        for file_id in (batch.input_file_id, batch.output_file_id or ""):
            await api.files.delete(file_id)
        await until_true(lambda: s3_server.objects(bucket) == [MARKER], 20, "only its name is left")


async def test_it_waits_for_redis(redis_server: RedisServer, tmp_path: Path) -> None:
    own = RedisServer(tmp_path / "redis")
    own.start()
    try:
        server = new_server(own, tmp_path)
        waiting = asyncio.Event()

        async def answer(request: LineRequest) -> Reply:
            await waiting.wait()
            return chat_reply()

        server.fleet.answer = answer
        async with server.serving() as api:
            batch = await submit(api, jsonl([line(f"c{i}") for i in range(600)]))
            await until_true(lambda: len(server.fleet.asked) > 200, 20, "lines are under way")
            await asyncio.to_thread(own.kill)
            waiting.set()
            await until_true(lambda: not _open_runs(server.fleet), 20, "all under way are answered")
            await asyncio.to_thread(own.start)
            patient = api.with_options(max_retries=10)
            batch = await until(patient, batch.id, "completed")
            assert sorted(ids(await rows(api, batch.output_file_id))) == sorted(f"c{i}" for i in range(600))
    finally:
        own.stop()
    assert set(server.fleet.runs.values()) == {1}


async def test_it_waits_for_room(redis_server: RedisServer, small_disk: Path) -> None:
    """The disk is full when answers come: they are kept until there is room, and no line runs again."""
    filled = asyncio.Event()

    async def answer(request: LineRequest) -> Reply:
        await filled.wait()
        return chat_reply("x" * 3000)

    server = new_server(redis_server, small_disk)
    server.fleet.answer = answer
    async with server.serving() as api:
        batch = await submit(api, jsonl([line(f"c{i}") for i in range(200)]))
        await until_true(lambda: len(server.fleet.asked) == 200, 20, "all lines are under way")
        filler = small_disk / "filler"
        await asyncio.to_thread(_fill, filler)
        with capture_logs() as logs:
            filled.set()
            await until_true(lambda: sum(each["event"] == "commit_waits" for each in logs) > 1, 20, "a commit waits")
        counts = (await api.batches.retrieve(batch.id)).request_counts
        await asyncio.to_thread(filler.unlink)
        batch = await until(api, batch.id, "completed")
        assert sorted(ids(await rows(api, batch.output_file_id))) == sorted(f"c{i}" for i in range(200))
    assert counts is not None
    assert counts.completed == 0
    assert set(server.fleet.runs.values()) == {1}


def _fill(path: Path) -> None:
    """Take all there is of the file system."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def _open_runs(fleet: Fleet) -> bool:
    return any(not task.done() for task in fleet.log.values())
