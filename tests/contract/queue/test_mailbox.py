"""The token reader: each frame once and in order, whatever the connection does."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from penstock.queue import mailbox as mailbox_module
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.mailbox import Mailbox
from penstock.queue.messages import (
    TERMINAL,
    Delivered,
    Finish,
    Frame,
    StreamError,
    encode,
    lua_string,
)
from penstock.queue.redis_client import connect_async
from penstock.queue.settings import RedisSettings
from penstock.queue.token_log import Append, TokenWriter
from tests.contract.queue.ingresses import CHANNEL, PATIENCE_S, Ingress, opened_stream
from tests.contract.servers import start
from tests.support.waiting import eventually_async

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]

ERROR = Frame(TERMINAL, [], finish=Finish.ERROR, error=StreamError("failed", "no luck", 500))


@pytest_asyncio.fixture
async def ingress(redis_server: RedisServer) -> AsyncIterator[Ingress]:
    opened = Ingress(RedisSettings(url=redis_server.url, namespace=f"mb{uuid.uuid4().hex[:8]}:"))
    await opened.start()
    yield opened
    await opened.close()


async def test_frames_arrive_in_order(ingress: Ingress) -> None:
    await opened_stream(ingress)
    for index in range(5):
        ingress.emit("r", index)
    ingress.emit("r", 5, Finish.STOP)
    assert len(await ingress.until("r", 6, ended=True)) == 6


async def test_lost_message_is_read_from_the_log(ingress: Ingress) -> None:
    await opened_stream(ingress)
    ingress.emit("r", 0)
    ingress.emit_unheard("r", 1)
    ingress.emit_unheard("r", 2)
    ingress.emit("r", 3, Finish.STOP)
    assert len(await ingress.until("r", 4, ended=True)) == 4


async def test_tokens_lost_before_an_error_are_delivered_first(ingress: Ingress) -> None:
    """An error has no position, so that nothing in it shows what was missed."""
    await opened_stream(ingress)
    ingress.emit_unheard("r", 0)
    await ingress.log.finish([("r", CHANNEL, ERROR)])
    assert await ingress.until("r", 1, ended=True) == [Frame(0, [0]), ERROR]


async def test_duplicates_are_dropped(ingress: Ingress) -> None:
    """Also an end that carries no tokens, which a position alone would not tell from the next frame."""
    await opened_stream(ingress)
    ingress.emit("r", 0)
    ingress.publish(Delivered("r", Frame(0, [0])))
    ingress.emit("r", 1, Finish.ABORT, count=0)
    again = Delivered("r", Frame(1, [], finish=Finish.ABORT))
    ingress.publish(again, again)
    await ingress.settled()
    assert ingress.seen["r"] == [Frame(0, [0]), Frame(1, [], finish=Finish.ABORT)]


async def test_repeated_error_is_delivered_once(ingress: Ingress) -> None:
    await opened_stream(ingress)
    await ingress.log.finish([("r", CHANNEL, ERROR)])
    ingress.publish(Delivered("r", ERROR), Delivered("r", ERROR))
    await ingress.settled()
    assert ingress.seen["r"] == [ERROR]


async def test_gap_and_end_in_one_message(ingress: Ingress) -> None:
    """The log read for the gap already holds the end that the same message brings."""
    await opened_stream(ingress)
    ingress.emit_unheard("r", 0)
    ingress.emit_unheard("r", 1)
    frame, end = Frame(1, [1]), Frame(2, [], finish=Finish.ABORT)
    step = Append("r", 1, 2, 0, lua_string(encode(end)), True)
    other = TokenWriter(ingress.blocking, ingress.settings)
    assert other.append([step]) == ["ok"]
    other.close()
    ingress.publish(Delivered("r", frame), Delivered("r", end))
    await ingress.settled()
    assert ingress.seen["r"] == [Frame(0, [0]), frame, end]


async def test_frames_of_unknown_streams_are_ignored(ingress: Ingress) -> None:
    await opened_stream(ingress)
    await ingress.dispatch("other")
    ingress.emit("other", 0)
    ingress.emit("r", 0)
    ingress.reader.close("never opened")
    await ingress.until("r", 1)
    ingress.reader.close("r")
    ingress.emit("r", 1)
    await ingress.settled()
    assert len(ingress.seen["r"]) == 1
    assert "other" not in ingress.seen


async def test_reader_opened_late_gets_what_it_missed(ingress: Ingress) -> None:
    await ingress.dispatch("r")
    for index in range(3):
        ingress.emit("r", index)
    await ingress.settled()
    ingress.reader.open("r")
    ingress.emit("r", 3)
    assert len(await ingress.until("r", 4)) == 4


async def test_reconnection_catches_up(ingress: Ingress) -> None:
    """The message was published to a connection that is dead, and nothing follows it."""
    await opened_stream(ingress, "r")
    await opened_stream(ingress, "idle")
    ingress.emit("r", 0)
    await ingress.until("r", 1)
    ingress.kill_connection()
    ingress.emit_unheard("r", 1, Finish.STOP)
    await ingress.until("r", 2, ended=True)
    await ingress.subscribed()
    ingress.emit("idle", 0)
    await ingress.until("idle", 1)


async def test_many_reconnections_while_streaming(ingress: Ingress) -> None:
    """Every fifth frame the line is cut; nothing is lost or repeated."""
    await opened_stream(ingress)
    for index in range(60):
        if index % 5 == 0 and await ingress.subscribers():
            ingress.kill_connection()
        await asyncio.to_thread(ingress.emit, "r", index)
    ingress.emit("r", 60, Finish.STOP)
    assert len(await ingress.until("r", 61, ended=True)) == 61


async def test_what_is_published_before_the_subscription_is_read(redis_server: RedisServer) -> None:
    ingress = Ingress(RedisSettings(url=redis_server.url, namespace=f"mb{uuid.uuid4().hex[:8]}:"))
    await opened_stream(ingress)
    ingress.emit("r", 0, Finish.STOP)
    await ingress.start()
    await ingress.until("r", 1, ended=True)
    await ingress.close()


async def test_redis_restarts(tmp_path: Path) -> None:
    """Killed and started again: subscription and log come back, and the reader survives a log it could not read."""
    server = RedisServer(tmp_path)
    start(server)
    ingress = Ingress(RedisSettings(url=server.url))
    await ingress.start()
    await opened_stream(ingress)
    ingress.emit("r", 0)
    await ingress.until("r", 1)
    server.stop()
    start(server)
    await ingress.subscribed()
    ingress.emit("r", 1, Finish.STOP)
    await ingress.until("r", 2, ended=True)
    await ingress.close()
    server.stop()


class SilentLine:
    """A line to Redis that can stop passing bytes without closing, as a dead switch does."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open = asyncio.Event()
        self._open.set()
        self._pumps: set[asyncio.Task[None]] = set()
        self.connections = 0

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            self._pumps.add(asyncio.create_task(self._pump(source, sink)))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                await self._open.wait()
                sink.write(data)
        except ConnectionError:
            return
        finally:
            sink.close()

    def silence(self) -> None:
        """Pass nothing more on connections there are; new ones wait as well."""
        self._open.clear()

    def restore(self) -> None:
        self._open.set()

    async def close(self) -> None:
        self._server.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)


async def test_half_open_connection_is_noticed(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing arrives and nothing is refused: unanswered pings give the connection up."""
    monkeypatch.setattr(mailbox_module, "PING_INTERVAL_S", 0.1)
    line = SilentLine(redis_server.port)
    port = await line.start()
    settings = RedisSettings(url=f"redis://127.0.0.1:{port}/0", namespace=f"mb{uuid.uuid4().hex[:8]}:")
    client = connect_async(settings)
    messages = Mailbox(client, settings, CHANNEL).messages()
    assert await anext(messages) is None
    waiting = asyncio.ensure_future(anext(messages))
    line.silence()
    before = line.connections

    async def reconnects() -> bool:
        return line.connections > before

    await eventually_async(reconnects, PATIENCE_S, "it connects anew")
    line.restore()
    async with asyncio.timeout(PATIENCE_S):
        assert await waiting is None
    await messages.aclose()
    await client.aclose()
    await line.close()


async def test_two_readers_of_one_request_each_see_all_of_it(ingress: Ingress) -> None:
    ingress.reader.open("r", "one")
    await ingress.dispatch("r")
    ingress.emit("r", 0)
    await ingress.until("one", 1)
    ingress.reader.open("r", "two", live=False)
    ingress.reader.catch_up("two")
    ingress.emit("r", 1)
    ingress.emit("r", 2, Finish.LENGTH)
    assert await ingress.until("one", 3, ended=True) == await ingress.until("two", 3, ended=True)


async def test_one_reader_leaves_and_the_other_reads_on(ingress: Ingress) -> None:
    for reader in ("one", "two"):
        ingress.reader.open("r", reader)
    await ingress.dispatch("r")
    ingress.reader.close("one")
    assert ingress.reader.reads("r")
    ingress.emit("r", 0, Finish.LENGTH)
    await ingress.until("two", 1, ended=True)
    assert "one" not in ingress.seen
    ingress.reader.close("two")
    assert not ingress.reader.reads("r")


async def test_a_paused_reader_holds_nothing_and_loses_nothing(ingress: Ingress) -> None:
    await opened_stream(ingress)
    ingress.emit("r", 0)
    await ingress.until("r", 1)
    ingress.reader.pause("r")
    for index in range(1, 40):
        ingress.emit("r", index)
    await ingress.settled()
    assert len(ingress.seen["r"]) == 1
    ingress.reader.resume("r")
    await ingress.until("r", 40)
    ingress.emit("r", 40, Finish.LENGTH)
    await ingress.until("r", 41, ended=True)


async def test_a_log_longer_than_a_chunk_is_read_whole(ingress: Ingress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox_module, "CHUNK", 7)
    await ingress.dispatch("r")
    for index in range(50):
        ingress.emit("r", index, Finish.LENGTH if index == 49 else None)
    ingress.reader.open("r", live=False)
    ingress.reader.catch_up("r")
    await ingress.until("r", 50, ended=True)


def lose(ingress: Ingress, request: str, kept: int) -> None:
    """What a restart that lost the last second does to a log of one-token frames."""
    namespace = ingress.settings.namespace
    ingress.blocking.ltrim(f"{namespace}tok:{request}", 0, kept - 1)
    ingress.blocking.hset(f"{namespace}req:{request}", "next", kept)
    ingress.blocking.hdel(f"{namespace}req:{request}", "done")


async def test_equal_tokens_that_come_again_are_passed_over(ingress: Ingress) -> None:
    await opened_stream(ingress)
    for index in range(6):
        ingress.emit("r", index)
    await ingress.until("r", 6)
    lose(ingress, "r", 3)
    ingress.kill_connection()
    await ingress.subscribed()
    ingress.emit("r", 3, count=2)
    ingress.emit("r", 5, count=3)
    ingress.emit("r", 8, Finish.LENGTH)
    await ingress.until("r", 9, ended=True)


async def test_other_tokens_than_were_delivered_end_the_stream(ingress: Ingress) -> None:
    await opened_stream(ingress)
    for index in range(6):
        ingress.emit("r", index)
    await ingress.until("r", 6)
    lose(ingress, "r", 3)
    ingress.publish(Delivered("r", Frame(3, [3, 99])))
    await ingress.settled()
    *delivered, last = ingress.seen["r"]
    assert [token for frame in delivered for token in frame.tokens] == list(range(6))
    assert last.error is not None
    assert (last.finish, last.error.code) == (Finish.ERROR, "stream_interrupted")


@pytest.mark.parametrize("paused", [True, False])
async def test_a_log_that_grew_anew_beyond_the_reader_is_compared(ingress: Ingress, paused: bool) -> None:
    """[I4] Its last entry is where it was, and looks the same."""
    await opened_stream(ingress)
    await opened_stream(ingress, "idle")
    for index in range(6):
        ingress.emit("r", index)
    await ingress.until("r", 6)
    if paused:
        ingress.reader.pause("r")
    lose(ingress, "r", 3)
    again = [Frame(3, [93]), Frame(4, [94]), Frame(5, [5]), Frame(6, [6])]
    ingress.blocking.rpush(f"{ingress.settings.namespace}tok:r", *map(encode, again))
    ingress.kill_connection()
    await ingress.subscribed()
    ingress.emit("idle", 0)
    await ingress.until("idle", 1)
    ingress.reader.resume("r")

    async def more_seen() -> bool:
        return len(ingress.seen["r"]) > 6

    await eventually_async(more_seen, PATIENCE_S, "what came of the longer log")
    last = ingress.seen["r"][-1]
    assert last.error is not None
    assert last.error.code == "stream_interrupted"


async def test_an_end_that_was_taken_back_is_read_over(ingress: Ingress) -> None:
    await opened_stream(ingress)
    for index in range(3):
        ingress.emit("r", index)
    await ingress.log.finish([("r", CHANNEL, Frame(TERMINAL, [], finish=Finish.ABORT))])
    await ingress.until("r", 3, ended=True)
    assert ingress.reader.frames("r") == 4
    key = f"{ingress.settings.namespace}tok:r"
    ingress.blocking.rpop(key)
    ingress.blocking.hdel(f"{ingress.settings.namespace}req:r", "done")
    ingress.reader.rewind("r")
    ingress.emit("r", 3, Finish.LENGTH)
    frames = await ingress.until("r", 4, ended=True)
    assert [frame.finish for frame in frames] == [None, None, None, Finish.ABORT, Finish.LENGTH]
