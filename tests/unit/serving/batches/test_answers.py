"""Rows of result files."""

from __future__ import annotations

import json

import pytest

from penstock.queue.errors import NoCapacity
from penstock.serving.batches.answers import Reply, answered, refusal, unanswered
from penstock.serving.batches.model import BatchSpec, Counters

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("usage", "counters"),
    [
        (
            {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}},
            Counters(completed=1, input_tokens=5, cached_tokens=3, output_tokens=2),
        ),
        (
            {"input_tokens": 5, "output_tokens": 2, "output_tokens_details": {"reasoning_tokens": 1}},
            Counters(completed=1, input_tokens=5, output_tokens=2, reasoning_tokens=1),
        ),
        (None, Counters(completed=1)),
        ("odd", Counters(completed=1)),
    ],
)
def test_tokens_are_counted(usage: object, counters: Counters) -> None:
    assert answered("batch_1", 0, "c", Reply(200, {}, json.dumps({"usage": usage}).encode())).counters == counters


@pytest.mark.parametrize("body", [b'{\n "a": "\xc3\xa9"\n}', b'{"a":"\xc3\xa9"}', b'{"a":\r"\xc3\xa9"}'])
def test_a_row_is_one_line_whatever_the_body_looks_like(body: bytes) -> None:
    answer = answered("batch_1", 3, "c", Reply(200, {"x-request-id": "r"}, body))
    assert len(answer.row.splitlines()) == 1
    assert json.loads(answer.row) == {
        "id": "batch_req_1-3",
        "custom_id": "c",
        "response": {"status_code": 200, "request_id": "r", "body": {"a": "é"}},
        "error": None,
    }


def test_an_error_that_is_no_json() -> None:
    answer = answered("batch_1", 0, "c", Reply(502, {}, b"<html>\xff"))
    assert (answer.kind, answer.counters) == ("error", Counters(failed=1))
    assert json.loads(answer.row)["response"]["body"]["error"]["message"] == "<html>�"


def test_a_line_without_an_answer() -> None:
    row = json.loads(unanswered("batch_1", 0, "c", "batch_expired", "too late").row)
    assert (row["response"], row["error"]) == (None, {"code": "batch_expired", "message": "too late"})


def test_a_refusal_is_openai_shaped() -> None:
    reply = refusal(NoCapacity("no replica"))
    assert (reply.status, json.loads(reply.body)["error"]["code"]) == (503, "no_capacity")


def test_output_ids_do_not_change() -> None:
    spec = BatchSpec(
        id="batch_" + "0" * 32,
        tenant="t",
        key_id="k",
        endpoint="/v1/completions",
        input_file_id="file-x",
        completion_window="24h",
        created_ms=0,
        expires_ms=1,
        metadata=None,
        output_expires_after_s=3600,
    )
    assert spec.output_id("output") == spec.output_id("output") != spec.output_id("error")
