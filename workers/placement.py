"""Which replica gets a request: credits, prefix affinity, and the better of two.

A replica is only given what it has room for (sequences and KV cache tokens); everything else waits in the queue, where
it can still be ordered, counted and cancelled.
"""

from __future__ import annotations

import math
import random
import time
from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence

from penstock.queue.protocol import Bound
from penstock.queue.records import PREFIX_BLOCK_TOKENS
from penstock.queue.registry import Replica

ANSWER_RESERVE_TOKENS = 256
"""KV cache reserved for an answer at most. Most answers are far shorter than ``max_tokens``; an engine that does run
out preempts by itself, so reserving the worst case would only leave its cache empty."""
PREFILL_AHEAD_TOKENS = 16_384
"""Prompt tokens given to one prefill replica ahead: two steps' worth, so that it never waits and a more urgent prompt
is never far behind."""
REMEMBERED_BLOCKS = 65_536
"""Prefix hashes remembered per replica: four million tokens, more than a KV cache holds."""
OVERLOADED = 0.9
"""Share of a replica's room above which a longer cached prefix no longer attracts requests."""
SETTLED_S = 2.0
"""A replica that was given nothing for this long shows no more surprises: what kills an engine does so at its first
steps."""


class Seat:
    """One replica as a dispatcher sees it: what it gave it and has not had back.

    ``guest`` is a request that has killed replicas, or ran beside one that did: it has the replica for itself, but for
    what was there before.
    """

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.foreign = 0
        self.closed = replica.draining
        self.guest = ""
        self._taken_at = 0.0
        self._held: dict[str, int] = {}
        self._tokens = 0
        self._prefixes: OrderedDict[bytes, None] = OrderedDict()
        prefill = replica.role == "prefill"
        self._token_limit = min(replica.kv_tokens, PREFILL_AHEAD_TOKENS) if prefill else replica.kv_tokens

    @property
    def requests(self) -> int:
        """Requests it may still be given."""
        return self.replica.max_seqs - len(self._held) - self.foreign

    @property
    def tokens(self) -> int:
        """Tokens it may still be given."""
        return self._token_limit - self._tokens

    @property
    def use(self) -> float:
        """Share of its room in use, by whichever of requests and tokens is scarcer."""
        requests = 1 - self.requests / self.replica.max_seqs
        return max(requests, self._tokens / max(1, self._token_limit))

    @property
    def open(self) -> bool:
        """Whether anything may be placed here now."""
        return not self.closed and not self.guest and self.requests > 0

    @property
    def empty(self) -> bool:
        """Whether nobody is here."""
        return not self._held and not self.foreign

    @property
    def settled(self) -> bool:
        """Whether what is here has been here for a while."""
        return not self._held or time.monotonic() - self._taken_at > SETTLED_S

    def room(self, reserved: float = 0.0) -> Bound:
        """What may still be given to a class that must leave the share ``reserved`` of each replica free."""
        requests = self.requests - math.floor(reserved * self.replica.max_seqs)
        return Bound(max(0, requests), max(0, self.tokens - math.floor(reserved * self._token_limit)))

    def fits(self, tokens: int, reserved: float = 0.0) -> bool:
        """Whether there is room. An empty replica takes any size, so that a long prompt cannot wait for ever."""
        room = self.room(reserved)
        return self.open and room.requests > 0 and (tokens <= room.tokens or not self._held)

    def take(self, request_id: str, tokens: int, prefix: Iterable[bytes]) -> None:
        """Reserve room, once a request, and remember that the replica will have this prefix cached."""
        self.give_back(request_id)
        self._taken_at = time.monotonic()
        self._held[request_id] = tokens
        self._tokens += tokens
        for digest in prefix:
            self._prefixes[digest] = None
            self._prefixes.move_to_end(digest)
        while len(self._prefixes) > REMEMBERED_BLOCKS:
            self._prefixes.popitem(last=False)

    def give_back(self, request_id: str) -> None:
        """Free the room of one request; unknown ids are ignored."""
        self._tokens -= self._held.pop(request_id, 0)
        if self.guest == request_id:
            self.guest = ""

    def cached(self, prefix: Sequence[bytes]) -> int:
        """Tokens of this prefix the replica is likely to have cached."""
        matched = 0
        for digest in prefix:
            if digest not in self._prefixes:
                break
            matched += 1
        return matched * PREFIX_BLOCK_TOKENS

    def refresh(self, replica: Replica, *, shared: bool) -> None:
        """Take in a heartbeat. With other dispatchers about, what they gave it counts too."""
        self.replica = replica
        self.closed = replica.draining
        self.foreign = max(0, replica.running + replica.waiting - len(self._held)) if shared else 0


class Pool:
    """The live replicas of one role."""

    def __init__(self) -> None:
        self.seats: dict[str, Seat] = {}

    def refresh(self, alive: Iterable[Replica], *, shared: bool, keep: bool) -> None:
        """Take in the registry: new replicas, heartbeats, and the gone unless they are kept."""
        seen = {replica.id: replica for replica in alive}
        self.seats = {id_: seat for id_, seat in self.seats.items() if keep or id_ in seen}
        for id_, replica in seen.items():
            self.seats.setdefault(id_, Seat(replica)).refresh(replica, shared=shared)

    def room(self, reserved: float) -> Bound:
        """Requests and tokens the whole pool may still be given; none of what is reserved on each replica."""
        rooms = [room for seat in self.seats.values() if seat.open and (room := seat.room(reserved)).requests]
        return Bound(sum(room.requests for room in rooms), sum(room.tokens for room in rooms))

    def choose(
        self, tokens: int, prefix: Sequence[bytes], reserved: float = 0.0, avoid: Container[str] = ()
    ) -> Seat | None:
        """The replica with the longest cached prefix unless it is overloaded, else the less loaded of two at random;
        one to ``avoid`` only where there is no other.

        Power of two choices: Mitzenmacher, 2001. Affinity with an overload guard: SGLang's cache-aware router.
        """
        fitting = [seat for seat in self.seats.values() if seat.fits(tokens, reserved)]
        fitting = [seat for seat in fitting if seat.replica.id not in avoid] or fitting
        if not fitting:
            return None
        best = max(fitting, key=lambda seat: seat.cached(prefix))
        if best.cached(prefix) and best.use < OVERLOADED:
            return best
        return min(random.sample(fitting, min(2, len(fitting))), key=lambda seat: seat.use)

    def isolate(self, request_id: str, tokens: int) -> Seat | None:
        """The replica that this request has for itself, once what is there already has settled.

        Until then it is kept free of new work. No more than half of the replicas are lent in this way.
        """
        mine = self._lent_to(request_id)
        if mine is None:
            return None
        mine.guest = request_id
        fits = mine.requests > 0 and not mine.closed and (tokens <= mine.tokens or not mine.use)
        return mine if fits and mine.settled else None

    def _lent_to(self, request_id: str) -> Seat | None:
        """An empty replica if there is one, such as the successor of the one that died: nobody goes down with it."""
        mine = next((seat for seat in self.seats.values() if seat.guest == request_id), None)
        empty = next((seat for seat in self.seats.values() if seat.open and seat.empty), None)
        if mine is not None and (mine.empty or empty is None):
            return mine
        if mine is not None:
            mine.guest = ""
        elif sum(bool(seat.guest) for seat in self.seats.values()) >= max(1, len(self.seats) // 2):
            return None
        return empty or min(
            (seat for seat in self.seats.values() if seat.open), key=lambda seat: seat.use, default=None
        )

    def release(self, request_id: str) -> None:
        """Whatever this request had for itself is for all again."""
        for seat in self.seats.values():
            if seat.guest == request_id:
                seat.guest = ""
