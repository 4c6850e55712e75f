"""Rows of a batch beside what the endpoint answers, on real processes: ingress, dispatcher and a simulated engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.batch_server import jsonl, line
from tests.support.simulated_stack import MODEL, Shape, SimulatedStack
from tests.support.waiting import eventually

pytestmark = pytest.mark.contract
END_S = 300.0
"""For a handful of lines, on a machine that is doing other things."""
ENDED = ("completed", "failed", "cancelled", "expired")


def _api(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)


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
        api = _api(stack.urls[0])
        for url, bodies in SAME.items():
            bodies = [{"model": MODEL} | body for body in bodies]
            content = jsonl([line(f"c{i}", url=url, body=body) for i, body in enumerate(bodies)])
            file = api.files.create(file=("in.jsonl", content), purpose="batch")
            made = api.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h")  # type: ignore[call-overload]
            eventually(lambda made=made: api.batches.retrieve(made.id).status in ENDED, END_S, f"{url}: it ends", 0.2)  # type: ignore[misc]
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
