"""Results of a batch on the user's disk: as they are, or as a table."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from penstock.serving.batches.client import BatchClient
from penstock.serving.batches.lines import LineSplitter
from penstock.serving.batches.rows import is_table

NO_LIMIT = 2**62
"""Rows are what the server wrote; there is nothing to guard against."""


def save(client: BatchClient, batch: dict[str, Any], output: Path, table: Path | None, id_column: str) -> int:
    """Write answers, then errors, beside ``output`` first and then in its place; returns the number of lines."""
    new = output.with_name(f".{output.name}.part{output.suffix}")
    rows = itertools.chain.from_iterable(
        _rows(client, batch[name]) for name in ("output_file_id", "error_file_id") if batch[name]
    )
    try:
        count = _save_table(rows, new, table, id_column) if is_table(output) else _save_lines(rows, new)
        os.replace(new, output)
    finally:
        new.unlink(missing_ok=True)
    return count


def _save_lines(rows: Iterator[bytes], new: Path) -> int:
    count = 0
    with new.open("wb") as file:
        for count, row in enumerate(rows, 1):  # noqa: B007
            file.write(row + b"\n")
    return count


def _save_table(rows: Iterator[bytes], new: Path, table: Path | None, id_column: str) -> int:
    from penstock.serving.batches.tables import answer_table, joined, read_table, write_table

    answers = answer_table(rows)
    write_table(new, answers if table is None else joined(read_table(table), id_column, answers))
    return len(answers)


def _rows(client: BatchClient, file_id: str) -> Iterator[bytes]:
    splitter = LineSplitter(NO_LIMIT)
    for piece in client.content(file_id):
        yield from (line.data for line in splitter.feed(piece) if line.data)
