"""Deadlines of what waits where nobody looks.

A dispatcher ends what it has pulled. What it has no room for stays in the broker, and with no dispatcher alive
everything does: there the ingress that published it is the one who knows.
"""

from __future__ import annotations

import asyncio

import structlog

from penstock.queue.errors import DeadlineExceeded, StoreUnavailable
from penstock.queue.mailbox import TokenReader
from penstock.queue.messages import TERMINAL, Finish, Frame
from penstock.queue.records import Record, now_ms
from penstock.serving.errors import stream_error

SLACK_S = 2.0
"""So long after its deadline a request is ended from here. A dispatcher looks four times a second, so that what it has
is ended by it first, also when the clocks of two hosts differ a little."""
LOOK_S = 0.5
"""How often; a look at a thousand streams takes a tenth of a millisecond."""
LATE = Frame(
    TERMINAL,
    [],
    finish=Finish.ERROR,
    error=stream_error(DeadlineExceeded("the request's deadline passed before it finished")),
)

log = structlog.get_logger()


class Deadlines:
    """Ends requests in the token log a little after their deadline. What has ended by then stays as it is."""

    def __init__(self, reader: TokenReader) -> None:
        self._reader = reader
        self._watched: dict[str, Record] = {}
        self._watching: asyncio.Task[None] | None = None

    def watch(self, local: str, record: Record) -> None:
        """Hold the record, which the reader ``local`` follows, to its deadline."""
        self._watched[local] = record
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())

    def forget(self, local: str) -> None:
        """It ended, or its reader went away; unknown ones are ignored."""
        self._watched.pop(local, None)

    async def _watch(self) -> None:
        while self._watched:
            await asyncio.sleep(LOOK_S)
            latest = now_ms() - int(SLACK_S * 1000)
            late = {local: record for local, record in self._watched.items() if record.expired(latest)}
            if late:
                await self._end(late)

    async def _end(self, late: dict[str, Record]) -> None:
        try:
            await self._reader.log.finish([(record.id, record.reply_to, LATE) for record in late.values()])
        except StoreUnavailable as error:  # the next look tries again
            log.warning("deadlines_not_enforced", requests=len(late), error=str(error))
            return
        log.warning("deadlines_enforced", requests=len(late))
        for local in late:
            self.forget(local)
            self._reader.catch_up(local)  # where it had ended before, we have missed it
