"""How requests end that no engine ends (deadlines, cancellations, too many deaths), and completing any end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import structlog

from penstock.queue.errors import DeadlineExceeded, EngineFailed, PenstockError, TransientError
from penstock.queue.messages import TERMINAL, Finish, Frame, StreamError
from penstock.queue.protocol import RequestQueue
from penstock.queue.records import now_ms
from penstock.queue.token_log import RequestLog
from penstock.workers.books import Books
from penstock.workers.errand import Errand

log = structlog.get_logger()


class Endings:
    """Writes the end into the token log first, then completes the request in the queue: a death in between repeats
    the second step only. ``max_attempts``: deaths of replicas after which a request is given up."""

    def __init__(self, queue: RequestQueue, log_: RequestLog, books: Books, max_attempts: int) -> None:
        self._queue = queue
        self._log = log_
        self._books = books
        self._max_attempts = max_attempts
        self._uncompleted: list[Errand] = []

    async def expire(self, errands: Iterable[Errand]) -> None:
        """Fail those whose deadline has passed."""
        now = now_ms()
        for errand in errands:
            if errand.record.expired(now) and not errand.ended:
                await self.fail(errand, DeadlineExceeded("the request's deadline passed before it finished"))

    async def condemn(self, errands: Iterable[Errand]) -> None:
        """Give up on what too many replicas died or failed with."""
        for errand in errands:
            if errand.deaths >= self._max_attempts:
                await self._give_up(errand)

    async def fail(self, errand: Errand, error: PenstockError) -> None:
        """End it with an error on its stream."""
        log.warning("request_failed", request_id=errand.id, code=error.code, error=str(error))
        await self._end(errand, _frame(error))

    async def abort(self, errand: Errand) -> None:
        """End one that was cancelled."""
        await self._end(errand, Frame(TERMINAL, [], finish=Finish.ABORT))

    async def complete(self, errands: Sequence[Errand]) -> None:
        """Finish in the queue what has its end in the log. If the broker is away, by :meth:`complete_late`."""
        if not errands:
            return
        for errand in errands:
            self._books.forget(errand)
        try:
            await self._queue.complete([delivery for errand in errands for delivery in errand.deliveries])
            self._uncompleted = [errand for errand in self._uncompleted if errand not in errands]
        except TransientError as error:
            log.warning("completion_delayed", error=str(error), requests=len(errands))
            self._uncompleted += [errand for errand in errands if errand not in self._uncompleted]

    async def complete_late(self) -> None:
        """Try again what the broker was away for."""
        await self.complete(self._uncompleted)

    async def _give_up(self, errand: Errand) -> None:
        error = EngineFailed(f"{errand.deaths} replicas died while running this request")
        for delivery in errand.deliveries:
            await self._queue.dead_letter(delivery, str(error))
        await self._log.finish([(errand.id, errand.record.reply_to, _frame(error))])
        self._books.forget(errand)

    async def _end(self, errand: Errand, frame: Frame) -> None:
        await self._log.finish([(errand.id, errand.record.reply_to, frame)])
        await self.complete([errand])


def _frame(error: PenstockError) -> Frame:
    wire = StreamError(error.code, str(error), error.status, retryable=isinstance(error, TransientError))
    return Frame(TERMINAL, [], finish=Finish.ERROR, error=wire)
