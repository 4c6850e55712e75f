"""Random ids of one exchange that come out the same each time its answer is rendered."""

from __future__ import annotations

import hashlib
import uuid
from collections import Counter


class Draws:
    """A reproducible source of UUIDs, with a sequence for each choice of the answer.

    ``track`` is the choice whose tokens are being rendered: several choices may interleave differently the next time,
    and their tool calls must keep their ids all the same.
    """

    __slots__ = ("_drawn", "_engine_requests", "_seed", "seconds", "track")

    def __init__(self, seed: str, seconds: float) -> None:
        self._seed = seed
        self._drawn: Counter[int] = Counter()
        self._engine_requests: Counter[int] = Counter()
        self.track = 0
        self.seconds = seconds
        """What the clock shows to whoever stamps the answer: the time of acceptance."""

    def uuid4(self) -> uuid.UUID:
        """The next id of the present track."""
        number = self._drawn[self.track]
        self._drawn[self.track] += 1
        seed = f"{self._seed}:{self.track}:{number}".encode()
        return uuid.UUID(bytes=hashlib.blake2b(seed, digest_size=16).digest(), version=4)

    def occurrence(self, part: int) -> int:
        """How often this part of the exchange was asked of the engine before: 0, 1, ..."""
        self._engine_requests[part] += 1
        return self._engine_requests[part] - 1
