"""What one consumer holds: entries it read from the broker and has not handed out, and those on loan.

Both backends read entries in bulk and hand them out by budget and class; the surplus waits here in order.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple

from penstock.queue.errors import InvalidRecord
from penstock.queue.payloads import RecordCodec
from penstock.queue.protocol import Budget, Delivery
from penstock.queue.records import PriorityClass
from penstock.queue.unreadable import Unreadable

Position = tuple[str, int, str]


class Entry(NamedTuple):
    """A record as read from the broker. ``order`` starts with the class rank, then tells older from newer."""

    order: tuple[int, ...]
    tokens: int
    data: bytes
    position: Position
    deliveries: int = 1


class Held(NamedTuple):
    """How much of one class waits here."""

    requests: int
    tokens: int


Bury = Callable[[Entry, str], Awaitable[None]]
"""Moves an entry to the dead letters with the reason."""


class Intake:
    """Entries waiting here, in order, and entries on loan, by position."""

    def __init__(self, codec: RecordCodec, unreadable: Unreadable) -> None:
        self._codec = codec
        self._unreadable = unreadable
        self._waiting: list[Entry] = []
        self._loaned: dict[Position, Entry] = {}
        self._known: dict[Position, bytes] = {}
        self._changed = asyncio.Event()

    def put(self, entries: Iterable[Entry]) -> None:
        """Add entries read from the broker and wake whoever waits.

        One that is here already is not added twice; another one in its place, in a log that was cut back, is.
        """
        for entry in entries:
            if self._known.get(entry.position) != entry.data:
                self._known[entry.position] = entry.data
                heapq.heappush(self._waiting, entry)
                self._changed.set()

    def knows(self, position: Position) -> bool:
        """Whether this entry waits here or is on loan."""
        return position in self._known

    def counts(self) -> list[int]:
        """Entries waiting here or on loan, by class."""
        counts = [0 for _ in PriorityClass]
        for entry in (*self._waiting, *self._loaned.values()):
            counts[entry.order[0]] += 1
        return counts

    def wake(self) -> None:
        """Let :meth:`changed` return: something went wrong or came to an end."""
        self._changed.set()

    async def changed(self) -> None:
        """Wait for a :meth:`put` or :meth:`wake` since the last :meth:`take`."""
        await self._changed.wait()

    def held(self) -> list[Held]:
        """What waits here, by class."""
        classes: list[list[int]] = [[] for _ in PriorityClass]
        for entry in self._waiting:
            classes[entry.order[0]].append(entry.tokens)
        return [Held(len(tokens), sum(tokens)) for tokens in classes]

    async def take(self, budget: Budget, bury: Bury) -> list[Delivery]:
        """Lend what fits the budget. A request whose entry cannot be read is ended instead, and the entry then given to
        ``bury`` with the reason.

        Raises:
            QueueUnavailable: a payload stored beside could not be asked for, or an entry not ended or buried. Whatever
                was not buried waits here again.
        """
        entries = self._pop(budget)
        buried: set[Position] = set()
        deliveries = []
        try:
            for entry in entries:
                try:
                    deliveries.append(await self._open(entry))
                except InvalidRecord as error:
                    await self._unreadable.end(entry.data, error)
                    await bury(entry, f"{error.code}: {error}")
                    buried.add(entry.position)
        except BaseException:
            self._unlearn(entries)
            self.put(entry for entry in entries if entry.position not in buried)
            raise
        self._unlearn(entry for entry in entries if entry.position in buried)
        self._loaned.update((entry.position, entry) for entry in entries if entry.position not in buried)
        return deliveries

    def on_loan(self, deliveries: Iterable[Delivery]) -> list[Delivery]:
        """Those that are still ours to finish."""
        return [delivery for delivery in deliveries if delivery.position in self._loaned]

    def entries(self, deliveries: Iterable[Delivery]) -> list[Entry]:
        """The entries behind deliveries on loan."""
        return [self._loaned[delivery.position] for delivery in deliveries]

    def forget(self, entries: Iterable[Entry]) -> None:
        """These are finished."""
        for entry in entries:
            self._loaned.pop(entry.position, None)
            self._known.pop(entry.position, None)

    def give_back(self, deliveries: Sequence[Delivery]) -> None:
        """End these loans: their entries wait here again, ahead of later ones."""
        entries = self.entries(self.on_loan(deliveries))
        self.forget(entries)
        self.put(entry._replace(deliveries=entry.deliveries + 1) for entry in entries)

    def drop(self, ours: Callable[[Position], bool]) -> None:
        """Forget every entry for which ``ours`` is false: another consumer has it now."""
        self._waiting = [entry for entry in self._waiting if ours(entry.position)]
        heapq.heapify(self._waiting)
        self._loaned = {position: entry for position, entry in self._loaned.items() if ours(position)}
        self._known = {entry.position: entry.data for entry in (*self._waiting, *self._loaned.values())}

    def offers(self, budget: Budget, requests: int = 0, tokens: int = 0) -> bool:
        """Whether the first entry here fits the budget beside so many requests and tokens that were taken of it."""
        if not self._waiting:
            return False
        first = self._waiting[0]
        bound = budget.bound(first.order[0])
        return requests < bound.requests and (not requests or tokens + first.tokens <= bound.tokens)

    def _pop(self, budget: Budget) -> list[Entry]:
        self._changed.clear()
        taken: list[Entry] = []
        tokens = 0
        while self.offers(budget, len(taken), tokens):
            taken.append(heapq.heappop(self._waiting))
            tokens += taken[-1].tokens
        return taken

    def _unlearn(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._known.pop(entry.position, None)

    async def _open(self, entry: Entry) -> Delivery:
        return Delivery(await self._codec.decode(entry.data), entry.position, entry.deliveries)
