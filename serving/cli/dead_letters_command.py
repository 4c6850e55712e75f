"""``penstock dead-letters``: requests that were given up, and what to do with them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from penstock.queue.dead_letters import DeadLetter, retry
from penstock.queue.errors import InvalidRecord
from penstock.queue.factory import open_queue
from penstock.queue.protocol import RequestQueue
from penstock.queue.redis_client import connect_async
from penstock.queue.settings import ModelSettings, QueueSettings, RedisSettings
from penstock.queue.token_log import RequestLog

SHOWN = 100
ALL = 100_000
"""More dead letters than these are no longer an operator's work but an incident."""

T = TypeVar("T")
_json = click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
_chosen = click.argument("ids", metavar="ID...", nargs=-1)
_every = click.option("--all", "every", is_flag=True, help="All of them.")


@click.group("dead-letters")
def command() -> None:
    pass


@command.command("list")
@click.option("--limit", default=SHOWN, show_default=True, help="The oldest so many.")
@_json
def list_letters(limit: int, as_json: bool) -> None:
    """Print id, time, tenant, class, prompt tokens and reason of each."""
    rows = [_row(letter) for letter in _with_queue(lambda queue, _: queue.dead_letters(limit))]
    if as_json:
        _print_json(rows)
        return
    table = Table("id", "time", "request", "tenant", "class", "tokens", "reason")
    for row in rows:
        table.add_row(*(str(row[name]) for name in ("id", "at", "request", "tenant", "class", "tokens", "reason")))
    Console().print(table if rows else "no dead letters")


@command.command()
@click.argument("letter_id", metavar="ID")
@_json
def show(letter_id: str, as_json: bool) -> None:
    """Print all there is of one: reason, sampling parameters, tags, the client's request."""
    (letter,) = _choose((letter_id,), every=False)
    details = _row(letter) | _details(letter)
    if as_json:
        _print_json([details])
        return
    table = Table(show_header=False, box=None)
    for name, value in details.items():
        table.add_row(f"[bold]{name}[/bold]", value if isinstance(value, str) else json.dumps(value))
    Console().print(table)


@command.command("retry")
@_chosen
@_every
def retry_letters(ids: tuple[str, ...], every: bool) -> None:
    """Run them again from the beginning, with fresh attempts and no deadline."""
    letters = _choose(ids, every=every)
    _with_queue(lambda queue, log: retry(queue, log, letters))
    click.echo(f"{len(letters)} published again")


@command.command()
@_chosen
@_every
def drop(ids: tuple[str, ...], every: bool) -> None:
    """Forget them."""
    letters = _choose(ids, every=every)
    dropped = _with_queue(lambda queue, _: queue.drop_dead_letters([letter.id for letter in letters]))
    click.echo(f"{dropped} dropped")


def _choose(ids: tuple[str, ...], *, every: bool) -> list[DeadLetter]:
    """The letters that are named. Ends the command when one is unknown or none is named."""
    if bool(ids) == every:
        raise click.UsageError("name dead letters by their ID, or give --all")
    letters = {letter.id: letter for letter in _with_queue(lambda queue, _: queue.dead_letters(ALL))}
    if unknown := [id_ for id_ in ids if id_ not in letters]:
        click.echo(f"penstock: there is no dead letter {', '.join(unknown)}", err=True)
        sys.exit(1)
    return list(letters.values()) if every else [letters[id_] for id_ in ids]


def _row(letter: DeadLetter) -> dict[str, Any]:
    at = datetime.fromtimestamp(letter.at_ms / 1000, UTC).isoformat(timespec="seconds")
    row: dict[str, Any] = {"id": letter.id, "at": at, "reason": letter.reason}
    try:
        record = letter.record()
    except InvalidRecord:
        return row | dict.fromkeys(("request", "tenant", "class", "tokens"), "")
    return row | {
        "request": record.id,
        "tenant": record.tenant,
        "class": record.priority_class.value,
        "tokens": record.num_tokens,
    }


def _details(letter: DeadLetter) -> dict[str, Any]:
    try:
        record = letter.record()
    except InvalidRecord:
        return {"bytes": letter.data.hex()}
    body = (record.body or b"").decode(errors="replace")
    return {
        "model": record.model,
        "pool": record.pool,
        "release": record.release,
        "external_id": record.external_id or "",
        "sampling": record.sampling,
        "tags": record.tags,
        "payload": record.payload_ref or "",
        "body": body,
    }


def _print_json(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        click.echo(json.dumps(row, default=str))


def _with_queue(action: Callable[[RequestQueue, RequestLog], Awaitable[T]]) -> T:
    async def run() -> T:
        settings = RedisSettings()
        queue = open_queue(QueueSettings(), settings, ModelSettings().pool)
        try:
            async with connect_async(settings) as client:
                return await action(queue, RequestLog(client, settings))
        finally:
            await queue.close()

    return asyncio.run(run())
