"""Streams that outlive their connection and their ingress."""

from __future__ import annotations

import json
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import redis

from penstock.queue.messages import Finish, decode_frame
from penstock.queue.redis_client import connect
from tests.support.simulated_stack import MODEL, SimulatedStack
from tests.support.sse import Answer, counts, opened, read, tracks
from tests.support.waiting import eventually

pytestmark = [pytest.mark.contract, pytest.mark.timeout(700)]

PATIENCE_S = 30
CHAT = "/v1/chat/completions"


def chat(**changes: Any) -> dict[str, Any]:
    """A streamed answer of a prompt nobody else has."""
    message = {"role": "user", "content": f"Say {uuid.uuid4().hex}."}
    wanted = {"model": MODEL, "messages": [message], "max_tokens": 120, "temperature": 1.0, "stream": True}
    return wanted | {"ignore_eos": True} | changes


def again(client: httpx.Client, url: str, stream_id: str, after: str = "") -> Answer:
    return read(client, "GET", f"{url}/v1/streams/{stream_id}", headers={"Last-Event-ID": after} if after else {})


def last_frame(store: redis.Redis, namespace: str, stream_id: str) -> Finish | None:
    frames = store.lrange(f"{namespace}tok:{stream_id}", -1, -1)
    return decode_frame(frames[0]).finish if frames else None  # type: ignore[index]


def parked(stack: SimulatedStack, stream_id: str) -> bool:
    settings = stack.redis_settings
    with connect(settings) as store:
        return last_frame(store, settings.namespace, stream_id) is Finish.ABORT


def text_of(answer: Answer) -> str:
    documents = [json.loads(event.partition(b"data: ")[2]) for event in answer.events if b"[DONE]" not in event]
    return "".join(choice["delta"].get("content") or "" for one in documents for choice in one["choices"])


def test_every_event_has_its_number(stack: SimulatedStack, http: httpx.Client) -> None:
    answer = read(http, "POST", stack.urls[0] + CHAT, json=chat())
    assert counts(answer.ids) == [str(number) for number in range(1, len(answer.events) + 1)]
    assert answer.events[-1].endswith(b"data: [DONE]\n\n")


def test_a_finished_stream_is_read_again_from_anywhere(stack: SimulatedStack, http: httpx.Client) -> None:
    answer = read(http, "POST", stack.urls[0] + CHAT, json=chat(stream_options={"include_usage": True}))
    for url in stack.urls:
        assert again(http, url, answer.stream_id).body == answer.body
        for after in (1, 50, len(answer.events) - 1, len(answer.events)):
            rest = again(http, url, answer.stream_id, str(after))
            assert rest.body == b"".join(answer.events[after:])


def test_a_stream_under_way_goes_on_at_the_other_ingress(stack: SimulatedStack, http: httpx.Client) -> None:
    here, there = stack.urls
    with opened(http, "POST", here + CHAT, json=chat(max_tokens=400)) as part:
        part.read_events(40)
        rest = again(http, there, part.stream_id, part.last_id)
        got = part.body + rest.body
    assert got == again(http, here, part.stream_id).body
    assert got.endswith(b"data: [DONE]\n\n")


def test_two_clients_read_one_stream(stack: SimulatedStack, http: httpx.Client) -> None:
    with opened(http, "POST", stack.urls[0] + CHAT, json=chat(max_tokens=300)) as part:
        part.read_events(5)
        with ThreadPoolExecutor() as pool:
            others = [pool.submit(again, http, url, part.stream_id) for url in stack.urls * 2]
            part.read_rest()
            assert {other.result().body for other in others} == {part.body}


def test_what_nobody_reads_is_parked_and_goes_on_when_asked_for(stack: SimulatedStack, http: httpx.Client) -> None:
    here, there = stack.urls
    with opened(http, "POST", here + CHAT, json=chat(max_tokens=1500)) as part:
        part.read_events(40)
    eventually(lambda: parked(stack, part.stream_id), PATIENCE_S, "the request is parked")
    eventually(lambda: stack.kv_used() == 0, PATIENCE_S, "its blocks are free")
    with opened(http, "GET", f"{there}/v1/streams/{part.stream_id}", headers={"Last-Event-ID": part.last_id}) as second:
        second.read_events(300)
    eventually(lambda: parked(stack, part.stream_id), PATIENCE_S, "the request is parked again")
    third = again(http, here, part.stream_id, second.last_id)
    whole = again(http, there, part.stream_id)
    assert part.body + second.body + third.body == whole.body
    assert whole.events[-2].count(b'"finish_reason":"length"') == 1


def test_a_killed_ingress_costs_no_byte(stack: SimulatedStack, http: httpx.Client) -> None:
    victim, survivor = stack.of_kind("ingress")
    started = threading.Barrier(9)
    parts = []

    def follow() -> None:
        url, body = victim.url + CHAT, chat(max_tokens=300)
        with httpx.Client(timeout=60, trust_env=False) as client, opened(client, "POST", url, json=body) as part:
            parts.append(part)
            part.read_events(20)
            started.wait(PATIENCE_S)
            part.read_rest()

    with ThreadPoolExecutor(8) as pool:
        following = [pool.submit(follow) for _ in range(8)]
        started.wait(PATIENCE_S)
        stack.kill(victim)
        try:
            for one in following:
                one.result()
        finally:
            stack.heal()
    successor = next(url for url in stack.urls if url != survivor.url)
    for part in parts:
        assert not part.body.endswith(b"data: [DONE]\n\n")
        rest = again(http, survivor.url, part.stream_id, part.last_id)
        assert part.body + rest.body == again(http, successor, part.stream_id).body
        assert rest.events[-1].endswith(b"data: [DONE]\n\n")


def test_choices_count_by_themselves(stack: SimulatedStack, http: httpx.Client) -> None:
    body = chat(n=3, max_tokens=60, stream_options={"include_usage": True})
    answer = read(http, "POST", stack.urls[0] + CHAT, json=body)
    assert counts(answer.ids)[-1] == ".".join(
        str(len(events)) for _, events in sorted(tracks(answer).items(), key=_last_empty)
    )
    whole = tracks(answer)
    assert tracks(again(http, stack.urls[1], answer.stream_id)) == whole
    after = answer.ids[70]
    rest = tracks(again(http, stack.urls[1], answer.stream_id, after))
    for choice, count in enumerate(int(number) for number in counts([after])[0].split(".")):
        name = str(choice).encode()
        assert rest.get(name, []) == whole[name][count:]
    assert rest[b""] == whole[b""]


def _last_empty(item: tuple[bytes, list[bytes]]) -> tuple[bool, bytes]:
    return not item[0], item[0]


def test_several_prompts_at_once(stack: SimulatedStack, http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": ["one", "two of them"], "n": 2, "temperature": 1.0, "max_tokens": 20}
    answer = read(http, "POST", f"{stack.urls[0]}/v1/completions", json=body | {"stream": True, "ignore_eos": True})
    assert sorted(tracks(answer)) == [b"", b"0", b"1", b"2", b"3"]
    assert tracks(again(http, stack.urls[1], answer.stream_id)) == tracks(answer)


def test_a_stop_string_ends_each_rendering_at_the_same_place(stack: SimulatedStack, http: httpx.Client) -> None:
    body = chat(max_tokens=1000)
    with opened(http, "POST", stack.urls[0] + CHAT, json=body) as part:
        part.read_events(60)
    stop = text_of(Answer(200, "", part.body))[-12:]
    stopped = read(http, "POST", stack.urls[0] + CHAT, json=body | {"stop": [stop]})
    assert stop not in text_of(stopped)
    assert b'"stop_reason":' + json.dumps(stop).encode() in stopped.body
    settings = stack.redis_settings
    with connect(settings) as store:
        done = f"{settings.namespace}req:{stopped.stream_id}"
        eventually(lambda: bool(store.hexists(done, "done")), PATIENCE_S, "the engine was told to stop")
    assert again(http, stack.urls[1], stopped.stream_id).body == stopped.body
    assert again(http, stack.urls[1], stopped.stream_id, "30").body == b"".join(stopped.events[30:])


def test_cancelled_on_request_means_for_good(stack: SimulatedStack, http: httpx.Client) -> None:
    with opened(http, "POST", stack.urls[0] + CHAT, json=chat(max_tokens=3000)) as part:
        part.read_events(20)
        reply = http.post(f"{stack.urls[1]}/v1/streams/{part.stream_id}/cancel")
        assert reply.json() == {"id": part.stream_id, "object": "stream", "cancelled": True}
        part.read_rest()
    assert b'"finish_reason":"abort"' in part.body
    assert again(http, stack.urls[1], part.stream_id).body == part.body
    eventually(lambda: stack.kv_used() == 0, PATIENCE_S, "its blocks are free")


def test_every_name_the_client_has_seen_leads_to_the_stream(stack: SimulatedStack, http: httpx.Client) -> None:
    name = f"mine-{uuid.uuid4().hex}"
    answer = read(http, "POST", stack.urls[0] + CHAT, json=chat(), headers={"X-Request-Id": name})
    for asked in (answer.stream_id, name, f"chatcmpl-{name}"):
        assert again(http, stack.urls[1], asked).body == answer.body
    unknown = again(http, stack.urls[1], "nothing")
    assert (unknown.status, json.loads(unknown.body)["error"]["code"]) == (404, "not_found")
    wrong = again(http, stack.urls[1], answer.stream_id, "x")
    assert (wrong.status, json.loads(wrong.body)["error"]["param"]) == (400, "last-event-id")


def test_anthropic_streams_too(stack: SimulatedStack, http: httpx.Client) -> None:
    body = chat(max_tokens=30)
    answer = read(http, "POST", f"{stack.urls[0]}/v1/messages", json=body)
    assert counts(answer.ids) == [str(number) for number in range(1, len(answer.events) + 1)]
    assert again(http, stack.urls[1], answer.stream_id, "3").body == b"".join(answer.events[3:])


def test_the_official_client_reads_such_streams(stack: SimulatedStack, http: httpx.Client) -> None:
    client = openai.OpenAI(base_url=f"{stack.urls[0]}/v1", api_key="none", max_retries=0, timeout=60)
    body = chat(max_tokens=80)
    ignore = {"ignore_eos": body.pop("ignore_eos")}
    body.pop("stream")
    raw = client.chat.completions.with_raw_response.create(**body, stream=True, extra_body=ignore)
    pieces = [chunk.choices[0].delta.content or "" for chunk in raw.parse()]
    assert "".join(pieces) == text_of(again(http, stack.urls[1], raw.headers["x-stream-id"]))


def test_an_ingress_that_ends_lets_its_streams_finish(stack: SimulatedStack, http: httpx.Client) -> None:
    leaving = stack.of_kind("ingress")[0]
    with opened(http, "POST", leaving.url + CHAT, json=chat(max_tokens=400)) as part, ThreadPoolExecutor() as pool:
        part.read_events(20)
        ended = pool.submit(stack.remove, leaving)
        part.read_rest()
        ended.result()
    assert part.body.endswith(b"data: [DONE]\n\n")
    stack.heal()
    assert again(http, stack.urls[0], part.stream_id).body == part.body
