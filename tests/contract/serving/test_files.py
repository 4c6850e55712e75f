"""The Files API over real HTTP and Redis, driven by OpenAI's own client."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest

from penstock.queue.local.redis_server import RedisServer
from penstock.queue.redis_client import connect_async
from penstock.serving.files.orphans import MARKER
from penstock.serving.tenants import KeyStore
from tests.support.batch_server import BatchServer, jsonl, line, new_server, submit, until
from tests.support.waiting import eventually_async

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]
MIB = 1024 * 1024


@pytest.fixture
def server(redis_server: RedisServer, tmp_path: Path) -> BatchServer:
    return new_server(redis_server, tmp_path, batches={"coordinate": False})


def stored(server: BatchServer) -> list[str]:
    """Names of the objects, without the one by which the store knows its Redis."""
    return sorted(path.name for path in Path(server.root).rglob("*") if path.is_file() and path.name != MARKER)


async def test_a_file_goes_in_and_comes_out(server: BatchServer) -> None:
    content = os.urandom(3 * MIB + 17)
    async with server.serving() as api:
        made = await api.files.create(file=("data.jsonl", content), purpose="batch")
        assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(content), "data.jsonl", "batch")
        assert (made.status, made.status_details) == ("processed", None)
        assert made.expires_at is not None
        assert made.expires_at - made.created_at == 2_592_000
        assert await api.files.retrieve(made.id) == made
        assert (await api.files.content(made.id)).content == content


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=5-9", 5, 10),
        ("bytes=90-", 90, 100),
        ("bytes=-7", 93, 100),
        ("bytes=95-500", 95, 100),
    ],
)
async def test_ranges(server: BatchServer, asked: str, start: int, end: int) -> None:
    content = bytes(range(100))
    async with server.serving() as api:
        made = await api.files.create(file=("a", content), purpose="batch")
        response = await _get_content(server, made.id, {"range": asked})
    assert (response.status_code, response.content) == (206, content[start:end])
    assert response.headers["content-range"] == f"bytes {start}-{end - 1}/100"


@pytest.mark.parametrize(
    ("asked", "status"), [("bytes=100-", 416), ("bytes=9-5", 416), ("lines=1-2", 200), ("bytes=-", 200)]
)
async def test_ranges_that_are_none(server: BatchServer, asked: str, status: int) -> None:
    async with server.serving() as api:
        made = await api.files.create(file=("a", bytes(100)), purpose="batch")
        response = await _get_content(server, made.id, {"range": asked})
    assert response.status_code == status


async def test_a_list_page_by_page(server: BatchServer) -> None:
    async with server.serving() as api:
        made = [(await api.files.create(file=(f"{i}", b"{}"), purpose="batch")).id for i in range(7)]
        newest_first = [file.id async for file in await api.files.list(limit=3)]
        oldest_first = [file.id async for file in await api.files.list(limit=2, order="asc", purpose="batch")]
        assert [file.id async for file in await api.files.list(purpose="batch_output")] == []
        with pytest.raises(openai.BadRequestError, match="after"):
            await api.files.list(after="file-nobody")
    assert sorted(newest_first) == sorted(oldest_first) == sorted(made)
    assert newest_first == oldest_first[::-1]


async def test_a_deleted_file_is_gone(server: BatchServer) -> None:
    async with server.serving() as api:
        made = await api.files.create(file=("a", b"{}"), purpose="batch")
        gone = await api.files.delete(made.id)
        assert (gone.id, gone.deleted, gone.object) == (made.id, True, "file")
        for call in (api.files.retrieve, api.files.content, api.files.delete):
            with pytest.raises(openai.NotFoundError, match="No such File object"):
                await call(made.id)
        assert [file.id async for file in await api.files.list()] == []
    assert stored(server) == []


async def test_expired_files_are_swept(server: BatchServer) -> None:
    async with server.serving() as api:
        made = await api.files.create(
            file=("a", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert made.expires_at == made.created_at + 3600
        await _let_expire(server, made.id)
        with pytest.raises(openai.NotFoundError):
            await api.files.retrieve(made.id)
        assert [file.id async for file in await api.files.list()] == []
    async with server.serving():  # sweeps as it starts
        await eventually_async(lambda: _is_empty(server), 10, "the content is removed")


async def test_tenants_do_not_see_each_other(server: BatchServer) -> None:
    async with connect_async(server.redis) as client:
        keys = [(await KeyStore(client, server.redis).create(tenant))[0] for tenant in ("one", "two")]
    async with server.serving() as api:
        one, two = (api.with_options(api_key=key) for key in keys)
        made = await one.files.create(file=("a", b"{}"), purpose="batch")
        assert [file.id async for file in await two.files.list()] == []
        for call in (two.files.retrieve, two.files.content, two.files.delete):
            with pytest.raises(openai.NotFoundError):
                await call(made.id)
        with pytest.raises(openai.AuthenticationError):
            await api.files.list()
        assert [file.id async for file in await one.files.list()] == [made.id]


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..\\..\\boot.ini", "a\x00b", "x" * 3000, "..", "naïve 🌊.jsonl", ""]
)
async def test_names_are_only_shown(server: BatchServer, name: str) -> None:
    async with server.serving() as api:
        form = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        form += (
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="'
            + name.encode()
            + b'"\r\n\r\n{}\r\n--b--\r\n'
        )
        response = await _post(server, form)
        shown = response.json()["filename"]
        assert response.status_code == 200
        assert not set(shown) & {"/", "\\", "\x00"}
        assert 0 < len(shown) <= 255
        assert shown != ".."
        assert (await api.files.content(response.json()["id"])).content == b"{}"
    assert stored(server) == [response.json()["id"]]


async def test_a_file_over_the_limit(redis_server: RedisServer, tmp_path: Path) -> None:
    server = new_server(redis_server, tmp_path, files={"max_upload_bytes": MIB}, batches={"coordinate": False})
    async with server.serving() as api:
        with pytest.raises(openai.APIStatusError, match="over the limit of 1048576 bytes") as announced:
            await api.files.create(file=("a", bytes(3 * MIB)), purpose="batch")
        counted = await _post(server, _pieces(b"x" * MIB, 3))
        assert (await api.files.create(file=("a", bytes(MIB)), purpose="batch")).bytes == MIB
    assert (announced.value.status_code, announced.value.code) == (413, "payload_too_large")
    assert counted.status_code == 413
    assert len(stored(server)) == 1


@pytest.mark.parametrize(
    ("form", "told"),
    [
        (b"junk", "not multipart/form-data"),
        (b"", "in the middle of the form"),
        (b"--b\r\nContent-Disposition: form-data; name=" + b"x" * 10_000, "not multipart/form-data"),
        (b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx', "in the middle of the form"),
        (b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n', "no part called 'file'"),
        (b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n--b--\r\n', "purpose must be"),
        (
            b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n' + b"x" * 10_000 + b"\r\n--b--\r\n",
            "longer than",
        ),
    ],
)
async def test_forms_that_are_none(server: BatchServer, form: bytes, told: str) -> None:
    async with server.serving():
        response = await _post(server, form)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
    assert told in response.json()["error"]["message"]
    assert stored(server) == []


async def test_what_is_asked_wrongly(server: BatchServer) -> None:
    async with server.serving() as api:
        for purpose in ("fine-tune", "batch_output", "assistants"):
            with pytest.raises(openai.BadRequestError, match="purpose must be 'batch'"):
                await api.files.create(file=("a", b"{}"), purpose=purpose)  # type: ignore[arg-type]
        for seconds in (1, 2_592_001):
            with pytest.raises(openai.BadRequestError, match="seconds must be from 3600"):
                await api.files.create(
                    file=("a", b""), purpose="batch", expires_after={"anchor": "created_at", "seconds": seconds}
                )
        with pytest.raises(openai.BadRequestError, match="limit must be"):
            await api.files.list(limit=10_001)
        with pytest.raises(openai.BadRequestError, match="order must be"):
            await api.files.list(order="up")  # type: ignore[arg-type]
        async with httpx.AsyncClient(trust_env=False) as http:
            assert (await http.put(f"{server.url}/v1/files")).status_code == 405
            assert (await http.delete(f"{server.url}/v1/files/file-x/content")).status_code == 404


async def test_half_an_upload_is_nothing(server: BatchServer) -> None:
    async with server.serving() as api:
        begun = asyncio.Event()
        uploading = asyncio.create_task(_post(server, _stalling(begun)))
        await begun.wait()
        await eventually_async(lambda: _has_part(server), 10, "some of it is on disk")
        assert [file.id async for file in await api.files.list()] == []
        uploading.cancel()
        await asyncio.wait([uploading])
        await eventually_async(lambda: _is_empty(server), 10, "nothing is left of it")


async def test_an_upload_is_not_held_in_memory(server: BatchServer) -> None:
    async with server.serving() as api:
        await _post(server, _pieces(b"x" * MIB, 4))
        _forget_peak()
        before = _peak_rss_mib()
        response = await _post(server, _pieces(b'{"a": 1}\n' * (MIB // 9), 150))
        assert response.json()["bytes"] == (MIB // 9) * 9 * 150
        assert _peak_rss_mib() - before < 60
        assert len([file async for file in await api.files.list()]) == 2


async def test_a_file_outlives_its_deletion_while_a_batch_reads_it(redis_server: RedisServer, tmp_path: Path) -> None:
    idle = new_server(redis_server, tmp_path, batches={"coordinate": False})
    async with idle.serving() as api:
        batch = await submit(api, jsonl([line(f"c{i}") for i in range(10)]))
        await api.files.delete(batch.input_file_id)
        with pytest.raises(openai.NotFoundError):
            await api.files.retrieve(batch.input_file_id)
        assert stored(idle) == [batch.input_file_id]
    idle.batches = {}
    async with idle.serving() as api:
        done = await until(api, batch.id, "completed")
        assert done.request_counts is not None
        assert done.request_counts.completed == 10
        await eventually_async(lambda: _holds_only(idle, done.output_file_id), 10, "only the output is left")


async def test_a_full_disk(redis_server: RedisServer, small_disk: Path) -> None:
    server = new_server(redis_server, small_disk, batches={"coordinate": False})
    async with server.serving() as api:
        kept = await api.files.create(file=("a", b"x" * MIB), purpose="batch")
        with pytest.raises(openai.InternalServerError, match="file store is full") as full:
            await api.files.create(file=("b", bytes(6 * MIB)), purpose="batch")
        assert (full.value.status_code, full.value.code) == (507, "storage_full")
        assert full.value.response.headers["x-should-retry"] == "false"
        assert [file.id async for file in await api.files.list()] == [kept.id]
        assert stored(server) == [kept.id]
        assert (await api.files.create(file=("c", bytes(MIB)), purpose="batch")).bytes == MIB


def _forget_peak() -> None:
    """The peak starts again at what is resident now, see proc(5): else it may be an earlier test's."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_rss_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


async def _get_content(server: BatchServer, file_id: str, headers: dict[str, str]) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as http:
        return await http.get(f"{server.url}/v1/files/{file_id}/content", headers=headers)


async def _post(server: BatchServer, content: bytes | AsyncIterator[bytes]) -> httpx.Response:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
        return await http.post(f"{server.url}/v1/files", content=content, headers=headers)


async def _pieces(piece: bytes, times: int) -> AsyncIterator[bytes]:
    yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    for _ in range(times):
        yield piece
    yield b"\r\n--b--\r\n"


async def _stalling(begun: asyncio.Event) -> AsyncIterator[bytes]:
    async for piece in _pieces(b"x" * MIB, 3):
        if piece.endswith(b"--b--\r\n"):
            begun.set()
            await asyncio.Event().wait()
        yield piece


async def _has_part(server: BatchServer) -> bool:
    return any(name.endswith(".part") for name in stored(server))


async def _is_empty(server: BatchServer) -> bool:
    return not stored(server)


async def _holds_only(server: BatchServer, name: str | None) -> bool:
    return stored(server) == [name]


async def _let_expire(server: BatchServer, file_id: str) -> None:
    """Write the description anew with an expiry that has passed, as time would."""
    from penstock.serving.files.catalog import FileCatalog, FileMeta
    from penstock.serving.files.objects import ObjectStore
    from penstock.serving.files.settings import FilesSettings

    async with connect_async(server.redis) as client:
        catalog = FileCatalog(client, server.redis, ObjectStore(FilesSettings(root=server.root)))
        meta = await catalog.find("default", file_id)
        values = {name: getattr(meta, name) for name in meta.__struct_fields__} | {"expires_ms": 1}
        await catalog.add(FileMeta(**values))
