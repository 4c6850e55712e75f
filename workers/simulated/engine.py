"""The simulated engine behind the :class:`~penstock.workers.engine.Engine` interface.

Prefill and decode engines may live in different processes or hosts. No KV exists, so the transfer is virtual:
the decode engine waits as long as it would take, then has the prefill engine free its blocks by a datagram.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from penstock.queue.messages import Finish, Stage
from penstock.queue.settings import ModelSettings
from penstock.workers.engine import EngineInfo, Job, Load, Output
from penstock.workers.settings import WorkerSettings
from penstock.workers.simulated.kv_cache import KVCache
from penstock.workers.simulated.limits import limits_of
from penstock.workers.simulated.releases import KV_LEASE_S, ReleaseSocket
from penstock.workers.simulated.request import Handle, SimRequest, State, handle_of, prepare_request
from penstock.workers.simulated.scheduler import Scheduler
from penstock.workers.simulated.step_times import step_times
from penstock.workers.simulated.tokens import token_at

Prepared = SimRequest | Handle | None
"""A request; or of a RELEASE what is to be released, if anything."""


class SimulatedEngine:
    """Schedules like vLLM, counts KV blocks, takes the time of its step profile and draws tokens by hash.

    Args:
        model: its engine arguments set the limits, see :mod:`penstock.workers.simulated.limits`.
        workers: names the step profile.
        role: part of the engine's id, to tell engines apart; any engine can prefill, decode and do both.
        host: the address at which other engines reach this one to release KV.
        clock: seconds since the epoch, as leases cross hosts; replaced, with ``sleep``, for virtual time.
        sleep: waits until a step is over.
    """

    def __init__(
        self,
        model: ModelSettings,
        workers: WorkerSettings,
        role: str,
        *,
        host: str = "127.0.0.1",
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        limits = limits_of(model)
        self.info: EngineInfo = limits.info
        self._clock = clock
        self._sleep = sleep
        self._id = f"{role}-{uuid.uuid4().hex[:12]}"
        self._times = step_times(workers.step_profile)
        self._poison = limits.poison_token
        self._kv = KVCache(limits.num_gpu_blocks_override)
        self._releases = ReleaseSocket(host, self._id)
        self._scheduler = Scheduler(limits, self._kv, self._times, self._releases.reaches)
        self._requests: dict[str, SimRequest] = {}
        self._held: dict[int, tuple[SimRequest, float]] = {}  # by lease, with its expiry, in order of that
        self._arrivals = 0

    @property
    def used_blocks(self) -> int:
        """KV blocks requests refer to, held ones included; 0 when nothing runs and nothing is held."""
        return self._kv.used_blocks

    def prepare(self, job: Job) -> Prepared:
        """Check and convert a job; on any thread.

        Raises:
            InvalidRecord: it is empty, finished or too long.
        """
        return handle_of(job) if job.stage is Stage.RELEASE else prepare_request(job, self.info)

    def add(self, prepared: Prepared) -> None:
        """Queue a request (an unfinished one of the same id ends), or release another engine's KV."""
        if isinstance(prepared, Handle):
            self._releases.send(prepared)
        elif prepared is not None:
            self.abort([prepared.id])
            self._arrivals += 1
            prepared.key = (prepared.rank, self._arrivals)
            self._requests[prepared.id] = prepared
            self._scheduler.add(prepared)

    def abort(self, ids: Sequence[str]) -> None:
        """Drop requests, wherever they are; free their blocks here and at their prefill engines."""
        if known := [self._requests[id_] for id_ in dict.fromkeys(ids) if id_ in self._requests]:
            self._end(known)

    def has_work(self) -> bool:
        """Whether anything runs, waits, loads or is held for another engine."""
        return bool(self._requests)

    def step(self) -> tuple[list[Output], bool]:
        """Run one step, in the time the profile says. ``(.., False)``: only transfers are under way."""
        start = self._clock()
        self._free_held(start)
        plan = self._scheduler.schedule(start)
        self._send_releases()
        if not plan:
            return [], False
        self._take_time(plan, start)
        if self._poison >= 0 and any(self._poison in request.tokens for request in plan):
            os.kill(os.getpid(), signal.SIGKILL)  # as a fault in a kernel would
        return self._sample(plan), True

    def load(self) -> Load:
        """Present load, on any thread; requests whose KV is being loaded count as running."""
        scheduler = self._scheduler
        running = len(scheduler.running) + len(scheduler.loading)
        return Load(running, len(scheduler.waiting), self.used_blocks * self.info.block_size)

    def shutdown(self) -> None:
        """Drop everything and close the socket."""
        self.abort(list(self._requests))
        self._releases.close()

    def _take_time(self, plan: dict[SimRequest, int], start: float) -> None:
        prefill = pairs = context = sequences = 0
        for request, tokens in plan.items():
            if tokens == 1:
                sequences += 1
                context += request.computed
            else:
                prefill += tokens
                pairs += tokens * (2 * request.computed + tokens)  # end^2 - start^2
        duration = self._times.step_s(prefill, pairs, sequences, context)
        remaining = duration - (self._clock() - start)
        if remaining > 0:
            self._sleep(remaining)

    def _sample(self, plan: dict[SimRequest, int]) -> list[Output]:
        outputs = []
        finished = []
        for request, tokens in plan.items():
            request.computed += tokens
            if request.computed == len(request.tokens):
                output = self._next_token(request)
                outputs.append(output)
                if output.finish is not None:
                    finished.append(request)
        if finished:
            self._end([request for request in finished if request.state is not State.HELD])
        return outputs

    def _next_token(self, request: SimRequest) -> Output:
        tokens = request.tokens
        token = token_at(request.seed, len(tokens) - request.prompt_tokens)
        tokens.append(token)
        finish = request.finish()
        usage, request.usage = request.usage, None
        if finish is None:
            return Output(request.id, [token], None, None, usage)
        if finish is Finish.STOP:
            return Output(request.id, [token], finish, token, usage)
        kv = self._hold(request) if request.stage is Stage.PREFILL else None
        return Output(request.id, [token], finish, usage=usage, kv=kv)

    def _hold(self, request: SimRequest) -> dict[str, Any]:
        """Keep the blocks of a finished prefill until they are read; returns the transfer parameters."""
        expires = self._clock() + KV_LEASE_S
        request.state = State.HELD
        self._held[request.lease] = request, expires
        handle = Handle(
            engine=self._id,
            request=request.id,
            lease=request.lease,
            blocks=len(request.blocks),
            tokens=request.computed,
            address=self._releases.address,
            expires=expires,
        )
        return msgspec.structs.asdict(handle)

    def _free_held(self, now: float) -> None:
        if not self._held:
            return
        done = {lease for lease in self._releases.received() if lease in self._held}
        for lease, (_, expires) in self._held.items():
            if expires > now:
                break
            done.add(lease)
        if done:
            self._end([self._held[lease][0] for lease in done])

    def _end(self, requests: list[SimRequest]) -> None:
        for request in requests:
            del self._requests[request.id]
            self._held.pop(request.lease, None)
        self._scheduler.end(requests)
        self._send_releases()

    def _send_releases(self) -> None:
        read = self._scheduler.read
        while read:
            self._releases.send(read.pop())
