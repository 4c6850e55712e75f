"""``penstock keys``: API keys. Changes take effect within a second, without a restart."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TypeVar

import click

from penstock.queue.redis_client import connect_async
from penstock.queue.settings import RedisSettings
from penstock.serving.tenants import KeyStore

T = TypeVar("T")


@click.group("keys")
def command() -> None:
    pass


@command.command()
@click.option("--tenant", required=True, help="Whose key it is; tenants need not be created.")
@click.option("--name", default="", help="A label to recognise the key by.")
def create(tenant: str, name: str) -> None:
    """Make a key and print it. It cannot be shown again."""
    key, info = _with_store(lambda store: store.create(tenant, name))
    click.echo(f"{info.id} for tenant {info.tenant}; keep the key, it is not shown again:", err=True)
    click.echo(key)


@command.command("list")
def list_keys() -> None:
    """Print id, tenant, label and time of creation of every key."""
    for info in _with_store(lambda store: store.entries()):
        created = datetime.fromtimestamp(info.created / 1000, UTC).isoformat(timespec="seconds")
        click.echo("\t".join((info.id, info.tenant, info.label, created)))


@command.command()
@click.argument("key_id", metavar="ID")
def revoke(key_id: str) -> None:
    """End a key. Requests under way are finished."""
    if not _with_store(lambda store: store.revoke(key_id)):
        click.echo(f"penstock: there is no key {key_id}", err=True)
        sys.exit(1)


def _with_store(action: Callable[[KeyStore], Awaitable[T]]) -> T:
    async def run() -> T:
        settings = RedisSettings()
        async with connect_async(settings) as client:
            return await action(KeyStore(client, settings))

    return asyncio.run(run())
