"""Hand a batch to another process: a Ray Serve handle call against a replica's inbox in Redis, in one run.

``python -m tests.benchmarks.handover``. Both sides carry the same bytes to a process that answers with the time at
which it had them; processes of one host share the monotonic clock.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import cast

import ray
import redis
from ray import serve
from rich.console import Console
from rich.table import Table

from penstock.queue.local.redis_server import RedisServer

ROUNDS = 300
PAYLOAD = b"x" * 1500
"""A prompt of a hundred tokens with its parameters."""

RECEIVER = """
import sys, time, redis
client, last = redis.Redis.from_url(sys.argv[1]), "0"
while True:
    for _, entries in client.xread({"inbox": last}, block=0):
        last = entries[-1][0]
        client.rpush("arrived", time.monotonic())
"""


class Receiver:
    """The far end of a handle call."""

    async def __call__(self, payload: bytes) -> float:
        return time.monotonic()


def by_handle() -> list[float]:
    """Milliseconds from the call until the replica had the payload."""
    handle = serve.run(serve.deployment(Receiver).bind(), route_prefix=None)
    handle.remote(PAYLOAD).result()
    times = []
    for _ in range(ROUNDS):
        started = time.monotonic()
        times.append((handle.remote(PAYLOAD).result() - started) * 1000)
    return times


def by_inbox(url: str) -> list[float]:
    """The same through a Redis stream that the receiver blocks on."""
    client = redis.Redis.from_url(url)
    receiver = subprocess.Popen([sys.executable, "-c", RECEIVER, url])
    times = []
    try:
        for _ in range(ROUNDS + 1):
            started = time.monotonic()
            client.xadd("inbox", {"w": PAYLOAD})
            _, arrived = cast("tuple[bytes, bytes]", client.blpop(["arrived"], timeout=30))
            times.append((float(arrived) - started) * 1000)
    finally:
        receiver.kill()
        receiver.wait()
        client.close()
    return times[1:]


def main() -> None:
    """Measure both, interleaved, and print the quartiles."""
    title = f"hand-over of {len(PAYLOAD)} bytes, {ROUNDS} rounds twice"
    table = Table("way", "p25 ms", "p50 ms", "p75 ms", title=title)
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder)) as server:
        ray.init(num_cpus=2, include_dashboard=False, logging_level="error")
        serve.start(proxy_location="Disabled")
        handle, inbox = by_handle(), by_inbox(server.url)
        handle, inbox = handle + by_handle(), inbox + by_inbox(server.url)
        ray.shutdown()
    for name, times in (("Serve handle call", handle), ("Redis inbox", inbox)):
        table.add_row(name, *(f"{quartile:.2f}" for quartile in statistics.quantiles(times, n=4)))
    Console().print(table)


if __name__ == "__main__":
    main()
