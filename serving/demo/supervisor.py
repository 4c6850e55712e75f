"""Starts the stack, shows its progress, streams an answer, waits for Ctrl-C, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal

from rich.console import Console

from penstock.serving.demo.answer import AnswerFailed, curl_line, python_snippet, stream_answer
from penstock.serving.demo.board import Board
from penstock.serving.demo.options import DemoOptions
from penstock.serving.demo.processes import descendants, end_descendants
from penstock.serving.demo.run import Run
from penstock.serving.demo.stack import PartFailed, Stack

START_TIMEOUT_S = 1800.0
"""The longest start worth waiting for: a model of 16 GB from a hub at 100 Mbit/s takes 22 minutes."""
RECORD_S = 1.0
"""How often the list of processes for the next start is brought up to date."""
FAILED = 1
INTERRUPTED = 130


async def supervise(options: DemoOptions, run: Run) -> int:
    """Run one demo; returns the exit code: 0 done, 1 a part failed, 130 interrupted before it was up."""
    console = Console(soft_wrap=True)
    stack = Stack(options, run)
    recorder = asyncio.create_task(_record(run))
    demo = asyncio.create_task(_demonstrate(options, stack, console))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, demo.cancel)
    code = await _outcome(demo, run, console)
    recorder.cancel()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, lambda: None)  # stopping is under way and bounded
    await stack.stop()
    end_descendants()
    run.remove(keep_logs=code == FAILED)
    return code


async def _outcome(demo: asyncio.Task[int], run: Run, console: Console) -> int:
    await asyncio.wait([demo])
    if demo.cancelled():
        return INTERRUPTED
    error = demo.exception()
    if error is None:
        return demo.result()
    if isinstance(error, PartFailed | AnswerFailed | TimeoutError):
        reason = str(error) or f"not ready after {START_TIMEOUT_S:.0f} s"
        console.print(reason, style="red", markup=False, highlight=False)
        console.print(f"Logs: {run.folder}", highlight=False)
        return FAILED
    raise error


async def _demonstrate(options: DemoOptions, stack: Stack, console: Console) -> int:
    board = Board(console, stack.parts())
    with board.live():
        async with asyncio.timeout(START_TIMEOUT_S):
            await stack.start(board)
    model = os.environ["PENSTOCK_MODEL_NAME"] or os.path.basename(options.model.rstrip("/"))
    _invite(console, stack.url, model, options.prompt)
    console.print(f"\n> {options.prompt}", markup=False, highlight=False)
    answer = await stream_answer(stack.url, model, options.prompt, console)
    console.print(
        f"\nTTFT {answer.ttft_s * 1000:.0f} ms, {answer.tokens} tokens, {answer.tokens_per_s:.0f} tokens/s",
        highlight=False,
    )
    if options.once:
        return 0
    console.print("Ctrl-C ends it.", highlight=False)
    return await _stay(stack)


async def _stay(stack: Stack) -> int:
    try:
        await stack.watch()
    except asyncio.CancelledError:
        return 0
    return FAILED


def _invite(console: Console, url: str, model: str, prompt: str) -> None:
    plain = {"markup": False, "highlight": False}
    console.print(f"\nServing {model} at {url}\n", **plain)  # type: ignore[arg-type]
    console.print(curl_line(url, model, prompt) + "\n", **plain)  # type: ignore[arg-type]
    console.print(python_snippet(url, model, prompt), **plain)  # type: ignore[arg-type]


async def _record(run: Run) -> None:
    while True:
        run.record(descendants(os.getpid()))
        await asyncio.sleep(RECORD_S)
