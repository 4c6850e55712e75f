"""``penstock batch`` against a real server, each command a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pytest

from penstock.queue.local.redis_server import RedisServer
from penstock.serving.batches.answers import Reply
from penstock.serving.batches.runner import LineRequest
from tests.support.batch_server import BatchServer, chat_reply, jsonl, line, new_server
from tests.support.waiting import eventually_async

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def server(redis_server: RedisServer, tmp_path: Path) -> BatchServer:
    return new_server(redis_server, tmp_path)


async def start(server: BatchServer, *words: str | Path) -> asyncio.subprocess.Process:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PENSTOCK_", "OPENAI_"))}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "penstock.serving.cli", "batch", *map(str, words)),
        env=inherited | {"PENSTOCK_BASE_URL": server.url},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def penstock(server: BatchServer, *words: str | Path) -> Done:
    process = await start(server, *words)
    out, err = await process.communicate()
    return Done(process.returncode or 0, out.decode(), err.decode())


async def test_a_job_from_submit_to_results(server: BatchServer, tmp_path: Path) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(jsonl([line(f"c{i}") for i in range(50)]))
    async with server.serving():
        submitted = await penstock(server, "submit", file, "--metadata", "job=night", "--ordered", "--window", "2h")
        batch_id = submitted.out.strip()
        watched = await penstock(server, "watch", batch_id, "--input-price", "2", "--output-price", "10")
        assert (watched.code, watched.out) == (0, "completed\n"), watched
        assert "500 tokens" in watched.err
        assert "cost 0.0022" in watched.err
        status = json.loads((await penstock(server, "status", batch_id)).out)
        assert (status["status"], status["metadata"]) == ("completed", {"job": "night", "ordered": "true"})
        listed = await penstock(server, "list")
        assert listed.out == f"{batch_id}\tcompleted\t50\t0\t50\n"
        saved = await penstock(server, "results", batch_id, "-o", out)
        assert (saved.code, saved.err.strip()) == (0, f"50 lines in {out}")
    rows = [json.loads(row) for row in out.read_bytes().splitlines()]
    assert [row["custom_id"] for row in rows] == [f"c{i}" for i in range(50)]


async def test_a_table_in_and_out(server: BatchServer, tmp_path: Path) -> None:
    async def answer(request: LineRequest) -> Reply:
        return chat_reply(json.loads(request.body)["messages"][-1]["content"].upper())

    server.fleet.answer = answer
    file, out = tmp_path / "in.csv", tmp_path / "out.parquet"
    pl.DataFrame({"key": ["x", "y"], "word": ["one", "two"]}).write_csv(file)
    async with server.serving():
        how = ["--template", "say {word}", "--model", "m", "--id-column", "key"]
        batch_id = (await penstock(server, "submit", file, *how)).out.strip()
        assert (await penstock(server, "watch", batch_id)).code == 0
        saved = await penstock(server, "results", batch_id, "-o", out, "--join", file, "--id-column", "key")
        assert saved.code == 0, saved
    table = pl.read_parquet(out)
    assert table.select("key", "word", "answer").rows() == [("x", "one", "SAY ONE"), ("y", "two", "SAY TWO")]


async def test_ctrl_c_leaves_the_job_running(server: BatchServer, tmp_path: Path) -> None:
    gate = asyncio.Event()

    async def answer(request: LineRequest) -> Reply:
        await gate.wait()
        return chat_reply()

    server.fleet.answer = answer
    file = tmp_path / "in.jsonl"
    file.write_bytes(jsonl([line("a")]))
    async with server.serving():
        batch_id = (await penstock(server, "submit", file)).out.strip()
        watching = await start(server, "watch", batch_id)

        async def asked_for() -> bool:
            return bool(server.fleet.asked) and watching.returncode is None

        await eventually_async(asked_for, 20, "the line is under way")
        early = await penstock(server, "results", batch_id, "-o", tmp_path / "o")
        assert early.code == 1
        assert "there are no results yet" in early.err
        watching.send_signal(signal.SIGINT)
        _, err = await watching.communicate()
        assert watching.returncode == 130
        assert f"{batch_id} goes on" in err.decode()
        gate.set()
        assert (await penstock(server, "watch", batch_id)).out == "completed\n"


async def test_cancel(server: BatchServer, tmp_path: Path) -> None:
    async def answer(request: LineRequest) -> Reply:
        await asyncio.Event().wait()
        return chat_reply()

    server.fleet.answer = answer
    file = tmp_path / "in.jsonl"
    file.write_bytes(jsonl([line("a")]))
    async with server.serving():
        batch_id = (await penstock(server, "submit", file)).out.strip()
        assert (await penstock(server, "cancel", batch_id)).out == "cancelling\n"
        watched = await penstock(server, "watch", batch_id)
    assert (watched.code, watched.out) == (1, "cancelled\n")


async def test_a_failed_job_says_why(server: BatchServer, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(jsonl([line("a"), line("a")]))
    async with server.serving():
        batch_id = (await penstock(server, "submit", file)).out.strip()
        watched = await penstock(server, "watch", batch_id)
        missing = await penstock(server, "status", "batch_nobody")
    assert (watched.code, watched.out) == (1, "failed\n")
    assert "line 2: duplicate_custom_id: The custom_id of line 1 is used again." in watched.err
    assert (missing.code, missing.err) == (2, "penstock: 404: No batch found with id 'batch_nobody'.\n")


async def test_validate_needs_no_server(server: BatchServer, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(jsonl([line("a")] * 30) + b"\n")
    wrong = await penstock(server, "validate", file)
    shown = wrong.out.splitlines()
    assert (wrong.code, len(shown), shown[-1]) == (1, 21, "... and 10 more")
    assert shown[0].startswith("line 2: duplicate_custom_id")
    file.write_bytes(jsonl([line("a"), line("b")]))
    assert (await penstock(server, "validate", file)).out == "2 requests to /v1/chat/completions: fine\n"
    other = await penstock(server, "validate", file, "--model", "other")
    assert "line 1: model_not_found" in other.out


async def test_validate_a_table(server: BatchServer, tmp_path: Path) -> None:
    file = tmp_path / "in.csv"
    pl.DataFrame({"key": ["x", "y", "x"], "word": ["one", "two", "three"]}).write_csv(file)
    how = ["--template", "say {word}", "--model", "m", "--endpoint", "/v1/completions"]
    assert (await penstock(server, "validate", file, *how)).out == "3 requests to /v1/completions: fine\n"
    twice = await penstock(server, "validate", file, *how, "--id-column", "key")
    assert (twice.code, twice.out) == (1, "line 3: duplicate_custom_id: The custom_id of line 1 is used again.\n")
    missing = await penstock(server, "validate", file, "--template", "{answer}", "--model", "m")
    assert (missing.code, "no column answer; there are key, word" in missing.err) == (2, True)
    assert (await penstock(server, "validate", file)).code == 2


async def test_no_server(server: BatchServer) -> None:
    server.url = "http://127.0.0.1:9"
    done = await penstock(server, "status", "batch_x")
    assert (done.code, "Connection refused" in done.err) == (1, True)
