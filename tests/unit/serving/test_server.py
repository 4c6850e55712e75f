"""An ingress ends when its work on batches has failed, and in order when it is told to."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys

import pytest
import uvicorn

from penstock.serving.edge.asgi import Receive, Scope, Send
from penstock.serving.server import serve_beside
from tests.support.waiting import eventually_async

pytestmark = [pytest.mark.unit, pytest.mark.asyncio]


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("nobody asks")


def _server() -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(_app, host="127.0.0.1", port=0, log_config=None, lifespan="off", ws="none"))


async def _for_ever() -> None:
    await asyncio.Event().wait()


async def _started(server: uvicorn.Server) -> None:
    async def started() -> bool:
        return server.started

    await eventually_async(started, 10, "it serves")


async def test_it_does_not_outlive_its_work() -> None:
    server = _server()

    async def work() -> None:
        await _started(server)
        raise LookupError("a bug")

    with pytest.raises(LookupError, match="a bug"):
        await serve_beside(server, asyncio.create_task(work()))


async def test_work_that_fails_before_it_serves() -> None:
    async def work() -> None:
        raise LookupError("a bug")

    failed = asyncio.create_task(work())
    await asyncio.wait([failed])
    with pytest.raises(LookupError, match="a bug"):
        await serve_beside(_server(), failed)


async def test_it_serves_until_it_is_told_to_end() -> None:
    server, work = _server(), asyncio.create_task(_for_ever())
    serving = asyncio.create_task(serve_beside(server, work))
    await _started(server)
    server.should_exit = True
    await serving
    assert not work.done()
    work.cancel()


TOLD = """
import asyncio, os, signal, uvicorn
from penstock.serving.server import Server, serve_beside

async def app(scope, receive, send):
    raise AssertionError("nobody asks")

async def main():
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off", ws="none")
    server = Server(config, leaving=lambda: print("leaving"))
    work = asyncio.create_task(asyncio.Event().wait())
    serving = asyncio.create_task(serve_beside(server, work))
    while not server.started:
        await asyncio.sleep(0.01)
    os.kill(os.getpid(), signal.{name})
    await serving
    work.cancel()
    print("closed")

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_what_comes_after_serving_is_done_as_well(number: signal.Signals) -> None:
    """Uvicorn by itself raises the signal again, and that ends the process."""
    script = TOLD.replace("{name}", number.name)
    command = [sys.executable, "-c", script]
    ended = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
    assert (ended.stdout.split(), ended.returncode) == (["leaving", "closed"], 0), ended.stderr
