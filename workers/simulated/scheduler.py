"""Continuous batching after vLLM's v1 scheduler, with its priority policy.

Each step has a token budget. Running requests are served first, in order of admission; then waiting ones
are admitted by class and arrival while sequences, blocks and budget last. A long prompt is computed in
chunks over several steps. When a running request finds no block, the least urgent, latest running one is
preempted and computed anew later. As in vLLM a waiting request never preempts, and the first waiting one
that does not fit stops admission. Simpler than in vLLM, the blocks of the whole input are taken at
admission, not chunk by chunk.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable
from operator import attrgetter

import structlog

from penstock.queue.messages import Usage
from penstock.workers.simulated.kv_cache import KVCache
from penstock.workers.simulated.limits import Limits
from penstock.workers.simulated.request import Handle, SimRequest, State
from penstock.workers.simulated.step_times import StepTimes

log = structlog.get_logger()
_key = attrgetter("key")


class Scheduler:
    """The requests of one engine that wait, load or run.

    ``read`` collects the handles whose KV is needed no more, for the engine to release at its owner.
    """

    def __init__(
        self, limits: Limits, kv: KVCache, times: StepTimes, reachable: Callable[[Handle], bool] = lambda _: True
    ) -> None:
        self._limits = limits
        self._reachable = reachable
        self._loads = 0
        self._kv = kv
        self._times = times
        self._link_free_at = 0.0
        self._plan: dict[SimRequest, int] = {}
        self._budget = 0
        self._preempted = False
        self.waiting: list[SimRequest] = []  # by key
        self.running: list[SimRequest] = []  # by admission
        self.loading: deque[SimRequest] = deque()  # by arrival of their KV: one link, one at a time
        self.read: list[Handle] = []

    def add(self, request: SimRequest) -> None:
        """Queue a request."""
        request.state = State.WAITING
        insort(self.waiting, request, key=_key)

    def end(self, requests: Iterable[SimRequest]) -> None:
        """Forget requests, whatever their state, and free their blocks."""
        for request in requests:
            if request.state is State.WAITING:
                del self.waiting[bisect_left(self.waiting, request.key, key=_key)]
            elif request.state is State.LOADING:
                self.loading.remove(request)
            request.state = State.DONE
            self._free(request)
            self._release_remote(request)
        self.sweep()

    def sweep(self) -> None:
        """Drop from the running list what runs no more; at once, as one by one would be quadratic."""
        self.running = [request for request in self.running if request.state is State.RUNNING]

    def schedule(self, now: float) -> dict[SimRequest, int]:
        """Choose this step's requests and the number of tokens each computes."""
        self._plan, self._budget, self._preempted = {}, self._limits.max_num_batched_tokens, False
        while self.loading and self.loading[0].ready_at <= now:
            self._run(self.loading.popleft())
        self._continue_running()
        if self._preempted:
            self.sweep()
        else:
            self._admit(now)
        return self._plan

    def _continue_running(self) -> None:
        running = State.RUNNING
        for request in self.running:
            if request.state is not running:  # preempted a moment ago
                continue
            if not self._budget:
                break
            if request.computed < request.room or self._grow(request):
                self._compute(request)

    def _admit(self, now: float) -> None:
        free = self._limits.max_num_seqs - len(self.running) - len(self.loading)
        while self.waiting and self._budget and free and self._allocate(self.waiting[0]):
            free -= 1
            request = self.waiting.pop(0)
            self._start_transfer(request, now)
            if request.ready_at > now:
                request.state = State.LOADING
                self.loading.append(request)
            else:
                self._run(request)
                self._compute(request)

    def _compute(self, request: SimRequest) -> None:
        tokens = min(len(request.tokens) - request.computed, self._budget)
        self._plan[request] = tokens
        self._budget -= tokens
        if tokens > 1:
            self._remember(request, request.computed + tokens)

    def _allocate(self, request: SimRequest) -> bool:
        """Take blocks for the whole input, if there are. Its last token is always computed: to sample."""
        size, total = self._limits.block_size, len(request.tokens)
        matched = self._kv.match(request.hashes[: (total - 1) // size])
        blocks = self._kv.take(matched, -(-total // size) - len(matched))
        if blocks is None:
            return False
        request.blocks = blocks
        request.room = len(blocks) * size
        request.computed = len(matched) * size
        request.remembered = len(matched)
        return True

    def _start_transfer(self, request: SimRequest, now: float) -> None:
        """Load what the prefill engine still holds. Once its lease has run out, or it is gone, or the load fails, the
        input is computed here."""
        cached, loadable = request.computed, 0
        if request.remote is not None and self._loads_from(request.remote, now):
            loadable = min(request.remote.tokens, len(request.tokens) - 1)
        transferred = max(0, loadable - cached)
        if transferred:
            self._link_free_at = max(now, self._link_free_at) + self._times.transfer_s(transferred)
            request.ready_at = self._link_free_at
            request.computed = loadable
        if not request.admitted:
            request.admitted = True
            request.usage = Usage(request.prompt_tokens, min(cached, request.prompt_tokens), transferred)

    def _loads_from(self, handle: Handle, now: float) -> bool:
        if now >= handle.expires or not self._reachable(handle):
            return False
        self._loads += 1
        every = self._limits.kv_load_fails_every
        failed = every > 0 and self._loads % every == 0
        if failed:
            log.warning("kv_load_failed")
        return not failed

    def _run(self, request: SimRequest) -> None:
        request.state = State.RUNNING
        self.running.append(request)
        self._release_remote(request)
        self._remember(request, request.computed)

    def _release_remote(self, request: SimRequest) -> None:
        if request.remote is not None:
            self.read.append(request.remote)
            request.remote = None

    def _grow(self, request: SimRequest) -> bool:
        """One more block, if need be from the least urgent running request; False if that is this one."""
        self._remember(request, request.computed)
        while (block := self._kv.take((), 1)) is None:
            victim = max((other for other in self.running if other.state is State.RUNNING), key=_key)
            self._preempt(victim)
            if victim is request:
                return False
        request.blocks += block
        request.room += self._limits.block_size
        return True

    def _preempt(self, request: SimRequest) -> None:
        self._preempted = True
        self._budget += self._plan.pop(request, 0)
        self._free(request)
        self.add(request)

    def _remember(self, request: SimRequest, computed: int) -> None:
        """Enter whole blocks of computed tokens into the prefix cache."""
        size = self._limits.block_size
        whole = computed // size
        request.extend_hashes(whole, size)
        for index in range(request.remembered, whole):
            self._kv.remember(request.blocks[index], request.hashes[index])
        request.remembered = max(whole, request.remembered)

    def _free(self, request: SimRequest) -> None:
        self._kv.release(request.blocks)
        request.blocks = []
        request.room = request.computed = request.remembered = 0
