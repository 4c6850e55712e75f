"""The object store on a folder and on a real S3 server: whole objects or none."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.serving.files.objects import (
    PART_BYTES,
    PART_LIFETIME_S,
    WRITE_BYTES,
    ObjectMissing,
    ObjectStore,
    StorageUnavailable,
)
from penstock.serving.files.settings import FilesSettings
from tests.support.s3_server import S3Server
from tests.support.waiting import eventually_async

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "folder":
        return ObjectStore(FilesSettings(root=str(tmp_path)))
    server: S3Server = request.getfixturevalue("s3_server")
    bucket = server.make_bucket(f"b{uuid.uuid4().hex}")
    return ObjectStore(FilesSettings(root=f"{bucket}/files", storage_options=server.storage_options))


async def read(store: ObjectStore, name: str, start: int = 0, end: int | None = None) -> bytes:
    return b"".join([piece async for piece in store.read(name, start, end)])


async def test_an_object_of_several_parts_comes_back(store: ObjectStore) -> None:
    data = os.urandom(2 * PART_BYTES + 12_345)
    async with store.create("a") as writer:
        for start in range(0, len(data), 300_000):
            await writer.write(data[start : start + 300_000])
        await writer.commit()
    assert await read(store, "a") == await store.get("a") == data


@pytest.mark.parametrize("size", [0, 1, WRITE_BYTES])
async def test_small_objects(store: ObjectStore, size: int) -> None:
    await store.put("folder/small", b"x" * size)
    assert await store.get("folder/small") == b"x" * size


async def test_a_part_of_an_object(store: ObjectStore) -> None:
    data = os.urandom(3 * WRITE_BYTES)
    await store.put("a", data)
    assert await read(store, "a", 5, 9) == data[5:9]
    assert await read(store, "a", WRITE_BYTES - 3, 2 * WRITE_BYTES + 3) == data[WRITE_BYTES - 3 : 2 * WRITE_BYTES + 3]
    assert await read(store, "a", len(data) - 4) == data[-4:]


@pytest.mark.parametrize("size", [10, PART_BYTES + WRITE_BYTES])
async def test_what_was_not_committed_never_existed(store: ObjectStore, size: int) -> None:
    async with store.create("half") as writer:
        await writer.write(b"x" * size)
    with pytest.raises(ObjectMissing):
        await store.get("half")
    with pytest.raises(ObjectMissing):
        await read(store, "half")


async def test_an_object_is_replaced_at_once(store: ObjectStore) -> None:
    await store.put("a", b"old")
    async with store.create("a") as writer:
        await writer.write(b"new and longer")
        assert await store.get("a") == b"old"
        await writer.commit()
    assert await store.get("a") == b"new and longer"


async def test_delete_takes_what_is_below_too(store: ObjectStore) -> None:
    await store.put("segments/b/1", b"1")
    await store.put("segments/b/2", b"2")
    await store.put("segments/c/1", b"3")
    await store.delete("segments/b")
    await store.delete("segments/b")
    with pytest.raises(ObjectMissing):
        await store.get("segments/b/1")
    assert await store.get("segments/c/1") == b"3"


async def test_a_folder_keeps_nothing_of_what_broke_off(tmp_path: Path) -> None:
    store = ObjectStore(FilesSettings(root=str(tmp_path)))
    task = asyncio.create_task(_write_for_ever(store))
    await eventually_async(lambda: _has_begun(tmp_path), 10, "something is written")
    task.cancel()
    await asyncio.wait([task])
    assert list(_files(tmp_path)) == []


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/", "/etc/hosts", "../b", "a/../../b", "a//b", "a/", "*", "file-*", "file-[0-9]", "a?", "a\n"],
)
async def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    store = ObjectStore(FilesSettings(root=str(tmp_path / "files")))
    (tmp_path / "b").write_bytes(b"not ours")
    await store.put("file-1", b"x")
    for refused in (store.put(name, b"y"), store.get(name), read(store, name), store.delete(name)):
        with pytest.raises(ValueError, match="no object's name"):
            await refused
    assert await store.get("file-1") == b"x"
    assert (tmp_path / "b").read_bytes() == b"not ours"


async def test_a_sweep_of_a_folder_in_which_others_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of segments is removed just when the sweep is about to look into it."""
    store = ObjectStore(FilesSettings(root=str(tmp_path)))
    await store.put("segments/a/1", b"x")
    for name in ("segments/old.part", "segments/a/old.part", "new.part"):
        (tmp_path / name).write_bytes(b"half")
        age_s = 0 if name == "new.part" else 2 * PART_LIFETIME_S
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    look = os.scandir

    def removed_before(path: Any) -> Any:
        if str(path).endswith("segments/a"):
            shutil.rmtree(path)
        return look(path)

    monkeypatch.setattr(os, "scandir", removed_before)
    await store.sweep()
    monkeypatch.undo()
    assert [path.name for path in _files(tmp_path)] == ["new.part"]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


async def _has_begun(folder: Path) -> bool:
    return any(path.stat().st_size for path in _files(folder))


async def _write_for_ever(store: ObjectStore) -> None:
    async with store.create("a") as writer:
        while True:
            await writer.write(b"x" * 100_000)


async def test_an_s3_server_that_is_away(tmp_path: Path) -> None:
    away = S3Server(tmp_path)
    store = ObjectStore(FilesSettings(root="s3://bucket", storage_options=away.storage_options))
    with pytest.raises(StorageUnavailable):
        await store.put("a", b"x")
