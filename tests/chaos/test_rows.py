"""A short seeded round of every row. Repeat one by ``CHAOS_SEED=... pytest tests/chaos -k NAME``."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator

import pytest

from penstock.queue.local.process import ServerError
from tests.chaos.outcome import Scale
from tests.chaos.row import play
from tests.chaos.rows import ROWS
from tests.chaos.stacks import Stacks

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(900),  # an ingress imports vLLM: minutes, on a machine that is doing other things
]


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stacks]:
    """One deployment at a time, kept while rows want the same."""
    with Stacks(tmp_path_factory.mktemp("chaos")) as running:
        yield running


@pytest.fixture(scope="module")
def seed() -> int:
    """Drawn once a session, and shown when a row fails."""
    return int(os.environ.get("CHAOS_SEED") or random.randrange(2**32))


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str, stacks: Stacks, seed: int) -> None:
    row = ROWS[name]
    try:
        stack = stacks.of(row.shape)
    except ServerError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))
    outcome = asyncio.run(play(row, stack, Scale.TEST, seed, print))
    assert outcome.injected > 0
    assert outcome.requests > 0
    assert not outcome.failed, f"seed {seed}: {outcome}"
