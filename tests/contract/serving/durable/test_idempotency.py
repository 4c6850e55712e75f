"""One key, one run, one answer."""

from __future__ import annotations

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from penstock.queue.redis_client import connect
from tests.contract.serving.durable.test_resume import CHAT, chat
from tests.support.simulated_stack import SimulatedStack
from tests.support.sse import Answer, opened, read

pytestmark = [pytest.mark.contract, pytest.mark.timeout(700)]


def new_key() -> dict[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


def post(client: httpx.Client, url: str, body: dict[str, Any], headers: dict[str, str]) -> Answer:
    return read(client, "POST", url + CHAT, json=body, headers=headers)


def runs(stack: SimulatedStack, stream_id: str) -> int:
    """How many replicas the request was given to."""
    settings = stack.redis_settings
    with connect(settings) as store:
        return int(store.hget(f"{settings.namespace}req:{stream_id}", "runs") or 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("stream", [False, True])
def test_concurrent_posts_run_once(stack: SimulatedStack, http: httpx.Client, stream: bool) -> None:
    body, key = chat(stream=stream), new_key()
    with ThreadPoolExecutor(8) as pool:
        posted = [pool.submit(post, http, url, body, key) for url in stack.urls * 4]
        answers = [each.result() for each in posted]
    assert {answer.status for answer in answers} == {200}
    assert len({answer.body for answer in answers}) == 1
    (stream_id,) = {answer.stream_id for answer in answers}
    assert runs(stack, stream_id) == 1


def test_the_answer_is_given_again_after_its_end(stack: SimulatedStack, http: httpx.Client) -> None:
    body, key = chat(stream=False, temperature=1.0), new_key()
    first, second = (post(http, url, body, key) for url in stack.urls)
    assert (first.status, first.body) == (second.status, second.body)
    assert runs(stack, first.stream_id) == 1


def test_another_request_under_the_key_is_refused(stack: SimulatedStack, http: httpx.Client) -> None:
    body, key = chat(stream=False), new_key()
    assert post(http, stack.urls[0], body, key).status == 200
    for other, path in ((body | {"max_tokens": 3}, CHAT), (body, "/v1/messages")):
        reply = http.post(stack.urls[1] + path, json=other, headers=key)
        assert reply.status_code == 422
        assert reply.headers["x-should-retry"] == "false"
        if path == CHAT:
            assert reply.json()["error"]["code"] == "idempotency_key_reused"


def test_a_broken_stream_goes_on_by_posting_again(stack: SimulatedStack, http: httpx.Client) -> None:
    body, key = chat(max_tokens=300), new_key()
    with opened(http, "POST", stack.urls[0] + CHAT, json=body, headers=key) as part:
        part.read_events(30)
    rest = post(http, stack.urls[1], body, key | {"Last-Event-ID": part.last_id})
    assert part.body + rest.body == post(http, stack.urls[0], body, key).body
    assert rest.stream_id == part.stream_id
    assert runs(stack, part.stream_id) == 1


def test_a_refusal_is_not_remembered(stack: SimulatedStack, http: httpx.Client) -> None:
    body, key = chat(stream=False), new_key()
    refused = post(http, stack.urls[0], body | {"max_tokens": -1}, key)
    assert refused.status == 400
    assert post(http, stack.urls[0], body, key).status == 200


def test_nothing_is_spliced_onto_an_unknown_key(stack: SimulatedStack, http: httpx.Client) -> None:
    reply = post(http, stack.urls[0], chat(), new_key() | {"Last-Event-ID": "12"})
    assert (reply.status, json.loads(reply.body)["error"]["code"]) == (404, "not_found")


def test_an_unusable_key_is_refused(stack: SimulatedStack, http: httpx.Client) -> None:
    reply = post(http, stack.urls[0], chat(), {"Idempotency-Key": "k" * 300})
    assert (reply.status, json.loads(reply.body)["error"]["param"]) == (400, "idempotency-key")
