"""What is known of each file, in Redis.

``{ns}file:{id}`` the description; ``{ns}files:{tenant}`` and ``{ns}files:{tenant}:{purpose}`` lists by time of
creation; ``{ns}files-expiry`` all that expire, by when; ``{ns}file-pins:{id}`` the batches that still read the
content. A deleted file is gone for everybody at once; its content stays until the last such batch has ended.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence, Set
from typing import Any, cast

import msgspec
import redis.asyncio

from penstock.queue.logs import get_logger
from penstock.queue.records import now_ms
from penstock.queue.redis_client import store_errors
from penstock.queue.settings import RedisSettings
from penstock.serving.errors import NotFound
from penstock.serving.files.index import Page, read_page
from penstock.serving.files.objects import ObjectStore

LOOK_BATCH = 500
"""Names looked up in one go."""
SWEEP_BATCH = 100
"""Expired files removed in one go: a few seconds of work on a slow store."""
log = get_logger()


class FileMeta(msgspec.Struct, frozen=True, kw_only=True):
    """One file of ``size`` bytes. Its content is the object called like its id. ``inspection`` (msgpack) is what the
    upload found out about a batch's input, see :mod:`penstock.serving.batches.inspection`.
    """

    id: str
    tenant: str
    filename: str
    purpose: str
    size: int
    created_ms: int
    expires_ms: int | None = None
    inspection: bytes = b""

    def to_openai(self) -> dict[str, Any]:
        """OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.size,
            "created_at": self.created_ms // 1000,
            "expires_at": None if self.expires_ms is None else self.expires_ms // 1000,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


_decoder = msgspec.msgpack.Decoder(FileMeta)
_ID = re.compile(r"file-[0-9a-f]{32}")


def new_file_id() -> str:
    """A fresh id."""
    return f"file-{uuid.uuid4().hex}"


class FileCatalog:
    """All files. Methods raise :class:`~penstock.queue.errors.StoreUnavailable` when Redis is away."""

    def __init__(self, client: redis.asyncio.Redis, settings: RedisSettings, objects: ObjectStore) -> None:
        self._client = client
        self._ns = settings.namespace
        self.objects = objects

    async def add(self, meta: FileMeta) -> None:
        """Make a file known, whose content is in the store already. Adding it again changes nothing."""
        pipeline = self._client.pipeline()
        pipeline.set(self._key(meta.id), msgspec.msgpack.encode(meta))
        for index in self._indexes(meta):
            pipeline.zadd(index, {meta.id: meta.created_ms})
        if meta.expires_ms is not None:
            pipeline.zadd(f"{self._ns}files-expiry", {meta.id: meta.expires_ms})
        with store_errors():
            await pipeline.execute()

    async def find(self, tenant: str, file_id: str) -> FileMeta:
        """The file. Raises :class:`NotFound` when the tenant has none of this id (any more).

        Whatever id a client names comes through here before anything is done with it.
        """
        meta = await self._load(file_id) if _ID.fullmatch(file_id) else None
        if meta is None or meta.tenant != tenant or (meta.expires_ms is not None and meta.expires_ms <= now_ms()):
            raise NotFound(f"No such File object: {file_id[:100]}")
        return meta

    async def page(
        self, tenant: str, *, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[FileMeta], bool]:
        """A page of the tenant's files, and whether there are more."""
        index = f"{self._ns}files:{tenant}" + (f":{purpose}" if purpose else "")
        found: Page = await read_page(self._client, index, after=after, limit=limit, newest_first=newest_first)
        with store_errors():
            values = cast(list[bytes | None], await self._client.mget([self._key(i) for i in found.ids] or ["-"]))
        files = [_decoder.decode(value) for value in values if value is not None]
        return [f for f in files if f.expires_ms is None or f.expires_ms > now_ms()], found.has_more

    async def delete(self, meta: FileMeta) -> None:
        """Remove a file; its content once no batch reads it."""
        pipeline = self._client.pipeline()
        pipeline.delete(self._key(meta.id))
        for index in (*self._indexes(meta), f"{self._ns}files-expiry"):
            pipeline.zrem(index, meta.id)
        pipeline.scard(self._pins(meta.id))
        with store_errors():
            pins = (await pipeline.execute())[-1]
        if not pins:
            await self.objects.delete(meta.id)

    async def pin(self, file_id: str, reader: str) -> None:
        """Keep the content of a file as long as ``reader`` wants it.

        To be done between two looks at the file: before the first nobody knows whose it is, and up to the second it may
        have been deleted.
        """
        with store_errors():
            await self._client.sadd(self._pins(file_id), reader)

    async def unpin(self, file_id: str, reader: str) -> None:
        """The reader is done; removes the content of a file that was deleted meanwhile."""
        pipeline = self._client.pipeline()
        pipeline.srem(self._pins(file_id), reader)
        pipeline.scard(self._pins(file_id))
        pipeline.exists(self._key(file_id))
        with store_errors():
            _, pins, known = await pipeline.execute()
        if not pins and not known:
            await self.objects.delete(file_id)

    async def sweep(self) -> int:
        """Remove files whose time has come; returns how many. Safe to run in several processes at once."""
        expiry = f"{self._ns}files-expiry"
        with store_errors():
            due = cast(list[bytes], await self._client.zrangebyscore(expiry, 0, now_ms(), start=0, num=SWEEP_BATCH))
        for member in due:
            meta = await self._load(member.decode())
            if meta is not None:
                await self.delete(meta)
            else:
                with store_errors():
                    await self._client.zrem(expiry, member)
        return len(due)

    async def unnamed(self, names: Sequence[str], readers: Set[str]) -> list[str]:
        """Those that are no file's content, and that none of ``readers`` wants."""
        found = []
        for start in range(0, len(names), LOOK_BATCH):
            some, pipeline = names[start : start + LOOK_BATCH], self._client.pipeline(transaction=False)
            for name in some:
                pipeline.exists(self._key(name))
                pipeline.smembers(self._pins(name))
            with store_errors():
                answers = await pipeline.execute()
            for name, known, pins in zip(some, answers[::2], answers[1::2], strict=True):
                if not known and readers.isdisjoint(pin.decode() for pin in pins):
                    found.append(name)
        return found

    async def _load(self, file_id: str) -> FileMeta | None:
        with store_errors():
            value = cast(bytes | None, await self._client.get(self._key(file_id)))
        return None if value is None else _decoder.decode(value)

    def _key(self, file_id: str) -> str:
        return f"{self._ns}file:{file_id}"

    def _pins(self, file_id: str) -> str:
        return f"{self._ns}file-pins:{file_id}"

    def _indexes(self, meta: FileMeta) -> tuple[str, str]:
        return f"{self._ns}files:{meta.tenant}", f"{self._ns}files:{meta.tenant}:{meta.purpose}"
