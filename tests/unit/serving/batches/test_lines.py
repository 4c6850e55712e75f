"""Cutting and reading lines of a batch's input."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.serving.batches.lines import BadLine, LineSplitter, read_envelope

pytestmark = pytest.mark.unit


def split(data: bytes, cuts: set[int], max_bytes: int = 1000) -> list[bytes | None]:
    splitter, lines = LineSplitter(max_bytes), []
    for start, end in itertools.pairwise([0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]):
        lines += splitter.feed(data[start:end])
    lines += splitter.finish()
    assert [line.at for line in lines] == list(range(len(lines)))
    return [line.data for line in lines]


@given(st.lists(st.binary(max_size=20).filter(lambda b: b"\n" not in b), max_size=20), st.sets(st.integers(0, 400)))
def test_cut_anywhere(lines: list[bytes], cuts: set[int]) -> None:
    whole = b"\n".join(lines)
    expected = whole.split(b"\n")
    if expected and not expected[-1]:
        expected.pop()  # nothing behind the last line feed is no line
    if expected:
        expected[0] = expected[0].removeprefix(b"\xef\xbb\xbf")
    assert split(whole, cuts) == expected


@given(st.sets(st.integers(0, 60)))
def test_a_line_over_the_limit_is_dropped(cuts: set[int]) -> None:
    assert split(b"short\n" + b"x" * 30 + b"\nagain", cuts, 10) == [b"short", None, b"again"]
    assert split(b"x" * 11, cuts, 10) == [None]


@given(st.binary(max_size=100))
def test_whatever_it_is_it_has_a_reason(data: bytes) -> None:
    with pytest.raises(BadLine) as refused:
        read_envelope(data)
    assert refused.value.code in {"invalid_json_line", "missing_required_parameter", "invalid_type"}
    assert refused.value.message


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "empty"),
        (b" \r", "empty"),
        (b"\xff\xfe{\x00", "UTF-16"),
        (b'{\x00"\x00', "UTF-16"),
        (b'{"custom_id": "\xff"}', "not UTF-8"),
        (b'{"a": NaN}', "invalid character"),
        (b"[" * 10_000, "not a JSON object"),
        (b'{"x":' * 10_000, "nested too deeply"),
        (b'{"custom_id": "a"', "truncated"),
    ],
)
def test_reasons_a_person_understands(data: bytes, told: str) -> None:
    with pytest.raises(BadLine, match=told) as refused:
        read_envelope(data)
    assert refused.value.code == "invalid_json_line"
