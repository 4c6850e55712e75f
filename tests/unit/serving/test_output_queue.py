"""What stands between vLLM's output processor and a slow client."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.serving.context import RequestContext, enter
from penstock.serving.output_queue import FULL, LOW, OutputQueue
from tests.unit.serving.apps import client_request

pytestmark = [pytest.mark.unit, pytest.mark.asyncio]


def output(token: int, index: int = 0) -> Any:
    return SimpleNamespace(outputs=[SimpleNamespace(index=index, token_ids=[token])])


def new_queue() -> OutputQueue:
    return OutputQueue("delta", "r")


async def test_outputs_are_never_merged() -> None:
    queue = new_queue()
    for token in range(3):
        queue.put(output(token))
    assert [(await queue.get()).outputs[0].token_ids for _ in range(3)] == [[0], [1], [2]]
    assert queue.get_nowait() is None


async def test_whoever_waits_gets_the_next_one() -> None:
    queue = new_queue()
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    assert not waiting.done()
    queue.put(output(7))
    assert (await waiting).outputs[0].token_ids == [7]


async def test_an_error_comes_after_what_was_there() -> None:
    queue, told = new_queue(), []
    queue.put(output(1))
    queue.fail(ValueError("no"), lambda: told.append("told"))
    queue.put(output(2))
    await queue.get()
    assert not told
    assert queue.get_nowait() is None
    with pytest.raises(ValueError, match="no"):
        await queue.get()
    assert told == ["told"]


async def test_a_full_queue_says_so_and_calls_when_there_is_room() -> None:
    queue, called = new_queue(), []
    for token in range(FULL + 1):
        assert not queue.full
        queue.put(output(token))
    assert queue.full
    queue.call_when_low(lambda: called.append(len(called)))
    while not called:
        await queue.get()
    assert [(await queue.get()).outputs[0].token_ids for _ in range(LOW - 1)][-1] == [FULL]
    assert queue.get_nowait() is None
    assert called == [0]


async def test_ids_are_drawn_for_the_choice_that_is_rendered() -> None:
    context = RequestContext(client_request())
    enter(context)
    queue = new_queue()
    queue.put(output(1, index=2))
    await queue.get()
    assert context.draws.track == 2


async def test_what_was_rendered_leaves_before_the_handler_waits_or_fails() -> None:
    context = RequestContext(client_request())
    enter(context)
    queue, seen = new_queue(), []

    async def flush() -> None:
        seen.append("flushed")

    context.pace.before_waiting = flush
    queue.put(output(1))
    queue.fail(ValueError("no"), lambda: seen.append("told"))
    assert queue.get_nowait() is not None
    assert seen == []
    with pytest.raises(ValueError, match="no"):
        await queue.get()
    assert seen == ["flushed", "told"]
