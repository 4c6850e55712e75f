"""``penstock queue``: what waits."""

from __future__ import annotations

import asyncio

import click

from penstock.queue.factory import open_queue
from penstock.queue.protocol import Depth
from penstock.queue.records import PriorityClass
from penstock.queue.settings import ModelSettings, QueueSettings, RedisSettings


@click.group("queue")
def command() -> None:
    pass


@command.command()
def depth() -> None:
    """Print accepted and unfinished requests, their prompt tokens and the age of the oldest, by class."""
    click.echo("class\trequests\ttokens\toldest_s")
    for priority_class, found in asyncio.run(_depth()).items():
        click.echo(f"{priority_class}\t{found.requests}\t{found.tokens}\t{found.oldest_age_s:.1f}")


async def _depth() -> dict[PriorityClass, Depth]:
    queue = open_queue(QueueSettings(), RedisSettings(), ModelSettings().pool)
    try:
        return await queue.depth()
    finally:
        await queue.close()
