"""Engines in virtual time, for every test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from penstock.workers.simulated.engine import SimulatedEngine
from tests.unit.workers.simulated_engines import (
    Clock,
    MakeEngine,
    make_engine,
)


@pytest.fixture
def clock() -> Clock:
    """Virtual time."""
    return Clock()


@pytest.fixture
def engines(clock: Clock) -> Iterator[MakeEngine]:
    made: list[SimulatedEngine] = []

    def make(*args: Any, **kwargs: Any) -> SimulatedEngine:
        made.append(make_engine(clock, *args, **kwargs))
        return made[-1]

    yield make
    for engine in made:
        engine.shutdown()
        assert engine.used_blocks == 0
