"""What a line cannot be is told in the error file."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from penstock.serving.batches.backend import InnerBackend
from penstock.serving.batches.lines import RawLine
from penstock.serving.batches.runner import LineRunner
from penstock.serving.batches.settings import BatchSettings
from tests.unit.serving.batches.test_urgency import Clock, urgency

pytestmark = [pytest.mark.unit, pytest.mark.asyncio]


async def test_a_line_cannot_follow_a_response() -> None:
    """Refused before anything is asked for it."""
    waiting = urgency(Clock(), 1)
    spec = msgspec.structs.replace(waiting._spec, endpoint="/v1/responses")
    nobody: Any = None
    runner = LineRunner(spec, InnerBackend(nobody, nobody, nobody, nobody), BatchSettings(), waiting)
    body = {"model": "m", "input": "And then?", "previous_response_id": "resp_1"}
    answer = await runner.run(RawLine(0, json.dumps({"custom_id": "c", "body": body}).encode()))
    response = json.loads(answer.row)["response"]
    assert (answer.kind, response["status_code"]) == ("error", 400)
    assert "put the conversation so far into its input" in response["body"]["error"]["message"]
