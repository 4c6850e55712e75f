"""Lists of a tenant's objects in Redis: sorted sets by time of creation, read page by page."""

from __future__ import annotations

from typing import NamedTuple, cast

import redis.asyncio

from penstock.queue.redis_client import store_errors
from penstock.serving.errors import InvalidField


class Page(NamedTuple):
    """Ids of one page, and whether there are more behind them."""

    ids: list[str]
    has_more: bool


async def read_page(
    client: redis.asyncio.Redis, key: str, *, after: str | None, limit: int, newest_first: bool = True
) -> Page:
    """The ``limit`` ids behind ``after``, or from the start.

    Raises:
        InvalidField: there is no ``after`` in this list.
        StoreUnavailable: Redis is away.
    """
    with store_errors():
        start = 0
        if after is not None:
            rank = await (client.zrevrank if newest_first else client.zrank)(key, after)
            if rank is None:
                raise InvalidField(f"after: there is no {after!r} in this list", "after")
            start = cast(int, rank) + 1
        found = cast(list[bytes], await client.zrange(key, start, start + limit, desc=newest_first))
    return Page([member.decode() for member in found[:limit]], len(found) > limit)
