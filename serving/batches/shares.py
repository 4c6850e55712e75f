"""What tenants have under way at the other ingresses, so that shares are fair over all of them.

Each ingress tells once a second in a key that expires; what it hears is as old. With answers shorter than that two
ingresses may both favour one tenant for a second, and then both the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import cast

import msgspec
import redis.asyncio

from penstock.queue.redis_client import store_errors
from penstock.queue.settings import RedisSettings

TOLD_FOR_S = 5
"""What an ingress has said counts for this long: over a few late turns, and as short as its batches' leases."""
_counts = msgspec.msgpack.Decoder(dict[str, int])


class Shares:
    """``{ns}batch-slots`` names the ingresses, ``{ns}batch-slots:{owner}`` holds the lines of each tenant there."""

    def __init__(self, client: redis.asyncio.Redis, settings: RedisSettings) -> None:
        self._client = client
        self._names = f"{settings.namespace}batch-slots"

    async def exchange(self, owner: str, taken: Mapping[str, int]) -> Counter[str]:
        """Tell what tenants have here; returns what they have elsewhere. Raises
        :class:`~penstock.queue.errors.StoreUnavailable`."""
        pipeline = self._client.pipeline()
        pipeline.set(self._key(owner), msgspec.msgpack.encode(dict(taken)), ex=TOLD_FOR_S)
        pipeline.sadd(self._names, owner)
        pipeline.smembers(self._names)
        with store_errors():
            members = cast("set[bytes]", (await pipeline.execute())[-1])
            others = sorted(member.decode() for member in members if member != owner.encode())
            return await self._read(others) if others else Counter()

    async def _read(self, others: list[str]) -> Counter[str]:
        told = cast("list[bytes | None]", await self._client.mget([self._key(other) for other in others]))
        if gone := [other for other, counts in zip(others, told, strict=True) if counts is None]:
            await self._client.srem(self._names, *gone)
        found = Counter[str]()
        for counts in told:
            found.update({} if counts is None else _counts.decode(counts))
        return found

    def _key(self, owner: str) -> str:
        return f"{self._names}:{owner}"
