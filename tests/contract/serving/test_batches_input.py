"""What a batch may be made of, and what is told of everything else."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import pytest

from penstock.queue.local.redis_server import RedisServer
from penstock.queue.redis_client import connect_async
from penstock.serving.files.catalog import new_file_id
from penstock.serving.tenants import KeyStore
from tests.support.batch_server import (
    CHAT,
    BatchServer,
    jsonl,
    line,
    new_server,
    submit,
    until,
)

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]


BAD = [
    (b"", "empty_file", None),
    (b"\n", "invalid_json_line", 1),
    (b"junk", "invalid_json_line", 1),
    (bytes(range(256)) * 5, "invalid_json_line", 1),
    (jsonl([line("a")]) + b"\n" + jsonl([line("b")]), "invalid_json_line", 2),
    (jsonl([line("a")]).decode().encode("utf-16"), "invalid_json_line", 1),
    (jsonl([line("a"), line("b"), line("a")]), "duplicate_custom_id", 3),
    (jsonl([line("a"), line("b", body={"model": "other", "messages": []})]), "model_mismatch", 2),
    (jsonl([line("a", body={"model": "other", "messages": []})]), "model_not_found", 1),
    (jsonl([line("a"), line("b", url="/v1/completions")]), "url_mismatch", 2),
    (jsonl([line("a", url="/v1/completions")]), "url_mismatch", 1),
    (jsonl([line("a", method="GET")]), "invalid_method", 1),
    (jsonl([line("a"), {"custom_id": "b", "method": "POST", "url": CHAT}]), "missing_required_parameter", 2),
    (jsonl([line("a", body={"messages": []})]), "missing_required_parameter", 1),
    (jsonl([line("")]), "missing_required_parameter", 1),
    (jsonl([line("a") | {"custom_id": 7}]), "invalid_type", 1),
    (jsonl([line("a", body={"model": "m", "stream": True})]), "invalid_request", 1),
    (jsonl([line("a"), line("b", body={"model": "m", "temperature": float("nan")})]), "invalid_json_line", 2),
    (jsonl([line("a")]) + b"[" * 100_000 + b"]" * 100_000 + b"\n", "invalid_json_line", 2),
    (
        jsonl([line("a", body={"model": "m", "x": 1})]).replace(b"1", b"[" * 100_000 + b"]" * 100_000),
        "invalid_json_line",
        1,
    ),
    (jsonl([line("a"), line("b", "x" * 20_000_000)]), "line_too_long", 2),
    (b"[1, 2]\n", "invalid_json_line", 1),
    (jsonl([line(f"c{i}") for i in range(31)]), "too_many_tasks", None),
]


@pytest.mark.parametrize(("content", "code", "number"), BAD, ids=[f"{code}-{i}" for i, (_, code, _) in enumerate(BAD)])
async def test_bad_input(
    redis_server: RedisServer, tmp_path: Path, content: bytes, code: str, number: int | None
) -> None:
    server = new_server(redis_server, tmp_path, batches={"max_lines": 30})
    async with server.serving() as api:
        batch = await submit(api, content)
        batch = await until(api, batch.id, "failed")
        good = await submit(
            api, jsonl([line("fine")]).replace(b"\n", b"\r\n")
        )  # also: nobody is down, and CRLF is fine
        await until(api, good.id, "completed")
    assert batch.errors is not None
    assert batch.errors.data is not None
    first = batch.errors.data[0]
    assert (first.code, first.line) == (code, number)
    assert first.message
    assert batch.failed_at is not None
    assert (batch.output_file_id, batch.error_file_id, batch.in_progress_at) == (None, None, None)


async def test_every_problem_has_its_line(server: BatchServer) -> None:
    lines = [line(f"c{i}") for i in range(500)]
    for i in range(0, 500, 7):
        lines[i] = line("same")
    content = jsonl(lines).replace(b'"c1"', b"oops")
    async with server.serving() as api:
        batch = await until(api, (await submit(api, content)).id, "failed")
    assert batch.errors is not None
    assert [(each.code, each.line) for each in batch.errors.data or []] == [
        ("invalid_json_line", 2),
        *(("duplicate_custom_id", i + 1) for i in range(7, 500, 7)),
    ]


async def test_a_file_of_nothing_but_errors_is_given_up_early(server: BatchServer) -> None:
    async with server.serving() as api:
        batch = await until(api, (await submit(api, b"\n" * 50_000_000)).id, "failed")
    assert batch.errors is not None
    codes = Counter(each.code for each in batch.errors.data or [])
    assert codes == {"too_many_tasks": 1, "invalid_json_line": 100}


CREATE = {"endpoint": CHAT, "completion_window": "24h"}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "59m"}, "completion_window"),
        ({"completion_window": "8d"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"metadata": {f"k{i}": "v" for i in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata[...]"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, "output_expires_after.seconds"),
        ({"output_expires_after": {"anchor": "ended_at", "seconds": 3600}}, "output_expires_after.anchor"),
        ({"input_file_id": 7}, "input_file_id"),
    ],
)
async def test_what_is_asked_wrongly(server: BatchServer, changes: dict[str, Any], param: str) -> None:
    async with server.serving() as api:
        uploaded = await api.files.create(file=("a", jsonl([line("a")])), purpose="batch")
        asked: dict[str, Any] = {"input_file_id": uploaded.id} | CREATE | changes
        with pytest.raises(openai.BadRequestError) as refused:
            await api.batches.create(**asked)
        assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")
        assert [batch.id async for batch in await api.batches.list()] == []


async def test_an_input_that_is_none(server: BatchServer) -> None:
    async with server.serving() as api:
        asked: dict[str, Any] = dict(CREATE)
        with pytest.raises(openai.NotFoundError, match="No such File object"):
            await api.batches.create(input_file_id="file-nobody", **asked)
        batch = await until(api, (await submit(api, jsonl([line("a")]))).id, "completed")
        with pytest.raises(openai.BadRequestError, match="purpose must be 'batch'"):
            await api.batches.create(input_file_id=batch.output_file_id or "", **asked)
        with pytest.raises(openai.NotFoundError, match="No batch found"):
            await api.batches.retrieve("batch_nobody")
        with pytest.raises(openai.NotFoundError, match="No batch found"):
            await api.batches.cancel("batch_nobody")


async def test_an_input_file_id_leads_to_nothing_else(server: BatchServer, tmp_path: Path) -> None:
    server.batches = {"coordinate": False}
    kept = [tmp_path / "outside", Path(server.root, "segments", "b", "1")]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    async with server.serving() as api, connect_async(server.redis) as client:
        batch = await submit(api, jsonl([line("a")]))
        kept.append(Path(server.root, batch.input_file_id))
        short, long = batch.input_file_id[:-1], f"{batch.input_file_id}\n"
        elsewhere = ("", ".", "..", "/", "../outside", str(kept[0]), "segments", "segments/b/1", "*", "file-*")
        for name in (*elsewhere, short, long):
            with pytest.raises(openai.NotFoundError, match="No such File object"):
                await api.batches.create(input_file_id=name, endpoint=CHAT, completion_window="24h")
        pins = await client.keys(f"{server.redis.namespace}file-pins:*")
    assert [path for path in kept if not path.exists()] == []
    assert pins == [f"{server.redis.namespace}file-pins:{batch.input_file_id}".encode()]


async def test_what_others_have_stored_is_not_removed(server: BatchServer) -> None:
    """Also between the moment an object is there and the one in which its description is."""
    server.batches = {"coordinate": False}
    async with connect_async(server.redis) as client:
        keys = [(await KeyStore(client, server.redis).create(tenant))[0] for tenant in ("one", "two")]
    async with server.serving() as api:
        one, two = (api.with_options(api_key=key) for key in keys)
        known = (await one.files.create(file=("a", jsonl([line("a")])), purpose="batch")).id
        arriving = new_file_id()
        await asyncio.to_thread(Path(server.root, arriving).write_bytes, b"x")
        for name in (known, arriving):
            with pytest.raises(openai.NotFoundError, match="No such File object"):
                await two.batches.create(input_file_id=name, endpoint=CHAT, completion_window="24h")
        assert set(await asyncio.to_thread(os.listdir, server.root)) >= {known, arriving}


async def test_a_batch_id_leads_to_no_other_key(server: BatchServer) -> None:
    server.batches = {"coordinate": False}
    async with server.serving() as api, connect_async(server.redis) as client:
        batch = await submit(api, jsonl([line("a")]))
        await client.set(f"{server.redis.namespace}batch:{batch.id}:lease", "somebody")
        for call in (api.batches.retrieve, api.batches.cancel):
            with pytest.raises(openai.NotFoundError, match="No batch found"):
                await call(f"{batch.id}:lease")
