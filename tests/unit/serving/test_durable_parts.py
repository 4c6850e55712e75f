"""Ids that come out the same, and bodies as handlers are given them."""

from __future__ import annotations

import json

import pytest

from penstock.serving.durable.bodies import as_stream, following, for_handler, previous_response
from penstock.serving.durable.draws import Draws
from penstock.serving.edge.intake import count_prompts, read_n, read_peek
from penstock.serving.request import digest_of

pytestmark = pytest.mark.unit


def test_draws_are_the_same_each_time_and_unlike_each_other() -> None:
    first, second, other = Draws("s", 1.0), Draws("s", 1.0), Draws("t", 1.0)
    drawn = [first.uuid4() for _ in range(100)]
    assert drawn == [second.uuid4() for _ in range(100)]
    assert len({*drawn, *(other.uuid4() for _ in range(100))}) == 200
    assert all(uuid.version == 4 for uuid in drawn)


def test_draws_of_a_choice_do_not_depend_on_the_others() -> None:
    one, two = Draws("s", 1.0), Draws("s", 1.0)
    seen = []
    for track in (0, 1, 0, 1, 1):
        one.track = track
        seen.append((track, one.uuid4()))
    found = []
    for track in (1, 1, 0, 1, 0):
        two.track = track
        found.append((track, two.uuid4()))
    assert sorted(seen, key=str) == sorted(found, key=str)
    assert len({drawn for _, drawn in seen}) == 5


def test_only_responses_are_changed() -> None:
    body = b'{"model": "m", "background": true}'
    assert for_handler("/v1/chat/completions", body, "s") is body
    changed = json.loads(for_handler("/v1/responses", b'{"model":"m","background":true,"store":true}', "s"))
    assert changed == {"model": "m", "request_id": "resp_s", "store": False}


def test_background_responses_are_rendered_as_streams() -> None:
    assert json.loads(for_handler("/v1/responses", b'{"stream":false}', "s", background=True))["stream"] is True
    assert json.loads(as_stream(b'{"input":"x"}')) == {"input": "x", "stream": True}


def test_a_conversation_goes_before_the_new_input() -> None:
    output = [{"type": "message", "role": "assistant", "content": []}]
    joined = json.loads(following(b'{"input":"and?","n":1}', b'{"input":"hello"}', output))
    said = [{"role": "user", "content": "hello"}, *output, {"role": "user", "content": "and?"}]
    assert joined == {"input": said, "n": 1}
    twice = json.loads(following(b'{"input":[{"role":"user","content":"x"}]}', json.dumps(joined).encode(), output))
    assert twice["input"] == [*said, *output, {"role": "user", "content": "x"}]


def test_previous_response() -> None:
    assert previous_response(b'{"previous_response_id":"resp_1"}') == "resp_1"
    assert previous_response(b'{"previous_response_id":null}') is None
    assert previous_response(b"{}") is None


def test_digests_tell_paths_and_bodies_apart() -> None:
    assert len({digest_of("/a", b"x"), digest_of("/a", b"y"), digest_of("/b", b"x"), digest_of("/a", b"x")}) == 3


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{}", (1, 1)),
        (b'{"n": 3, "prompt": "x"}', (3, 1)),
        (b'{"prompt": ["a", "b"]}', (1, 2)),
        (b'{"prompt": [1, 2, 3]}', (1, 1)),
        (b'{"prompt": [[1], [2], [3]]}', (1, 3)),
        (b'{"prompt": []}', (1, 1)),
        (b'{"n": "two"}', (1, 1)),
        (b'{"n": -1}', (1, 1)),
        (b'{"n": null}', (1, 1)),
    ],
)
def test_choices_of_a_body(body: bytes, expected: tuple[int, int]) -> None:
    peek = read_peek(body)
    assert (read_n(peek.n), count_prompts(peek.prompt)) == expected
