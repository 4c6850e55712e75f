"""``python -m tests.benchmarks.batch_alone 1000 10000 ...``: the coordinator alone, answers coming at once.

What of the cost of a batch depends on its size is all in here: upload, validation, reading, ordering, commits in Redis,
segments and the files made of them. One process a size, so that peaks of memory are its own.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import structlog
import uvloop

from penstock.queue.local.redis_server import RedisServer
from penstock.queue.redis_client import connect_async
from penstock.queue.settings import RedisSettings
from penstock.serving.batches.answers import Reply
from penstock.serving.batches.client import BatchClient
from penstock.serving.batches.runner import LineRequest
from tests.benchmarks.batch_scale import write_input
from tests.support.batch_server import BatchServer, chat_reply
from tests.support.simulated_stack import MODEL

POLL_S = 0.05


class Alone(msgspec.Struct):
    """One size; memory in MB."""

    lines: int
    upload_cpu_us_a_line: float
    first_result_s: float
    lines_per_s: float
    cpu_us_a_line: float
    redis_mb: float
    peak_mb: float


class Instant:
    """Answers at once, always the same."""

    async def respond(self, request: LineRequest) -> Reply:
        """The answer."""
        return chat_reply()

    async def stop(self, requests: Sequence[LineRequest]) -> None:
        """There is nothing to stop."""


def measure(lines: int) -> Alone:
    """One batch of so many lines in this process."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    with tempfile.TemporaryDirectory() as name, RedisServer(Path(name, "redis")) as server:
        return uvloop.run(_run(lines, Path(name), RedisSettings(url=server.url)))


async def _run(lines: int, folder: Path, settings: RedisSettings) -> Alone:
    path = await asyncio.to_thread(write_input, folder, lines)
    server = BatchServer(
        settings, str(folder / "files"), Instant(), {"max_upload_bytes": 2**30}, {"max_lines": 10_000_000}, model=MODEL
    )
    async with server.serving(), connect_async(settings) as store:
        with BatchClient(server.url, "") as api:
            began = time.process_time()
            file = await asyncio.to_thread(api.upload, path)
            uploaded, started = time.process_time(), time.monotonic()
            batch = await asyncio.to_thread(api.create, file["id"], "/v1/chat/completions", "24h", {})
            key, first_s = f"{settings.namespace}batch:{batch['id']}", 0.0
            while (await store.hget(key, "status")) != b"completed":
                if not first_s and await store.hget(key, "completed"):
                    first_s = time.monotonic() - started
                await asyncio.sleep(POLL_S)
            seconds, spent = time.monotonic() - started, time.process_time() - uploaded
        redis_mb = (await store.info("memory"))["used_memory"] / 1e6
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return Alone(
        lines,
        (uploaded - began) / lines * 1e6,
        first_s,
        lines / seconds,
        spent / lines * 1e6,
        redis_mb,
        peak_mb,
    )


def main() -> None:
    """One line of JSON a size."""
    spawn = multiprocessing.get_context("spawn")
    for size in sys.argv[1:]:
        with spawn.Pool(1) as pool:
            print(msgspec.json.encode(pool.apply(measure, (int(size),))).decode(), flush=True)


if __name__ == "__main__":
    main()
