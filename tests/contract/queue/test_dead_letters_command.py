"""``penstock dead-letters`` against a real queue."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import pytest

from penstock.queue.protocol import Budget
from tests.contract.queue.harness import Harness

PLENTY = Budget(requests=100, tokens=10_000)
pytestmark = [pytest.mark.contract, pytest.mark.asyncio]


class Penstock:
    """Runs the command with the settings of a harness."""

    def __init__(self, harness: Harness) -> None:
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")} | {
            "PENSTOCK_QUEUE_BACKEND": harness.settings.backend,
            "PENSTOCK_QUEUE_BOOTSTRAP": harness.settings.bootstrap,
            "PENSTOCK_REDIS_URL": harness.redis_settings.url,
            "PENSTOCK_REDIS_NAMESPACE": harness.redis_settings.namespace,
            "PENSTOCK_MODEL_PATH": "org/model",
            "PENSTOCK_MODEL_POOL": harness.pool,
        }

    async def __call__(self, *words: str, fails: bool = False) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "penstock.serving.cli", "dead-letters", *words,
            env=self._environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        assert (process.returncode != 0) == fails, err.decode()
        return (err if fails else out).decode()


async def test_list_show_retry_drop(harness: Harness) -> None:
    queue, penstock = harness.open(), Penstock(harness)
    assert "no dead letters" in await penstock("list")
    records = [harness.record(body=b"{}", deadline_ms=1) for _ in range(2)]
    for record in records:
        await queue.publish(record)
    left = 2
    while left:
        for delivery in await queue.pull(PLENTY):
            await queue.dead_letter(delivery, "it kills")
            left -= 1
    rows = [json.loads(line) for line in (await penstock("list", "--json")).splitlines()]
    by_request = {row["request"]: row for row in rows}
    assert by_request.keys() == {record.id for record in records}
    assert {(row["reason"], row["tenant"], row["tokens"]) for row in rows} == {("it kills", "acme", 10)}
    first, second = (by_request[record.id]["id"] for record in records)
    assert "it kills" in await penstock("list")
    assert records[0].id in await penstock("show", first)
    assert json.loads(await penstock("show", first, "--json"))["sampling"] == records[0].sampling
    assert "no dead letter 77-1" in await penstock("drop", "77-1", fails=True)
    assert "--all" in await penstock("drop", fails=True)
    assert await penstock("retry", first) == "1 published again\n"
    (again,) = await queue.pull(PLENTY)
    assert (again.record.id, again.record.deadline_ms) == (records[0].id, None)
    assert await penstock("drop", second) == "1 dropped\n"
    assert "no dead letters" in await penstock("list")
