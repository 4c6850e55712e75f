"""A dispatcher's books: the requests it holds, and which of them wait. Nothing here waits for anybody else."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from penstock.queue.protocol import Bound, Delivery, RequestQueue
from penstock.queue.records import PriorityClass
from penstock.workers.errand import Errand
from penstock.workers.pull import Bounds, Puller
from penstock.workers.routing import Router


class Books:
    """Every errand is either in ``waiting`` or placed (it has a target); only :meth:`place` places.

    ``placeable`` is set when something waits and may find room. :attr:`puller` fills the books.
    """

    def __init__(self, queue: RequestQueue, router: Router) -> None:
        self.errands: dict[str, Errand] = {}
        self.waiting: dict[str, Errand] = {}
        self.placeable = asyncio.Event()
        self.puller = Puller(queue, self._bounds, self.admit)
        self._router = router

    def admit(self, delivery: Delivery) -> None:
        """Take in what the queue gives."""
        known = self.errands.get(delivery.record.id)
        if known is not None:  # delivered again after a rebalance, or published twice: perhaps in a better class
            known.deliveries.append(delivery)
            known.promote(delivery.record.priority_class)
            self.look()
        else:
            errand = self.errands[delivery.record.id] = Errand(delivery)
            self.wait(errand)

    def wait(self, errand: Errand) -> None:
        """Let it wait for a replica, unless it has ended meanwhile."""
        if not errand.ended:
            self._router.give_back(errand)
            self.waiting[errand.id] = errand
            self.placeable.set()

    def place(self) -> Sequence[Errand]:
        """Find replicas for those that wait, the most urgent first; returns those that found one."""
        ready = sorted((errand for errand in self.waiting.values() if errand.ready), key=Errand.urgency)
        placed = [errand for errand in ready if self._router.place(errand)]
        for errand in placed:
            del self.waiting[errand.id]
        return placed

    def forget(self, errand: Errand) -> None:
        """It has ended."""
        errand.ended = True
        self.errands.pop(errand.id, None)
        self.waiting.pop(errand.id, None)
        self._router.give_back(errand)
        copies, errand.deliveries = errand.deliveries[1:], errand.deliveries[:1]
        for delivery in copies:  # perhaps published because this end was taken back: dispatching it will tell
            self.admit(delivery)
        self.look()

    def look(self) -> None:
        """There may be room now."""
        self.puller.look()
        if self.waiting:
            self.placeable.set()

    def _bounds(self) -> Bounds:
        """Room by class. None for a class of which older work still waits for a replica, and for those below it."""
        waiting = [errand.rank for errand in self.waiting.values() if self._wants_room(errand)]
        first = min(waiting, default=len(PriorityClass))
        return tuple(room if rank < first else Bound(0, 0) for rank, room in enumerate(self._router.room()))

    def _wants_room(self, errand: Errand) -> bool:
        return errand.ready and not self._router.isolated(errand)
