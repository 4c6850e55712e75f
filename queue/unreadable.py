"""Ends requests whose records cannot be read: their clients wait, and nothing but the queue ever sees these records."""

from __future__ import annotations

import msgspec
import redis.asyncio
import structlog

from penstock.queue.errors import InvalidRecord, QueueUnavailable, StoreUnavailable
from penstock.queue.messages import TERMINAL, Finish, Frame, StreamError
from penstock.queue.payloads import answering
from penstock.queue.settings import RedisSettings
from penstock.queue.token_log import RequestLog

log = structlog.get_logger()


class _Address(msgspec.Struct):
    """What every version of a record is expected to name."""

    id: str
    reply_to: str = ""


_address = msgspec.msgpack.Decoder(_Address)


class Unreadable:
    """Writes their ends into the token log. The seam between queue and token log: whoever holds a queue gets records
    that can be read only, so that the queue itself has to say what became of the others."""

    def __init__(self, client: redis.asyncio.Redis, settings: RedisSettings) -> None:
        self._log = RequestLog(client, settings)

    async def end(self, data: bytes, error: InvalidRecord) -> None:
        """End the request, if the record tells which one it is. It was accepted and has not run: sending it again is
        fine.

        Raises:
            QueueUnavailable: Redis did not answer.
        """
        try:
            address = _address.decode(data)
        except msgspec.MsgspecError:
            log.error("record_unreadable", code=error.code, error=str(error))
            return
        log.error("record_unreadable", request_id=address.id, code=error.code, error=str(error))
        wire = StreamError(error.code, "the request was lost in the queue; send it again", 500, retryable=True)
        frame = Frame(TERMINAL, [], finish=Finish.ERROR, error=wire)
        try:
            async with answering():
                await self._log.finish([(address.id, address.reply_to, frame)])
        except StoreUnavailable as unavailable:
            raise QueueUnavailable(str(unavailable)) from unavailable
