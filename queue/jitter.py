"""Spreads what many processes do at once."""

from __future__ import annotations

import random


def jittered(seconds: float) -> float:
    """Half to one and a half times as long, so that many who wait for the same do not come back at once."""
    return seconds * random.uniform(0.5, 1.5)
