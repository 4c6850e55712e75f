"""What is known of a file without a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.serving.batches.lines import BOM
from penstock.serving.batches.offline import endpoint_of

pytestmark = pytest.mark.unit


def _line(prompt: str) -> bytes:
    body = {"model": "m", "prompt": prompt}
    return json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}).encode()


@pytest.mark.parametrize(
    "content",
    [_line("hi"), _line("hi") + b"\r\njunk\n", BOM + _line("hi") + b"\n", _line("x" * 2_000_000) + b"\n" + _line("hi")],
    ids=["no line feed", "CRLF", "byte order mark", "long"],
)
def test_the_endpoint_is_that_of_the_first_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    assert endpoint_of(tmp_path / "in.jsonl") == "/v1/completions"


@pytest.mark.parametrize("content", [b"", b"junk\n", b"\n" + _line("hi"), BOM])
def test_a_file_without_a_first_request_has_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    assert endpoint_of(tmp_path / "in.jsonl") == ""
