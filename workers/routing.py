"""Which way a request goes: through the prefill pool, or to one engine that does the whole of it."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.queue.messages import Stage
from penstock.queue.protocol import Bound
from penstock.queue.records import PriorityClass
from penstock.queue.registry import Replica
from penstock.workers.errand import Errand
from penstock.workers.placement import Pool, Seat
from penstock.workers.settings import WorkerSettings


class Router:
    """Places errands on the replicas of one pool and keeps their credits."""

    def __init__(self, workers: WorkerSettings) -> None:
        self._workers = workers
        self._shared = workers.dispatchers > 1
        self._prefill = Pool()
        self._decode = Pool()

    def refresh(self, alive: Sequence[Replica], *, keep: bool = False) -> None:
        """Take in the registry's view; with ``keep`` those it does not know may be alive as well."""
        self._prefill.refresh((r for r in alive if r.role == "prefill"), shared=self._shared, keep=keep)
        self._decode.refresh((r for r in alive if r.role != "prefill"), shared=self._shared, keep=keep)

    def room(self) -> tuple[Bound, ...]:
        """Requests and prompt tokens that may be pulled now, by class in order of rank."""
        return tuple(self._room(_reserved(rank, self._workers)) for rank in range(len(PriorityClass)))

    def _room(self, reserved: float) -> Bound:
        decode = self._decode.room(reserved)
        if self._workers.mixed:
            return decode
        prefill = self._prefill.room(reserved)
        return Bound(min(decode.requests, prefill.requests), min(decode.tokens, prefill.tokens))

    def place(self, errand: Errand) -> bool:
        """Choose replicas and reserve their room. False: there is none, the errand waits."""
        if self.isolated(errand):
            return self._place_alone(errand)
        prefix, reserved = errand.record.prefix_hashes, _reserved(errand.rank, self._workers)
        decode = self._decode.choose(errand.kv_tokens, prefix, reserved, errand.avoid)
        if decode is None:
            return False
        target = decode
        if self._needs_prefill_pool(errand, decode.cached(prefix)):
            prefill = self._prefill.choose(errand.prompt_tokens, prefix, reserved, errand.avoid)
            if prefill is None:
                return False
            prefill.take(errand.id, errand.prompt_tokens, prefix)
            target = prefill
        self._take(errand, decode, target)
        return True

    def isolated(self, errand: Errand) -> bool:
        """Whether it must run alone: because one more death would end it, so that only its own doing counts against it
        and none that is as near to the end can go down with it; or because it is likelier than others to have killed
        a replica, so that it takes nobody along the next time."""
        return errand.deaths > 0 and (errand.stuck or errand.deaths >= self._workers.max_attempts - 1)

    def _place_alone(self, errand: Errand) -> bool:
        """One engine does the whole of it, so that one at most is lost."""
        seat = self._decode.isolate(errand.id, errand.kv_tokens)
        if seat is None:
            return False
        self._take(errand, seat, seat)
        seat.guest = errand.id
        errand.alone = True
        return True

    def _take(self, errand: Errand, decode: Seat, target: Seat) -> None:
        decode.take(errand.id, errand.kv_tokens, errand.record.prefix_hashes)
        errand.stage = Stage.WHOLE if target is decode else Stage.PREFILL
        errand.target, errand.decode = target.replica.id, decode.replica.id
        errand.alone = False

    def _needs_prefill_pool(self, errand: Errand, cached: int) -> bool:
        """Not for what decode computes in the gap between two steps, nor for prompt log probabilities, which must come
        from the engine that generates; nor for a single token, after which nothing would read the cache."""
        if self._workers.mixed or errand.record.sampling.get("prompt_logprobs") is not None:
            return False
        return errand.left_tokens > 1 and errand.prompt_tokens - cached > self._workers.short_prompt_tokens

    def move(self, errand: Errand, replica_id: str) -> None:
        """This replica runs it now, after the hand-over or because another dispatcher chose it: reserve room there
        and nowhere else."""
        if errand.target == replica_id:
            return
        self.give_back(errand)
        errand.target = errand.decode = replica_id
        for pool in (self._prefill, self._decode):
            if replica_id in pool.seats:
                pool.seats[replica_id].take(errand.id, errand.kv_tokens, errand.record.prefix_hashes)

    def dead(self, errand: Errand) -> str:
        """The replica whose death stopped this errand; empty when all it needs are alive, or it waits."""
        for replica_id in (errand.target, errand.decode, errand.source):
            if replica_id and replica_id not in self._prefill.seats and replica_id not in self._decode.seats:
                return replica_id
        return ""

    def give_back(self, errand: Errand) -> None:
        """Free whatever room it holds."""
        for pool, replica_id in ((self._prefill, errand.target), (self._decode, errand.decode)):
            if replica_id in pool.seats:
                pool.seats[replica_id].give_back(errand.id)
        errand.target = errand.decode = errand.source = ""

    def clear(self, errand: Errand) -> None:
        """It needs no replica for itself any more."""
        self._decode.release(errand.id)

    def close(self, replica_id: str) -> None:
        """This replica's lease has run out: place nothing on it until the registry is read again."""
        for pool in (self._prefill, self._decode):
            if replica_id in pool.seats:
                pool.seats[replica_id].closed = True


def _reserved(rank: int, workers: WorkerSettings) -> float:
    """Share of each replica that this class must leave free: batch work is in no hurry, and others must not wait."""
    return workers.reserved_share if rank == PriorityClass.BATCH.rank else 0.0
