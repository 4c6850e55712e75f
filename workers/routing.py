"""Which way a request goes: through the prefill pool, or to one engine that does the whole of it."""

from __future__ import annotations

from collections.abc import Iterable

from penstock.queue.messages import Stage
from penstock.queue.registry import Replica
from penstock.workers.errand import Errand
from penstock.workers.placement import Pool
from penstock.workers.settings import WorkerSettings


class Router:
    """Places errands on the replicas of one pool and keeps their credits."""

    def __init__(self, workers: WorkerSettings) -> None:
        self._workers = workers
        self._shared = workers.dispatchers > 1
        self._prefill = Pool()
        self._decode = Pool()

    def refresh(self, alive: Iterable[Replica]) -> None:
        """Take in the registry's view."""
        replicas = list(alive)
        self._prefill.refresh((r for r in replicas if r.role == "prefill"), shared=self._shared)
        self._decode.refresh((r for r in replicas if r.role != "prefill"), shared=self._shared)

    def room(self) -> tuple[int, int]:
        """Requests and prompt tokens that may be pulled now."""
        requests, tokens = self._decode.room()
        if self._workers.mixed:
            return requests, tokens
        prefill_requests, prefill_tokens = self._prefill.room()
        return min(requests, prefill_requests), min(tokens, prefill_tokens)

    def place(self, errand: Errand) -> bool:
        """Choose replicas and reserve their room. False: there is none, the errand waits."""
        prefix = errand.record.prefix_hashes
        decode = self._decode.choose(errand.kv_tokens, prefix)
        if decode is None:
            return False
        target = decode
        if self._needs_prefill_pool(errand, decode.cached(prefix)):
            prefill = self._prefill.choose(errand.prompt_tokens, prefix)
            if prefill is None:
                return False
            prefill.take(errand.id, errand.prompt_tokens, prefix)
            target = prefill
        decode.take(errand.id, errand.kv_tokens, prefix)
        errand.stage = Stage.WHOLE if target is decode else Stage.PREFILL
        errand.target, errand.decode = target.replica.id, decode.replica.id
        return True

    def _needs_prefill_pool(self, errand: Errand, cached: int) -> bool:
        """Not for what decode computes in the gap between two steps, nor for prompt log probabilities, which must come
        from the engine that generates; nor for a single token, after which nothing would read the cache."""
        if self._workers.mixed or errand.record.sampling.get("prompt_logprobs") is not None:
            return False
        single = errand.record.max_tokens - len(errand.emitted) <= 1
        return not single and errand.prompt_tokens - cached > self._workers.short_prompt_tokens

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
        for replica_id in (errand.target, errand.decode):
            if replica_id and replica_id not in self._prefill.seats and replica_id not in self._decode.seats:
                return replica_id
        return ""

    def give_back(self, errand: Errand) -> None:
        """Free whatever room it holds."""
        for pool, replica_id in ((self._prefill, errand.target), (self._decode, errand.decode)):
            if replica_id in pool.seats:
                pool.seats[replica_id].give_back(errand.id)
        errand.target = errand.decode = ""

    def close(self, replica_id: str) -> None:
        """This replica's lease has run out: place nothing on it until the registry is read again."""
        for pool in (self._prefill, self._decode):
            if replica_id in pool.seats:
                pool.seats[replica_id].closed = True
