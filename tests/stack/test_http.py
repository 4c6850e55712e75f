"""The HTTP surface as curl and a plain SSE parser see it: streams, errors, limits, probes, metrics."""

from __future__ import annotations

import asyncio
import json
import subprocess
from typing import Any

import httpx
import pytest

from tests.stack.conftest import MODEL

pytestmark = [pytest.mark.stack, pytest.mark.timeout(700)]

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Count to 20."}], "temperature": 0}
BURST = 300
COUNTED = " ".join(str(n) for n in range(1, 21))


def _error(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["message"]
    assert {"message", "type", "code"} <= set(error)
    return error


def test_curl_streams(url: str) -> None:
    command = ["curl", "-sN", f"{url}/v1/chat/completions", "-H", "content-type: application/json"]
    out = subprocess.run(
        [*command, "-d", json.dumps(CHAT | {"stream": True})], check=True, capture_output=True, text=True, timeout=120
    )
    blocks = out.stdout.strip().split("\n\n")
    ids, data = zip(*(block.split("\n") for block in blocks), strict=True)
    assert [id_.partition("-")[0] for id_ in ids] == [f"id: {number}" for number in range(1, len(blocks) + 1)]
    assert data[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in data[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == COUNTED


def test_sse_lines_are_well_formed(url: str) -> None:
    """Every line of the stream is a field, a comment or the blank line that ends an event (WHATWG HTML, 9.2.6)."""
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=CHAT | {"stream": True}, timeout=120) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = list(answer.iter_lines())
    assert all(line == "" or line.startswith((":", "id: ", "data: ")) for line in lines)


def test_malformed_json(url: str) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{url}/v1/chat/completions", content=b'{"model": ', headers=headers)
    _error(answer, 400)


@pytest.mark.parametrize(
    "change",
    [
        {"messages": "hello"},
        {"max_tokens": "many"},
        {"max_tokens": -1},
        {"temperature": 99},
        {"service_tier": "platinum"},
        {"stop": [""]},
        {"n": 0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_wrong_values(url: str, change: dict[str, Any]) -> None:
    _error(httpx.post(f"{url}/v1/chat/completions", json=CHAT | change, timeout=60), 400)


def test_unknown_model(url: str) -> None:
    _error(httpx.post(f"{url}/v1/chat/completions", json=CHAT | {"model": "nobody"}, timeout=60), 404)


def test_prompt_too_long(url: str) -> None:
    body = {"model": MODEL, "prompt": [5] * 5000, "max_tokens": 1}
    assert "4096" in _error(httpx.post(f"{url}/v1/completions", json=body, timeout=60), 400)["message"]


def test_body_over_the_limit(url: str) -> None:
    body = CHAT | {"messages": [{"role": "user", "content": "x" * 1_200_000}]}
    _error(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60), 413)


def test_paths_that_are_not_offered(url: str) -> None:
    for path in ("/pause", "/collective_rpc", "/reset_prefix_cache", "/inference/v1/generate", "/nothing"):
        assert httpx.post(f"{url}{path}", json={}, timeout=60).status_code == 404, path


def test_tokenize(url: str) -> None:
    answer = httpx.post(f"{url}/tokenize", json={"model": MODEL, "prompt": "1 2 3"}, timeout=60)
    assert answer.json()["count"] == len(answer.json()["tokens"]) > 0


def test_probes(url: str) -> None:
    assert httpx.get(f"{url}/health", timeout=60).json() == {"status": "ok"}
    assert httpx.get(f"{url}/ready", timeout=60).json() == {"status": "ready", "missing": {}}


def test_metrics(url: str) -> None:
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=120).is_success
    text = httpx.get(f"{url}/metrics", timeout=60).text
    assert "vllm:time_to_first_token_seconds_count" in text
    assert "penstock_http_requests_total" in text
    assert "vllm:num_requests_running" not in text, "scheduler gauges would stay 0 here for ever"


def test_request_id_comes_back(url: str) -> None:
    answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers={"x-request-id": "mine-1"}, timeout=120)
    assert answer.headers["x-request-id"] == "mine-1"


def test_deadline_ends_the_stream_with_a_typed_error(url: str) -> None:
    """A deadline that has passed before any engine could have begun: never silence, never a hang."""
    answer = httpx.post(
        f"{url}/v1/chat/completions", json=CHAT | {"max_tokens": 900}, headers={"x-request-timeout-ms": "1"}, timeout=60
    )
    assert _error(answer, 504)["code"] == "deadline_exceeded"


def test_a_burst(url: str) -> None:
    """Far more requests at one instant than engines have seats and an ingress has connections to Redis: all wait their
    turn, none is refused."""

    async def ask(client: httpx.AsyncClient, number: int) -> httpx.Response:
        body = {"model": MODEL, "prompt": f"{number}", "max_tokens": 2, "ignore_eos": True}
        return await client.post(f"{url}/v1/completions", json=body)

    async def burst() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=BURST)
        async with httpx.AsyncClient(timeout=300, limits=limits, trust_env=False) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(BURST)))

    answers = asyncio.run(burst())
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {2}
