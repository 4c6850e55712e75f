"""Named byte objects in a local folder or in whatever else fsspec reaches, such as an S3-compatible bucket.

An object appears whole or not at all: locally it is written beside its place and renamed, in a bucket its upload is
completed by the last call. fsspec's calls block, so each runs in a thread.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from penstock.queue.errors import PermanentError, TransientError
from penstock.serving.errors import NotFound
from penstock.serving.files.settings import FilesSettings

READ_BYTES = 1024 * 1024
"""A read at a time: large enough that the hop to a thread does not count."""
WRITE_BYTES = 1024 * 1024
"""What a writer collects before it goes to a thread."""
PART_BYTES = 8 * 1024 * 1024
"""A part of a multipart upload; S3 wants 5 MiB at least, and takes 10,000 of them."""
PART_SUFFIX = ".part"
PART_LIFETIME_S = 86_400.0
"""What was not written to for a day belongs to nobody any more: uploads that stall are cut off after a minute."""
_NAME = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
P = ParamSpec("P")
T = TypeVar("T")
_CLIENT_MODULES = frozenset({"botocore", "aiobotocore", "aiohttp"})


class StorageFull(PermanentError):
    """The file store has no room."""

    code = "storage_full"
    status = 507


class StorageUnavailable(TransientError):
    """The file store did not answer, or refused."""

    code = "storage_unavailable"


class ObjectMissing(NotFound):
    """There is no object of this name."""

    code = "object_missing"


@contextmanager
def storage_errors() -> Iterator[None]:
    """Raise our errors for what file systems and their clients raise."""
    try:
        yield
    except FileNotFoundError as error:
        raise ObjectMissing("the file's content is not in the file store") from error
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull("the file store is full; delete files or try again later") from error
        raise StorageUnavailable(f"the file store failed: {error}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _CLIENT_MODULES:
            raise
        raise StorageUnavailable(f"the file store failed: {error}") from error


async def _in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run in a thread, to its end also when this is cancelled: it works on what the caller is about to close."""
    running = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        with storage_errors():
            return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


class Writer:
    """One object on its way in: :meth:`write`, then :meth:`commit`, or it never existed.

    This one is for stores whose uploads count when they are completed.
    """

    def __init__(self, path: str, open_file: Callable[[], Any]) -> None:
        self._path = path
        self._open_file = open_file
        self._file: Any = None
        self._buffer = bytearray()
        self._committed = False

    async def write(self, data: bytes) -> None:
        """Append."""
        self._buffer += data
        if len(self._buffer) >= WRITE_BYTES:
            await _in_thread(self._flush)

    async def commit(self) -> None:
        """Make it visible under its name, on stable storage."""
        await _in_thread(self._commit)

    async def discard(self) -> None:
        """Forget it, unless it was committed."""
        if self._file is not None and not self._committed:
            with suppress(Exception):  # the store may be what failed; what stays behind is invisible
                await _in_thread(self._discard)

    def _flush(self) -> None:
        if self._file is None:
            self._file = self._open_file()
        data, self._buffer = self._buffer, bytearray()
        self._file.write(data)

    def _commit(self) -> None:
        self._flush()
        self._finish()
        self._committed = True

    def _finish(self) -> None:
        self._file.close()
        self._file.commit()

    def _discard(self) -> None:
        self._file.discard()


class LocalWriter(Writer):
    """Beside its place first, then renamed, both on disk before it counts."""

    def _finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._file.name, self._path)
        folder = os.open(os.path.dirname(self._path), os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _discard(self) -> None:
        with suppress(OSError):  # closing writes what is buffered, and the disk may be full
            self._file.close()
        os.unlink(self._file.name)


class ObjectStore:
    """The objects below ``files.root``. Names are ours: letters, digits, dashes, underscores, and slashes in between.

    Every method raises :class:`ValueError` for any other: it could lead out of the root or mean several objects.
    """

    def __init__(self, settings: FilesSettings) -> None:
        root = settings.root if "://" in settings.root else str(Path(settings.root).expanduser().absolute())
        self._fs, found = fsspec.core.url_to_fs(root, use_listings_cache=False, **settings.storage_options)
        self._root = str(found).rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)

    @asynccontextmanager
    async def create(self, name: str) -> AsyncIterator[Writer]:
        """A writer that is discarded unless it was committed inside the block.

        Raises:
            StorageFull: no room; also by the writer's methods.
            StorageUnavailable: the store is away; likewise.
        """
        writer = self._writer(self._path(name))
        try:
            yield writer
        finally:
            await asyncio.shield(writer.discard())

    async def put(self, name: str, data: bytes) -> None:
        """Write a whole object; errors as in :meth:`create`."""
        async with self.create(name) as writer:
            await writer.write(data)
            await writer.commit()

    async def read(self, name: str, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        """The bytes from ``start`` to before ``end``, piece by piece. Raises :class:`ObjectMissing`."""
        path = self._path(name)
        reader = _Reader(lambda: self._fs.open(path, "rb"), start, end)
        try:
            while data := await _in_thread(reader.read):
                yield data
        finally:
            await _in_thread(reader.close)

    async def get(self, name: str) -> bytes:
        """A whole object. Raises :class:`ObjectMissing`."""
        data: bytes = await _in_thread(self._fs.cat_file, self._path(name))
        return data

    async def delete(self, name: str) -> None:
        """Remove an object, or everything below a name. One that is not there is fine."""
        with suppress(ObjectMissing):
            await _in_thread(self._fs.rm, self._path(name), recursive=True)

    async def names(self) -> list[tuple[str, float]]:
        """Every object, and when it was written last, in seconds since the epoch."""
        return await _in_thread(self._names)

    def _names(self) -> list[tuple[str, float]]:
        found = self._fs.find(self._root, detail=True)
        return [
            (path.removeprefix(f"{self._root}/"), _changed(info))
            for path, info in found.items()
            if not path.endswith(PART_SUFFIX)
        ]

    async def sweep(self) -> None:
        """Remove what processes that were killed have left half written in a folder. (Buckets have lifecycle rules.)"""
        if self._local:
            await _in_thread(_remove_old_parts, Path(self._root))

    def _path(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no object's name")
        return f"{self._root}/{name}"

    def _writer(self, path: str) -> Writer:
        if self._local:
            return LocalWriter(path, lambda: _open_part(path))
        return Writer(path, lambda: self._fs.open(path, "wb", block_size=PART_BYTES, autocommit=False))


class _Reader:
    """A file that is opened by its first read; for threads."""

    def __init__(self, open_file: Callable[[], Any], start: int, end: int | None) -> None:
        self._open_file = open_file
        self._file: Any = None
        self._at = start
        self._end = end

    def read(self) -> bytes:
        """The next piece; empty at the end."""
        if self._file is None:
            self._file = self._open_file()
            self._file.seek(self._at)
        data: bytes = self._file.read(READ_BYTES if self._end is None else min(READ_BYTES, self._end - self._at))
        self._at += len(data)
        return data

    def close(self) -> None:
        """Idempotent."""
        if self._file is not None:
            self._file.close()


def _changed(info: dict[str, Any]) -> float:
    """File systems say it in their own ways: seconds locally, a ``datetime`` in a bucket."""
    changed = info["mtime"] if "mtime" in info else info["LastModified"]
    return float(changed.timestamp() if isinstance(changed, datetime) else changed)


def _open_part(path: str) -> Any:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return open(f"{path}.{uuid.uuid4().hex}{PART_SUFFIX}", "wb")


def _remove_old_parts(root: Path) -> None:
    oldest = time.time() - PART_LIFETIME_S
    for folder, _, names in os.walk(root):  # unlike rglob, it goes on when a folder is removed meanwhile
        for name in names:
            part = Path(folder, name)
            with suppress(FileNotFoundError):
                if part.suffix == PART_SUFFIX and part.stat().st_mtime < oldest:
                    part.unlink()
