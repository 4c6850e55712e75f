"""Pauses before something is tried again."""

from __future__ import annotations

import random


def jittered(seconds: float) -> float:
    """Between half and one and a half of it: processes that met the same outage do not come back all at once."""
    return seconds * random.uniform(0.5, 1.5)
