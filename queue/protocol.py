"""What a durable request queue does, whichever broker carries it.

Two backends implement it under one contract suite: :mod:`penstock.queue.kafka` and :mod:`penstock.queue.redis_streams`.
Delivery is at least once; each delivery is finished by itself, in any order.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import msgspec

from penstock.queue.dead_letters import DeadLetter
from penstock.queue.records import PriorityClass, Record


class Bound(NamedTuple):
    """So many requests and prompt tokens."""

    requests: int
    tokens: int


class Budget(NamedTuple):
    """What one pull may bring: at most ``requests`` records and ``tokens`` prompt tokens in all.

    A record longer than ``tokens`` is still delivered when it would be the only one, so that it cannot starve.

    ``bounds`` are tighter limits, one a class in order of rank, never rising: a record of that class is taken only
    while everything taken so far, of any class, is within them. So the less urgent cannot fill what is kept for the
    more urgent, and a class with a bound of no requests is not taken at all. Classes that are not named have the whole.
    """

    requests: int
    tokens: int
    bounds: tuple[Bound, ...] = ()

    def bound(self, rank: int) -> Bound:
        """The limits for the class of this rank."""
        if rank >= len(self.bounds):
            return Bound(self.requests, self.tokens)
        requests, tokens = self.bounds[rank]
        return Bound(min(requests, self.requests), min(tokens, self.tokens))


class Delivery(msgspec.Struct, frozen=True):
    """A record on loan to one consumer until it is completed, released or dead-lettered.

    ``position`` is the backend's own handle (partition and offset, or stream and entry id); ``deliveries`` counts
    how often the queue handed it out, from 1, as far as the backend knows.
    """

    record: Record
    position: tuple[str, int, str]
    deliveries: int = 1


class Depth(NamedTuple):
    """Accepted and unfinished work of one class, on loan or not. ``oldest_age_s`` is 0 when there is none."""

    requests: int
    tokens: int
    oldest_age_s: float


class RequestQueue(Protocol):
    """The durable queue of one pool of engines.

    One object may publish, consume or both; connections open on first use. All methods are coroutines of one event
    loop. Every method raises :class:`~penstock.queue.errors.QueueUnavailable` when the broker does not answer.
    """

    async def publish(self, record: Record) -> None:
        """Store the record durably. Returns only when the broker acknowledged it (all in-sync replicas).

        Raises:
            QueueUnavailable: not acknowledged. The caller must treat the request as not accepted and cancel it by
                id, since the broker may still have stored it.
        """

    async def pull(self, budget: Budget) -> list[Delivery]:
        """Wait until work is there, then take what fits the budget, strictly by class, oldest first in a class.

        Records that cannot be read are dead-lettered by the queue itself and never returned; their requests are ended
        in the token log, as far as the records tell which these are.
        """

    async def complete(self, deliveries: Sequence[Delivery]) -> None:
        """These are finished; never deliver them again."""

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        """Give these back: they are delivered again, ahead of later arrivals of their class."""

    async def dead_letter(self, delivery: Delivery, reason: str) -> None:
        """Move this one to the dead letters with its reason; it is finished as far as the queue is concerned."""

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """The oldest ``limit`` dead letters."""

    async def drop_dead_letters(self, ids: Collection[str]) -> int:
        """Forget these dead letters; returns how many there were."""

    async def depth(self) -> dict[PriorityClass, Depth]:
        """Backlog by class, of the whole queue and not just this consumer."""

    async def ping(self) -> None:
        """Return when the broker answers, raise :class:`QueueUnavailable` when it does not."""

    @property
    def healthy(self) -> bool:
        """False when this object hangs and only a new process can go on; not while the broker is merely away."""

    async def close(self) -> None:
        """Stop pulling and hand unfinished deliveries back to other consumers. Idempotent."""
