"""Numbers on the events of a stream, and the ones a client has already."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextvars import Context

import pytest

from penstock.queue.errors import StreamInterrupted
from penstock.serving.context import RequestContext, Seen, enter
from penstock.serving.edge.event_ids import EventIds, parse_event_id
from penstock.serving.errors import InvalidField
from tests.unit.serving.apps import Recorder, Streaming, client_request
from tests.unit.serving.asgi_client import Reply, get

pytestmark = [pytest.mark.unit, pytest.mark.asyncio]

DONE = b"data: [DONE]\n\n"


def choice(index: int, text: str) -> bytes:
    return b'data: {"id":"x","choices":[{"index":%d,"delta":{"content":"%b"}}]}\n\n' % (index, text.encode())


async def numbered(chunks: list[bytes], *, choices: int = 1, skip: tuple[int, ...] | None = ()) -> Reply:
    """The stream as a client sees it, without the checksums."""
    reply = await rendered(chunks, choices, None if skip is None else Seen(skip))
    for message in reply.messages:
        if message.get("body"):
            message["body"] = re.sub(rb"(?m)^(id: [0-9.]+)-[0-9a-f]{8}$", rb"\1", message["body"])
    return reply


async def rendered(chunks: list[bytes], choices: int, seen: Seen | None) -> Reply:
    async def stream() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    enter(_context(choices, seen))
    return await get(EventIds(Streaming(stream)), "/")


def _context(choices: int, skip: Seen | None) -> RequestContext:
    request = client_request(path="/v1/completions", stream_id="s1", choices=choices)
    return RequestContext(request, skip=skip)


async def test_each_event_with_data_gets_its_ordinal_in_its_own_block() -> None:
    reply = await numbered([choice(0, "a"), b"event: ping\ndata: {}\n\n", DONE])
    assert reply.body == b"id: 1\n" + choice(0, "a") + b"id: 2\nevent: ping\ndata: {}\n\n" + b"id: 3\n" + DONE
    assert reply.headers["x-stream-id"] == "s1"


async def test_comments_and_errors_are_not_numbered() -> None:
    error = b'data: {"error": {"message": "no"}}\n\n'
    named = b"event: error\ndata: {}\n\n"
    reply = await numbered([b": wait\n\n", choice(0, "a"), error, named])
    assert reply.body == b": wait\n\n" + b"id: 1\n" + choice(0, "a") + error + named


@pytest.mark.parametrize("cut", range(1, 60, 7))
async def test_blocks_may_come_in_any_pieces(cut: int) -> None:
    whole = choice(0, "a") + choice(0, "b") + DONE
    reply = await numbered([whole[:cut], whole[cut:]])
    assert reply.body == b"id: 1\n" + choice(0, "a") + b"id: 2\n" + choice(0, "b") + b"id: 3\n" + DONE


async def test_what_the_client_has_is_passed_over() -> None:
    reply = await numbered([choice(0, "a"), choice(0, "b"), DONE], skip=(2,))
    assert reply.body == b"id: 3\n" + DONE
    assert reply.ended
    nothing = await numbered([choice(0, "a"), DONE], skip=(2,))
    assert (nothing.body, nothing.ended) == (b"", True)


async def test_an_error_is_told_to_whoever_has_more_events() -> None:
    error = b'data: {"error": {"message": "no"}}\n\n'
    assert (await numbered([choice(0, "a"), error], skip=(5,))).body == error


async def test_choices_count_by_themselves() -> None:
    reply = await numbered([choice(1, "a"), choice(0, "b"), choice(1, "c"), DONE], choices=2)
    ids = [line[4:] for line in reply.body.split(b"\n") if line.startswith(b"id: ")]
    assert ids == [b"0.1", b"1.1", b"1.2", b"1.2.1"]


async def test_choices_are_passed_over_by_themselves() -> None:
    events = [choice(0, "a"), choice(0, "b"), choice(1, "c"), choice(1, "d"), DONE]
    reply = await numbered(events, choices=2, skip=(1, 1))
    assert reply.body == b"id: 2.0\n" + choice(0, "b") + b"id: 2.2\n" + choice(1, "d") + b"id: 2.2.1\n" + DONE


async def test_text_that_looks_like_a_choice_is_text() -> None:
    tricky = r"\"choices\":[{\"index\":1,"
    reply = await numbered([choice(0, tricky)], choices=2)
    assert reply.body.startswith(b"id: 1.0\n")


async def test_an_id_with_more_counts_than_the_stream_has_is_refused() -> None:
    with pytest.raises(InvalidField):
        await numbered([DONE], skip=(1, 2, 3))


async def test_answers_that_are_no_stream_keep_their_bytes() -> None:
    enter(_context(1, Seen()))
    reply = await get(EventIds(Recorder()), "/")
    assert (reply.body, reply.headers["x-stream-id"]) == (b"{}", "s1")


async def test_streams_nobody_can_ask_for_again_stay_as_they_are() -> None:
    reply = await numbered([choice(0, "a"), DONE], skip=None)
    assert reply.body == choice(0, "a") + DONE
    assert "x-stream-id" not in reply.headers


async def test_last_event_ids() -> None:
    assert parse_event_id("") == Seen()
    assert parse_event_id(" 12.9 ") == Seen((12, 9))
    assert parse_event_id("12-0000ffff") == Seen((12,), 0xFFFF)
    for wrong in ("x", "1.", "-1", "1.x", "9" * 20, "1-", "1-xyz", "1-0000ffff1"):
        with pytest.raises(InvalidField):
            parse_event_id(wrong)


@pytest.mark.parametrize("choices", [1, 2])
async def test_the_answer_a_client_resumes_is_the_one_it_began(choices: int) -> None:
    """The id of each event vouches for all events before it."""
    events = [choice(0, "a"), choice(choices - 1, "b"), choice(0, "c"), DONE]
    whole = (await rendered(events, choices, Seen())).body
    for last in re.findall(rb"(?m)^id: (.*)$", whole):
        seen = parse_event_id(last.decode())
        rest = (await rendered(events, choices, seen)).body
        assert whole.endswith(rest)
        with pytest.raises(StreamInterrupted):
            await rendered([choice(0, "another"), *events[1:]], choices, seen)


async def test_the_checksum_of_choices_does_not_depend_on_how_they_interleave() -> None:
    first, second = [choice(0, "a"), choice(0, "b")], [choice(1, "c"), choice(1, "d")]
    ids = [
        re.findall(rb"(?m)^id: (.*)$", (await rendered(events, 2, Seen())).body)[-1]
        for events in ([*first, *second], [first[0], second[0], first[1], second[1]])
    ]
    assert ids[0] == ids[1]


async def test_what_generates_nothing_passes() -> None:
    """Metrics and the list of models come without a request's context."""
    reply = await asyncio.create_task(get(EventIds(Recorder()), "/metrics"), context=Context())
    assert reply.body == b"{}"
