"""What happens when clients leave and engines die."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from penstock.queue.factory import open_queue
from penstock.queue.redis_client import connect_async
from penstock.queue.registry import Registry, Replica
from penstock.queue.settings import QueueSettings
from tests.stack.conftest import MODEL, RunningStack
from tests.support.waiting import eventually

pytestmark = [pytest.mark.stack, pytest.mark.timeout(700)]

LONG = {
    "model": MODEL, "prompt": "1 2 3 4", "max_tokens": 4000, "temperature": 0, "ignore_eos": True, "stream": True,
}  # fmt: skip
COUNT = {"model": MODEL, "messages": [{"role": "user", "content": "Count to 20."}], "temperature": 0}


def _replicas(stack: RunningStack) -> list[Replica]:
    async def read() -> list[Replica]:
        async with connect_async(stack.redis) as client:
            return list((await Registry(client, stack.redis).alive()).values())

    return asyncio.run(read())


def decode_replica(stack: RunningStack) -> Replica:
    """The decode engine; waits for one that is starting."""
    _until(lambda: any(r.role == "decode" for r in _replicas(stack)), "a decode replica is alive", 300)
    return next(replica for replica in _replicas(stack) if replica.role == "decode")


def _text(url: str, body: dict[str, Any]) -> str:
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def _busy(stack: RunningStack) -> int:
    return sum(replica.running + replica.waiting for replica in _replicas(stack))


def _until(condition: Callable[[], bool], what: str, within_s: float = 30) -> None:
    eventually(condition, within_s, what)


def test_disconnect_stops_the_engine(stack: RunningStack, url: str) -> None:
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        _until(lambda: _busy(stack) > 0, "the engine runs it")
    _until(lambda: _busy(stack) == 0, "the engine has dropped it")


def test_disconnect_completes_the_record(stack: RunningStack) -> None:
    """Nothing stays in the queue of what clients have left."""
    with httpx.stream("POST", f"{stack.urls['redis']}/v1/completions", json=LONG, timeout=60) as answer:
        next(answer.iter_lines())

    async def depth() -> int:
        queue = open_queue(QueueSettings(), stack.redis, "default")
        try:
            return sum(of_class.requests for of_class in (await queue.depth()).values())
        finally:
            await queue.close()

    _until(lambda: asyncio.run(depth()) == 0, "the queue is empty")


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_killed_replica_is_replaced(stack: RunningStack, url: str, role: str) -> None:
    """``kill -9`` of an idle engine: the next request waits in the queue for its successor and is answered the same."""
    _until(lambda: any(r.role == role for r in _replicas(stack)), f"a {role} replica is alive", 300)
    undisturbed = _text(url, COUNT)
    victim = next(replica for replica in _replicas(stack) if replica.role == role)
    os.kill(victim.pid, signal.SIGKILL)
    assert _text(url, COUNT) == undisturbed
    _until(lambda: any(r.role == role and r.id != victim.id for r in _replicas(stack)), "it was replaced", 300)


def test_killed_mid_stream_goes_on(stack: RunningStack) -> None:
    """``kill -9`` of the decode engine in the middle of an answer: the stream continues exactly where it stopped."""
    body = COUNT | {"messages": [{"role": "user", "content": "Count to 600."}], "stream": True}
    undisturbed = _text(stack.urls["redis"], body | {"stream": False})
    text, killed = "", False
    with httpx.stream("POST", f"{stack.urls['redis']}/v1/chat/completions", json=body, timeout=300) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                choices = httpx.Response(200, content=line.removeprefix("data: ")).json()["choices"]
                text += choices[0]["delta"].get("content") or "" if choices else ""
            if not killed and " 30 " in text:
                killed = True
                os.kill(next(r.pid for r in _replicas(stack) if r.role == "decode"), signal.SIGKILL)
    assert killed
    assert text == undisturbed
    assert len(text.split()) > 100
