"""How requests end that no engine ends (deadlines, cancellations, too many deaths), and completing any end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import structlog

from penstock.queue.errors import DeadlineExceeded, EngineFailed, PenstockError, TransientError
from penstock.queue.messages import TERMINAL, EventKind, Finish, Frame, StreamError
from penstock.queue.protocol import RequestQueue
from penstock.queue.records import now_ms
from penstock.queue.token_log import RequestLog
from penstock.workers.books import Books
from penstock.workers.errand import Errand

log = structlog.get_logger()


class Endings:
    """Writes the end into the token log first, then completes the request in the queue, or moves it to the dead
    letters: a death in between repeats the second step only, and Redis tells which it is. ``max_attempts``: deaths of
    replicas after which a request is given up."""

    def __init__(self, queue: RequestQueue, log_: RequestLog, books: Books, max_attempts: int) -> None:
        self._queue = queue
        self._log = log_
        self._books = books
        self._max_attempts = max_attempts
        self._verdict = EngineFailed(f"{max_attempts} replicas died while running this request")
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

    async def bury(self, errands: Sequence[Errand]) -> None:
        """Move to the dead letters what was given up in the log."""
        for errand in errands:
            errand.verdict = str(self._verdict)
        await self.complete(errands)

    async def complete(self, errands: Sequence[Errand]) -> None:
        """Finish in the queue what has its end in the log. If the broker is away, by :meth:`complete_late`."""
        if not errands:
            return
        for errand in errands:
            self._books.forget(errand)
        try:
            await self._settle(errands)
            self._uncompleted = [errand for errand in self._uncompleted if errand not in errands]
        except TransientError as error:
            log.warning("completion_delayed", error=str(error), requests=len(errands))
            self._uncompleted += [errand for errand in errands if errand not in self._uncompleted]

    async def complete_late(self) -> None:
        """Try again what the broker was away for."""
        await self.complete(self._uncompleted)

    async def _settle(self, errands: Sequence[Errand]) -> None:
        await self._queue.complete([lent for errand in errands if not errand.verdict for lent in errand.deliveries])
        for errand in errands:
            for lent in errand.deliveries if errand.verdict else ():
                await self._queue.dead_letter(lent, errand.verdict)

    async def _give_up(self, errand: Errand) -> None:
        """Unless Redis knows better: another dispatcher may have had it since, and seen it get on well."""
        end, most = _frame(self._verdict), self._max_attempts
        stands, deaths = await self._log.give_up(errand.id, errand.record.reply_to, end, errand.attempt, most)
        if stands is None:
            log.info("not_given_up", request_id=errand.id, deaths=deaths, deaths_known_here=errand.deaths)
            errand.deaths = deaths
        else:
            await (self.bury if stands is EventKind.GIVEN_UP else self.complete)([errand])

    async def _end(self, errand: Errand, frame: Frame) -> None:
        await self._log.finish([(errand.id, errand.record.reply_to, frame)])
        await self.complete([errand])


def _frame(error: PenstockError) -> Frame:
    wire = StreamError(error.code, str(error), error.status, retryable=isinstance(error, TransientError))
    return Frame(TERMINAL, [], finish=Finish.ERROR, error=wire)
