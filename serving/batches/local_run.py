"""A batch without a server: the parts of the demo are started here, run one batch, and end."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from penstock.serving.batches.client import BatchClient
from penstock.serving.batches.output import save
from penstock.serving.batches.settings import BatchSettings
from penstock.serving.batches.watching import Prices, watch
from penstock.serving.demo.board import Board
from penstock.serving.demo.options import DemoOptions
from penstock.serving.demo.processes import adopt_orphans, end_descendants
from penstock.serving.demo.run import Run, sweep
from penstock.serving.demo.stack import PartFailed, Stack

DEMO_NAME = "penstock-demo"
WINDOW = "7d"
"""The longest there is: whoever runs a batch here waits for it."""
NO_LIMIT = 2**50
INTERRUPTED = 130


def served_name(engine_model: str) -> str:
    """What the lines of a local batch must name as their model."""
    return os.path.basename(engine_model.rstrip("/")) if engine_model else DEMO_NAME


def limits() -> BatchSettings:
    """What a file is checked by: here it may be of any length."""
    return BatchSettings(max_lines=NO_LIMIT)


class Stopped(Exception):
    """Nobody waits for the batch any more."""


class Job(NamedTuple):
    """What to run and where its results go. ``table``: the CSV or Parquet file to put the answers beside."""

    lines: Path
    endpoint: str
    output: Path
    table: Path | None = None
    id_column: str = ""


def local_run(job: Job, engine_model: str) -> int:
    """Returns the exit code: 0 every line is in the output, 1 a part failed, 130 interrupted."""
    sweep()
    adopt_orphans()
    run, _ = Run.create()  # its lock is held until this process ends
    os.environ |= {name: str(NO_LIMIT) for name in ("PENSTOCK_FILES_MAX_UPLOAD_BYTES", "PENSTOCK_BATCHES_MAX_LINES")}
    code = 1
    try:
        code = asyncio.run(_run(run, job, engine_model))
    finally:
        end_descendants()
        run.remove(keep_logs=code == 1)
    return code


async def _run(run: Run, job: Job, engine_model: str) -> int:
    console = Console(stderr=True)
    stack = Stack(DemoOptions(model=engine_model, mixed=1), run)
    working = asyncio.create_task(_answer(stack, console, job))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, working.cancel)
    try:
        return await working
    except asyncio.CancelledError:
        return INTERRUPTED
    except PartFailed as error:
        console.print(f"{error}\nLogs: {run.folder}", style="red", markup=False, highlight=False)
        return 1
    finally:
        await stack.stop()


async def _answer(stack: Stack, console: Console, job: Job) -> int:
    board = Board(console, stack.parts())
    with board.live():
        await stack.start(board)
    stopped = threading.Event()
    watching = asyncio.create_task(stack.watch())  # ends when a part has died, by raising that
    running = asyncio.create_task(asyncio.to_thread(_batch, stack.url, console, job, stopped))
    try:
        await asyncio.wait({watching, running}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            await watching
        return running.result()
    finally:
        stopped.set()  # the loop's end waits for the thread, and the thread for an ingress that is no more
        watching.cancel()
        running.cancel()


def _batch(url: str, console: Console, job: Job, stopped: threading.Event) -> int:
    def pause(seconds: float) -> None:
        if stopped.wait(seconds):
            raise Stopped

    with BatchClient(url, "") as client:
        batch = client.create(client.upload(job.lines)["id"], job.endpoint, WINDOW, {"ordered": "true"})
        batch = watch(client, batch["id"], console, Prices(), pause)
        count = save(client, batch, job.output, job.table, job.id_column)
    failed = batch["request_counts"]["failed"]
    console.print(f"{count} lines in {job.output}, {failed} of them errors", highlight=False)
    return 0 if batch["status"] == "completed" else 1
