"""CSV and Parquet in and out, by polars, which takes a second to import."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from penstock.serving.batches.rows import BadTable


def read_table(path: Path) -> pl.DataFrame:
    """The whole table. CSV columns stay text. Raises :class:`BadTable`."""
    try:
        if path.suffix.lower() == ".parquet":
            return pl.read_parquet(path)
        return pl.read_csv(path, infer_schema=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise BadTable(f"{path}: {error}") from error


def write_table(path: Path, table: pl.DataFrame) -> None:
    """Write by the name's suffix."""
    if path.suffix.lower() == ".parquet":
        table.write_parquet(path)
    else:
        table.write_csv(path)


def answer_table(rows: Iterable[bytes]) -> pl.DataFrame:
    """Result lines as columns: custom_id, answer, error, input_tokens, output_tokens."""
    schema = [(name, pl.String()) for name in ("custom_id", "answer", "error")]
    counts = [(name, pl.Int64()) for name in ("input_tokens", "output_tokens")]
    return pl.DataFrame([_columns(msgspec.json.decode(row)) for row in rows], schema=[*schema, *counts])


def joined(table: pl.DataFrame, id_column: str, answers: pl.DataFrame) -> pl.DataFrame:
    """The input's columns with the answers' beside them, in the order of the input."""
    ids = pl.col(id_column).cast(pl.String) if id_column else pl.format("row-{}", pl.int_range(pl.len()))
    return table.with_columns(ids.alias("custom_id")).join(answers, on="custom_id", how="left", maintain_order="left")


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    response = row["response"] or {}
    body = response.get("body") or {}
    error = row["error"] or body.get("error")
    usage = body.get("usage") or {}
    return {
        "custom_id": row["custom_id"],
        "answer": None if error else _answer(body),
        "error": f"{error.get('code')}: {error.get('message')}" if error else None,
        "input_tokens": usage.get("prompt_tokens") or usage.get("input_tokens"),
        "output_tokens": usage.get("completion_tokens") or usage.get("output_tokens"),
    }


def _answer(body: dict[str, Any]) -> str:
    if "output" in body:
        parts = [part for item in body["output"] for part in item.get("content") or []]
        return "".join(part.get("text") or "" for part in parts)
    choice = (body.get("choices") or [{}])[0]
    return str(choice.get("text") or (choice.get("message") or {}).get("content") or "")
