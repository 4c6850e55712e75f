"""The whole flow on real processes: ingresses with vLLM's handlers, dispatchers and simulated engines, some killed."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
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


SAME = {
    "/v1/chat/completions": [
        {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "logprobs": True, "top_logprobs": 2},
        {"messages": [{"role": "user", "content": "Größe 漢字 \u2028"}], "max_tokens": 5, "n": 2, "stop": ["x"]},
        {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "metadata": {"a": "b"}, "seed": 1},
        {"messages": [{"role": "user", "content": "Hello"}], "temperature": -1},
        {"messages": "none"},
        {"messages": [{"role": "user", "content": "much " * 9000}]},
    ],
    "/v1/completions": [
        {"prompt": ["one", "two"], "max_tokens": 4, "logprobs": 1},
        {"prompt": "one", "max_tokens": 4, "echo": True},
        {"prompt": "one", "max_tokens": -4},
    ],
    "/v1/responses": [
        {"input": "Hello", "max_output_tokens": 5, "instructions": "Be kind."},
        {"input": [{"role": "user", "content": "Hello"}], "max_output_tokens": 5, "metadata": {"a": "b"}},
        {"input": "Hello", "temperature": -1},
    ],
}
RANDOM = ("id", "created", "created_at", "completed_at", "store", "background")
"""Fields that differ from one answer to the next, or that the batch has set."""


@pytest.mark.timeout(900)
def test_a_row_is_what_a_client_would_have_got(tmp_path: Path) -> None:
    with SimulatedStack(tmp_path, Shape(prefill=0, decode=0, mixed=1, dispatchers=1, ingresses=1)) as stack:
        api, caller = _api(stack.urls[0]), Caller(stack)
        for url, bodies in SAME.items():
            bodies = [{"model": MODEL} | body for body in bodies]
            content = jsonl([line(f"c{i}", url=url, body=body) for i, body in enumerate(bodies)])
            file = api.files.create(file=("in.jsonl", content), purpose="batch")
            made = api.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h")  # type: ignore[call-overload]
            eventually(lambda made=made: caller.ended(made.id), END_S, f"{url}: the batch has ended", 0.2)  # type: ignore[misc]
            batch = api.batches.retrieve(made.id)
            rows = [
                json.loads(row)
                for name in (batch.output_file_id, batch.error_file_id)
                if name
                for row in api.files.content(name).content.splitlines()
            ]
            assert len(rows) == len(bodies)
            for row in rows:
                body = bodies[int(row["custom_id"][1:])]
                asked = httpx.post(stack.urls[0] + url, json=body, trust_env=False, timeout=60)
                assert row["response"]["status_code"] == asked.status_code
                assert _fixed(row["response"]["body"]) == _fixed(asked.json()), body


def _fixed(value: Any) -> Any:
    """Without what is random, at any depth; of cached tokens there may be more the second time."""
    if isinstance(value, dict):
        return {key: _fixed(inner) for key, inner in value.items() if key not in (*RANDOM, "cached_tokens")}
    return [_fixed(inner) for inner in value] if isinstance(value, list) else value


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
