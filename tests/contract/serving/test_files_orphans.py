"""Objects that nothing leads to go; everything else stays."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import redis.asyncio

from penstock.queue.local.redis_server import RedisServer
from penstock.queue.records import new_request_id, now_ms
from penstock.queue.redis_client import connect_async
from penstock.queue.settings import RedisSettings
from penstock.serving.batches.model import BatchSpec, new_batch_id
from penstock.serving.batches.store import BatchStore
from penstock.serving.files.catalog import FileCatalog, FileMeta, new_file_id
from penstock.serving.files.objects import ObjectMissing, ObjectStore
from penstock.serving.files.orphans import MARKER, OrphanSweep
from penstock.serving.files.settings import FilesSettings
from tests.support.s3_server import S3Server

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]
AGE_S = 3600.0


class Place:
    """A file store and its Redis."""

    def __init__(self, client: redis.asyncio.Redis, settings: RedisSettings, objects: ObjectStore) -> None:
        self.client = client
        self.settings = settings
        self.objects = objects
        self.catalog = FileCatalog(client, settings, objects)
        self.batches = BatchStore(client, settings)

    async def sweep(self, age_s: float = -1.0) -> int:
        """As the next hour's sweeper; by default everything is old enough."""
        await self.client.delete(f"{self.settings.namespace}files-sweeper")
        return await self.sweeper(age_s).sweep()

    def sweeper(self, age_s: float = -1.0) -> OrphanSweep:
        return OrphanSweep(self.client, self.settings, self.catalog, self.batches.open_batches, age_s, 0.0)

    async def add(self) -> FileMeta:
        """A file with its content."""
        meta = FileMeta(id=new_file_id(), tenant="t", filename="f", purpose="batch", size=1, created_ms=now_ms())
        await self.objects.put(meta.id, b"x")
        await self.catalog.add(meta)
        return meta

    async def open_batch(self, input_file_id: str) -> BatchSpec:
        """A batch on which there is something to do."""
        spec = BatchSpec(
            id=new_batch_id(), tenant="t", key_id="k", endpoint="/v1/completions", input_file_id=input_file_id,
            completion_window="1h", created_ms=now_ms(), expires_ms=now_ms() + 3_600_000, metadata=None,
            output_expires_after_s=3600,
        )  # fmt: skip
        await self.catalog.pin(input_file_id, spec.id)
        await self.batches.create(spec, b"")
        return spec

    async def there(self, name: str) -> bool:
        try:
            await self.objects.get(name)
        except ObjectMissing:
            return False
        return True


@pytest_asyncio.fixture(params=["folder", "s3"])
async def place(request: pytest.FixtureRequest, redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[Place]:
    if request.param == "folder":
        files = FilesSettings(root=str(tmp_path / "files"))
    else:
        server: S3Server = request.getfixturevalue("s3_server")
        bucket = server.make_bucket(f"b{uuid.uuid4().hex}")
        files = FilesSettings(root=f"{bucket}/files", storage_options=server.storage_options)
    settings = RedisSettings(url=redis_server.url, namespace=f"orphans-{new_request_id()}:")
    async with connect_async(settings) as client:
        place = Place(client, settings, ObjectStore(files))
        assert await place.sweep() == 0  # the two are introduced to one another
        yield place


async def test_an_upload_that_died_before_it_was_known(place: Place) -> None:
    orphan, known = new_file_id(), await place.add()
    await place.objects.put(orphan, b"x")
    assert await place.sweep(AGE_S) == 0  # it may still be on its way
    assert await place.sweep() == 1
    assert not await place.there(orphan)
    assert await place.there(known.id)
    assert await place.there(MARKER)


async def test_what_a_batch_reads_stays_until_it_has_ended(place: Place) -> None:
    meta = await place.add()
    spec = await place.open_batch(meta.id)
    segment = f"segments/{spec.id}/{uuid.uuid4().hex}"
    await place.objects.put(segment, b"x")
    await place.catalog.delete(meta)
    assert await place.sweep() == 0
    assert await place.there(segment)
    await place.batches.close(spec, 60)  # its coordinator died between this and the rest
    assert await place.sweep() == 2
    assert not await place.there(segment)
    assert not await place.there(meta.id)


async def test_nothing_goes_that_we_did_not_put_there(place: Place) -> None:
    await place.objects.put("notes", b"x")
    await place.objects.put("file-of-mine/notes", b"x")
    assert await place.sweep() == 0
    assert await place.there("notes")
    assert await place.there("file-of-mine/notes")


async def test_one_sweeper_an_hour(place: Place) -> None:
    await place.objects.put(new_file_id(), b"x")
    assert await place.sweep() == 1
    await place.objects.put(new_file_id(), b"x")
    assert await place.sweeper().sweep() == 0


async def test_a_redis_that_lost_its_data_costs_no_file(place: Place) -> None:
    meta = await place.add()
    async for key in place.client.scan_iter(f"{place.settings.namespace}*"):
        await place.client.delete(key)
    assert await place.sweep() == 0
    assert await place.there(meta.id)


async def test_a_file_of_last_week_in_a_folder(redis_server: RedisServer, tmp_path: Path) -> None:
    """Ages are those of the file system."""
    settings = RedisSettings(url=redis_server.url, namespace=f"orphans-{new_request_id()}:")
    async with connect_async(settings) as client:
        place = Place(client, settings, ObjectStore(FilesSettings(root=str(tmp_path))))
        await place.sweep()
        old, new = new_file_id(), new_file_id()
        for name in (old, new):
            await place.objects.put(name, b"x")
        os.utime(tmp_path / old, (time.time() - 2 * AGE_S,) * 2)
        assert await place.sweep(AGE_S) == 1
        assert (await place.there(old), await place.there(new)) == (False, True)
