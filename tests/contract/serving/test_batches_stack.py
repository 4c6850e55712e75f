"""The whole flow on real processes: ingresses with vLLM's handlers, dispatchers and simulated engines, some killed."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import openai
import pytest
from openai.types import Batch

from penstock.queue.redis_client import connect
from tests.support.batch_server import jsonl, line
from tests.support.simulated_stack import MODEL, Part, Shape, SimulatedStack
from tests.support.waiting import eventually

pytestmark = pytest.mark.chaos
LINES = int(os.environ.get("PENSTOCK_TEST_BATCH_LINES", "3000"))
END_S = 900.0
"""An ingress on two busy cores renders a hundred lines a second, and starts for a minute each time it was killed."""


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[SimulatedStack]:
    settings = {
        "PENSTOCK_FILES_ROOT": str(tmp_path / "files"),
        "PENSTOCK_BATCHES_MAX_LINES": "1000000",
        "PENSTOCK_BATCHES_IN_FLIGHT": "8",  # slow enough that there is something left to kill
    }
    shape = Shape(prefill=0, decode=0, mixed=2, dispatchers=2, ingresses=2, settings=settings)
    with SimulatedStack(tmp_path, shape) as running:
        yield running


class Caller:
    """OpenAI's client, at whichever ingress answers."""

    def __init__(self, stack: SimulatedStack) -> None:
        self._stack = stack

    def batch(self, batch_id: str) -> Batch | None:
        for url in self._stack.urls:
            with suppress(openai.APIConnectionError, openai.InternalServerError):  # killed, or not up yet
                return _api(url).batches.retrieve(batch_id)
        return None

    def finished(self, batch_id: str) -> int:
        batch = self.batch(batch_id)
        return 0 if batch is None or batch.request_counts is None else batch.request_counts.completed

    def ended(self, batch_id: str) -> bool:
        batch = self.batch(batch_id)
        return batch is not None and batch.status in ("completed", "failed", "cancelled", "expired")


def _api(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)


@pytest.mark.timeout(1500)
def test_every_line_once_whatever_is_killed(stack: SimulatedStack, capsys: pytest.CaptureFixture[str]) -> None:
    caller, chance = Caller(stack), random.Random(66)
    bodies = (
        {"model": MODEL, "max_tokens": 24, "messages": [{"role": "user", "content": f"{i}?"}]} for i in range(LINES)
    )
    content = jsonl([line(f"c{i}", body=body) for i, body in enumerate(bodies)])
    api = _api(stack.urls[0])
    uploaded = api.files.create(file=("in.jsonl", content), purpose="batch")
    batch_id = api.batches.create(
        input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h"
    ).id
    kinds = ["mixed", "ingress", "dispatcher", "mixed", "ingress", "dispatcher", "mixed"]
    killed: Counter[str] = Counter()
    for number, kind in enumerate(kinds, 1):
        mark = LINES * number // (len(kinds) + 2)
        eventually(lambda mark=mark: caller.finished(batch_id) >= mark, END_S, f"{mark} lines are done", 0.2)  # type: ignore[misc]
        stack.kill(_coordinator(stack) if kind == "ingress" else chance.choice(stack.of_kind(kind)))
        killed[kind] += 1
        stack.add(kind)
    eventually(lambda: caller.ended(batch_id), END_S, "the batch has ended", 0.5)
    stack.await_ready(stack.of_kind("ingress"))
    batch = caller.batch(batch_id)
    assert batch is not None
    api = _api(stack.urls[0])
    rows = [json.loads(row) for row in api.files.content(batch.output_file_id or "").content.splitlines()]
    with capsys.disabled():
        print(f"\nkilled {dict(killed)}; runs a line: {_attempts(stack, batch_id)}")
    assert batch.status == "completed"
    assert (batch.error_file_id, len(rows)) == (None, LINES)
    assert {row["custom_id"] for row in rows} == {f"c{i}" for i in range(LINES)}
    assert all(row["response"]["body"]["usage"]["completion_tokens"] == 24 for row in rows)


def _coordinator(stack: SimulatedStack) -> Part:
    """The ingress that has the batch, once there is another to take over."""
    stack.await_ready(stack.of_kind("ingress"))
    taken = [part for part in stack.of_kind("ingress") if '"batch_taken"' in part.log.read_text()]
    assert taken, "nobody has the batch"
    return taken[-1]


def _attempts(stack: SimulatedStack, batch_id: str) -> dict[int, int]:
    """How many lines were dispatched how often, all tries of a line together."""
    settings, runs = stack.redis_settings, dict.fromkeys(range(LINES), 0)
    with connect(settings) as client:
        for key in client.scan_iter(f"{settings.namespace}req:{batch_id}-*", count=1000):
            place = key.decode().removeprefix(f"{settings.namespace}req:{batch_id}-").partition("-")[0]
            runs[int(place)] += int(client.hget(key, "attempt") or 0)
    return dict(sorted(Counter(runs.values()).items()))
