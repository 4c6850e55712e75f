"""``python -m tests.benchmarks.serve_stream STREAMS TOKENS FOLDER``: tokens through Ray Serve's own response streaming.

A replica yields a frame a token from an asynchronous generator, as fast as it is taken; the driver reads all streams
through a handle. That is how Ray Serve carries tokens; Penstock does not. Started by
:class:`tests.benchmarks.rig.Client`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from penstock.queue.messages import decode_frame
from tests.benchmarks.rig import serve_client

OBJECT_STORE_BYTES = 80 * 1024 * 1024
WARM_UP_TOKENS = 20
MAX_STREAMS = 1000
"""Of a replica; Serve's default of five would make the others wait."""


class Source:
    """Emits the frames an engine would have."""

    async def __call__(self, tokens: int) -> AsyncIterator[bytes]:
        from penstock.queue.messages import Frame, encode  # here, for Ray sends this class to the replica by value

        for index in range(tokens):
            yield encode(Frame(index, [index]))
            await asyncio.sleep(0)  # as after an engine's step: the other streams get their turn


async def _read(handle: DeploymentHandle, tokens: int) -> int:
    read = 0
    async for frame in handle.options(stream=True).remote(tokens):
        read += len(decode_frame(frame).tokens)
    return read


async def _measure(handle: DeploymentHandle, streams: int, tokens: int) -> dict[str, float]:
    await asyncio.gather(*(_read(handle, WARM_UP_TOKENS) for _ in range(streams)))
    started, cpu = time.monotonic(), time.process_time()
    read = sum(await asyncio.gather(*(_read(handle, tokens) for _ in range(streams))))
    seconds, spent = time.monotonic() - started, time.process_time() - cpu
    assert read == streams * tokens, f"{read} of {streams * tokens} tokens"
    return {"tokens": read, "seconds": seconds, "cpu_s": spent}


def main() -> None:
    """Bring up a Ray of its own, measure, take it down."""
    streams, tokens = int(sys.argv[1]), int(sys.argv[2])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level="error",
        _temp_dir=sys.argv[3],
    )
    try:
        serve.start(proxy_location="Disabled")
        source = serve.deployment(Source, max_ongoing_requests=MAX_STREAMS).bind()
        handle = serve.run(source, route_prefix=None)
        with asyncio.Runner() as runner:  # a handle's streams belong to the loop they were first read in
            serve_client(lambda: runner.run(_measure(handle, streams, tokens)))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
