"""Rows of a table as requests, by a prompt template.

A template's ``{column}`` is replaced by the row's value; nothing else in it is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from penstock.queue.errors import RequestError

SUFFIXES = frozenset({".csv", ".parquet"})
_COLUMN = re.compile(r"\{(\w[^{}]*)\}")


class RowRequest(msgspec.Struct, frozen=True, kw_only=True):
    """How a row becomes a request. ``id_column`` empty: custom ids are ``row-0``, ``row-1``, ..."""

    template: str
    model: str
    endpoint: str = "/v1/chat/completions"
    system: str = ""
    id_column: str = ""
    max_tokens: int | None = None


class BadTable(RequestError):
    """A table that cannot be read, written or used with this template."""

    code = "bad_table"


def is_table(path: Path) -> bool:
    """Whether the file is read and written as a table, by its name."""
    return path.suffix.lower() in SUFFIXES


def request_lines(columns: list[str], rows: Iterable[dict[str, Any]], how: RowRequest) -> Iterator[bytes]:
    """One line of a batch's input per row. Raises :class:`BadTable` when a column is missing."""
    wanted = [*_COLUMN.findall(how.template + how.system), *filter(None, [how.id_column])]
    if missing := sorted(set(wanted) - set(columns)):
        raise BadTable(f"no column {', '.join(missing)}; there are {', '.join(columns)}")
    for number, row in enumerate(rows):
        yield msgspec.json.encode(_request(how, number, row)) + b"\n"


def _request(how: RowRequest, number: int, row: dict[str, Any]) -> dict[str, Any]:
    custom_id = _text(row[how.id_column]) if how.id_column else f"row-{number}"
    body: dict[str, Any] = {"model": how.model, **_prompt(how, row)}
    if how.max_tokens is not None:
        body["max_output_tokens" if how.endpoint == "/v1/responses" else "max_tokens"] = how.max_tokens
    return {"custom_id": custom_id, "method": "POST", "url": how.endpoint, "body": body}


def _prompt(how: RowRequest, row: dict[str, Any]) -> dict[str, Any]:
    text, system = fill(how.template, row), fill(how.system, row)
    if how.endpoint == "/v1/completions":
        return {"prompt": system + text}
    if how.endpoint == "/v1/responses":
        return {"input": text} | ({"instructions": system} if system else {})
    told = [{"role": "system", "content": system}] if system else []
    return {"messages": [*told, {"role": "user", "content": text}]}


def fill(template: str, row: dict[str, Any]) -> str:
    """The template with the row's values in it."""
    return _COLUMN.sub(lambda found: _text(row[found[1]]), template)


def _text(value: Any) -> str:
    return "" if value is None else str(value)
