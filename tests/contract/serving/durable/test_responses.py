"""Responses that are kept: background, retrieval, conversations."""

from __future__ import annotations

import json
import uuid
from typing import Any

import httpx
import openai
import pytest

from tests.support.simulated_stack import MODEL, SimulatedStack
from tests.support.sse import opened, read
from tests.support.waiting import eventually

pytestmark = [pytest.mark.contract, pytest.mark.timeout(700)]

PATIENCE_S = 60
RESPONSES = "/v1/responses"
UNFINISHED = ("queued", "in_progress")


def wanted(**changes: Any) -> dict[str, Any]:
    body = {"model": MODEL, "input": f"Say {uuid.uuid4().hex}.", "max_output_tokens": 60, "ignore_eos": True}
    return body | changes


def object_of(http: httpx.Client, url: str, name: str) -> dict[str, Any]:
    reply = http.get(f"{url}{RESPONSES}/{name}")
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def ended(http: httpx.Client, url: str, name: str) -> dict[str, Any]:
    eventually(lambda: object_of(http, url, name)["status"] not in UNFINISHED, PATIENCE_S, f"the end of {name}")
    return object_of(http, url, name)


def test_background_runs_by_itself_and_is_retrieved_anywhere(stack: SimulatedStack, http: httpx.Client) -> None:
    here, there = stack.urls
    begun = http.post(here + RESPONSES, json=wanted(background=True, max_output_tokens=200)).json()
    assert (begun["status"] in UNFINISHED, begun["background"], begun["output"]) == (True, True, [])
    done = ended(http, there, begun["id"])
    assert done["usage"]["output_tokens"] == 200
    assert done == object_of(http, here, begun["id"])


def test_background_survives_its_ingress(stack: SimulatedStack, http: httpx.Client) -> None:
    victim, survivor = stack.of_kind("ingress")
    begun = http.post(victim.url + RESPONSES, json=wanted(background=True, max_output_tokens=400)).json()
    stack.kill(victim)
    try:
        done = ended(http, survivor.url, begun["id"])
    finally:
        stack.heal()
    assert done["usage"]["output_tokens"] == 400


def test_background_events_after_a_sequence_number(stack: SimulatedStack, http: httpx.Client) -> None:
    here, there = stack.urls
    body = wanted(background=True, stream=True, max_output_tokens=300)
    with opened(http, "POST", here + RESPONSES, json=body) as part:
        part.read_events(30)
    last = json.loads(part.body.rstrip().rpartition(b"data: ")[2])
    url = f"{there}{RESPONSES}/{last_id(part.body)}?stream=true"
    rest = read(http, "GET", f"{url}&starting_after={last['sequence_number']}")
    whole = read(http, "GET", url)
    assert part.body + rest.body == whole.body
    numbers = [json.loads(event.partition(b"data: ")[2])["sequence_number"] for event in whole.events]
    assert numbers == list(range(len(numbers)))


def last_id(body: bytes) -> str:
    created = json.loads(body.partition(b"data: ")[2].partition(b"\n")[0])
    name: str = created["response"]["id"]
    return name


def test_cancel_and_delete(stack: SimulatedStack, http: httpx.Client) -> None:
    here, there = stack.urls
    name = http.post(here + RESPONSES, json=wanted(background=True, max_output_tokens=3000)).json()["id"]
    assert http.post(f"{there}{RESPONSES}/{name}/cancel").json()["status"] == "cancelled"
    eventually(lambda: stack.kv_used() == 0, PATIENCE_S, "its blocks are free")
    assert object_of(http, here, name)["status"] == "cancelled"
    assert http.delete(f"{there}{RESPONSES}/{name}").json()["deleted"] is True
    assert http.get(f"{here}{RESPONSES}/{name}").status_code == 404


def test_every_response_is_kept_unless_told_not_to(stack: SimulatedStack, http: httpx.Client) -> None:
    here, there = stack.urls
    answered = http.post(here + RESPONSES, json=wanted()).json()
    assert object_of(http, there, answered["id"]) == answered
    dropped = http.post(here + RESPONSES, json=wanted(store=False)).json()
    assert http.get(f"{there}{RESPONSES}/{dropped['id']}").status_code == 404


def test_a_conversation_goes_on(stack: SimulatedStack, http: httpx.Client) -> None:
    here, there = stack.urls
    used = []
    previous: dict[str, Any] = {}
    for url in (here, there, here):
        reply = http.post(url + RESPONSES, json=wanted(input="And then?", max_output_tokens=20) | previous).json()
        previous = {"previous_response_id": reply["id"]}
        used.append(reply["usage"]["input_tokens"])
    assert used[1] > used[0] + 20
    assert used[2] > used[1] + 20
    missing = http.post(here + RESPONSES, json=wanted(previous_response_id="resp_none"))
    assert missing.status_code == 404


def test_a_refused_background_request_is_refused_at_once(stack: SimulatedStack, http: httpx.Client) -> None:
    reply = http.post(stack.urls[0] + RESPONSES, json=wanted(background=True, max_output_tokens=-1))
    assert reply.status_code == 400


def test_the_official_client(stack: SimulatedStack) -> None:
    here, there = (openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) for url in stack.urls)
    begun = here.responses.create(
        model=MODEL, input="Hello.", background=True, max_output_tokens=80, extra_body={"ignore_eos": True}
    )
    eventually(lambda: there.responses.retrieve(begun.id).status not in UNFINISHED, PATIENCE_S, "the end")
    kept = there.responses.retrieve(begun.id)
    events = list(there.responses.retrieve(begun.id, stream=True, starting_after=4))
    assert events[0].sequence_number == 5
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == kept.output_text
