"""How many lines one ingress has under way, shared fairly among tenants (:mod:`penstock.serving.batches.shares`)."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Mapping


class FairSlots:
    """A semaphore that gives a free slot to the waiting tenant that has the fewest; of equals, to who waited longest.

    Batches of one tenant take turns, as each waits for one slot at a time. What a tenant has ``elsewhere`` counts, too.
    """

    def __init__(self, slots: int) -> None:
        self.elsewhere: Mapping[str, int] = {}
        self._free = slots
        self._taken: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @property
    def taken(self) -> Mapping[str, int]:
        """Slots by tenant."""
        return self._taken

    async def acquire(self, tenant: str) -> None:
        """Wait for a slot."""
        if self._free:
            self._take(tenant)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self.release(tenant)  # it had just been given
            raise

    def release(self, tenant: str) -> None:
        """Give a slot back."""
        self._free += 1
        self._taken[tenant] -= 1
        if self._taken[tenant] <= 0:
            del self._taken[tenant]
        while self._free and self._waiting:
            self._give(min(self._waiting, key=lambda name: self._taken[name] + self.elsewhere.get(name, 0)))

    def _give(self, tenant: str) -> None:
        turns = self._waiting.pop(tenant)
        turn = turns.popleft()
        if turns:
            self._waiting[tenant] = turns  # behind the others that have as few
        if not turn.cancelled():
            self._take(tenant)
            turn.set_result(None)

    def _take(self, tenant: str) -> None:
        self._free -= 1
        self._taken[tenant] += 1
