"""CSV and Parquet in and out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from penstock.serving.batches.answers import Reply, answered, unanswered
from penstock.serving.batches.rows import BadTable, RowRequest, fill, request_lines
from penstock.serving.batches.tables import (
    answer_table,
    joined,
    read_table,
    write_table,
)

pytestmark = pytest.mark.unit
TABLE = pl.DataFrame({"id": ["x", "y"], "question": ['Who, and "why"?', None], "n": [1, 2]})


def rows_of(table: pl.DataFrame, how: RowRequest) -> Iterator[bytes]:
    return request_lines(table.columns, table.iter_rows(named=True), how)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_rows_become_requests(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"in{suffix}"
    write_table(path, TABLE)
    how = RowRequest(template="Q{n}: {question}", system="Be {n}.", model="m", id_column="id", max_tokens=5)
    first, second = (json.loads(row) for row in rows_of(read_table(path), how))
    assert first == {
        "custom_id": "x",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "m",
            "messages": [
                {"role": "system", "content": "Be 1."},
                {"role": "user", "content": 'Q1: Who, and "why"?'},
            ],
            "max_tokens": 5,
        },
    }
    assert second["body"]["messages"][1]["content"] == "Q2: "


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"model": "m", "prompt": "S1", "max_tokens": 3}),
        ("/v1/responses", {"model": "m", "input": "1", "instructions": "S", "max_output_tokens": 3}),
    ],
)
def test_other_endpoints(endpoint: str, body: dict[str, object]) -> None:
    how = RowRequest(template="{n}", system="S", model="m", endpoint=endpoint, max_tokens=3)
    first = json.loads(next(rows_of(TABLE, how)))
    assert (first["custom_id"], first["url"], first["body"]) == ("row-0", endpoint, body)


def test_a_template_is_no_program() -> None:
    assert fill("{a} {a.__class__} {{a}} {0} {}", {"a": "{b}", "a.__class__": "x", "0": "y"}) == "{b} x {{b}} y {}"
    with pytest.raises(BadTable, match="no column answer; there are id, question, n"):
        next(rows_of(TABLE, RowRequest(template="{answer}", model="m")))


def test_a_table_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"junk")
    with pytest.raises(BadTable):
        read_table(tmp_path / "a.parquet")


def test_answers_beside_the_input() -> None:
    body = {"choices": [{"message": {"content": "Me"}}], "usage": {"prompt_tokens": 4, "completion_tokens": 2}}
    rows = [
        unanswered("batch_1", 1, "row-1", "batch_expired", "too late").row,
        answered("batch_1", 0, "row-0", Reply(200, {}, json.dumps(body).encode())).row,
    ]
    table = joined(TABLE, "", answer_table(rows))
    assert table.select("id", "answer", "error", "output_tokens").rows() == [
        ("x", "Me", None, 2),
        ("y", None, "batch_expired: too late", None),
    ]


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ({"choices": [{"text": "one"}]}, "one"),
        ({"choices": [{"message": {"content": None}}]}, ""),
        ({"output": [{"content": None}, {"content": [{"text": "a"}, {"text": "b"}]}]}, "ab"),
    ],
)
def test_answers_of_every_endpoint(body: dict[str, object], answer: str) -> None:
    row = answered("batch_1", 0, "c", Reply(200, {}, json.dumps(body).encode())).row
    assert answer_table([row])["answer"].to_list() == [answer]
