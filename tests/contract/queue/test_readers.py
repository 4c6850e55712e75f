"""Who reads a request, and what becomes of one that nobody reads."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from penstock.queue.local.redis_server import RedisServer
from penstock.queue.mailbox import Mailbox
from penstock.queue.messages import TERMINAL, Finish, Frame, Logprobs, decode_delivered, encode, lua_string
from penstock.queue.readers import Progress, Readers, Revival, Standing
from penstock.queue.redis_client import connect, connect_async
from penstock.queue.settings import RedisSettings
from penstock.queue.token_log import Append, AppendStatus, Dispatch, DispatchStatus, RequestLog, TokenWriter
from tests.support.waiting import eventually_async

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]

PATIENCE_S = 20
ABORT = Frame(TERMINAL, [], finish=Finish.ABORT)


class Scene:
    """Two ingresses that listen, and an engine."""

    def __init__(self, settings: RedisSettings) -> None:
        self.settings = settings
        self.blocking = connect(settings)
        self.client = connect_async(settings)
        self.log = RequestLog(self.client, settings)
        self.a = Readers(self.client, settings, "ingress:a")
        self.b = Readers(self.client, settings, "ingress:b")
        self.heard: dict[str, list[Frame]] = {"a": [], "b": []}
        self._writer = TokenWriter(self.blocking, settings)
        self._listening = [asyncio.create_task(self._listen(name)) for name in self.heard]

    async def _listen(self, name: str) -> None:
        async for payload in Mailbox(self.client, self.settings, f"ingress:{name}").messages():
            if payload is not None:
                self.heard[name] += [item.frame for item in decode_delivered(payload)]

    async def listening(self) -> None:
        async def both() -> bool:
            names = [f"{self.settings.namespace}ingress:{name}" for name in self.heard]
            return all(count for _, count in await self.client.pubsub_numsub(*names))

        await eventually_async(both, PATIENCE_S, "both ingresses listen")

    async def dispatch(
        self, request: str, *, expected: int = 0, force: bool = False, reply_to: str = "ingress:a"
    ) -> tuple[DispatchStatus, int]:
        self.blocking.set(f"{self.settings.namespace}replica:e", b"1")
        work = Dispatch(request, expected, reply_to, "e", lua_string(encode({})), "t", force)
        (answer,) = await self.log.dispatch("d", [work])
        return answer.status, answer.attempt

    def emit(self, request: str, attempt: int, frame: Frame) -> AppendStatus:
        final = frame.finish is not None
        entry = Append(request, attempt, frame.index, len(frame.tokens), lua_string(encode(frame)), final)
        (status,) = self._writer.append([entry])
        return status

    async def hears(self, name: str, count: int) -> None:
        async def heard() -> bool:
            return len(self.heard[name]) >= count

        await eventually_async(heard, PATIENCE_S, f"{count} frames at {name}")

    def field(self, request: str, name: str) -> bytes | None:
        return self.blocking.hget(f"{self.settings.namespace}req:{request}", name)  # type: ignore[return-value]

    async def close(self) -> None:
        for task in self._listening:
            task.cancel()
        await asyncio.gather(*self._listening, return_exceptions=True)
        self._writer.close()
        self.blocking.close()
        await self.client.aclose()


@pytest_asyncio.fixture
async def scene(redis_server: RedisServer) -> AsyncIterator[Scene]:
    opened = Scene(RedisSettings(url=redis_server.url, namespace=f"rd{uuid.uuid4().hex[:8]}:"))
    await opened.listening()
    yield opened
    await opened.close()


async def test_standing_tells_whether_to_publish(scene: Scene) -> None:
    assert await scene.b.attach(["r"]) == [Standing.UNKNOWN]
    await scene.b.note_published(["r"])
    assert await scene.b.attach(["r"]) == [Standing.QUEUED]
    await scene.dispatch("r")
    assert await scene.b.attach(["r"]) == [Standing.RUNNING]
    scene.emit("r", 1, Frame(0, [1], finish=Finish.LENGTH))
    assert await scene.b.attach(["r"]) == [Standing.DONE]


@pytest.mark.parametrize("early", [True, False])
async def test_all_readers_hear_every_frame(scene: Scene, early: bool) -> None:
    if early:
        await scene.b.attach(["r"])
    await scene.dispatch("r")
    if not early:
        await scene.b.attach(["r"])
    frames = [Frame(0, [1]), Frame(1, [2, 3], finish=Finish.LENGTH)]
    for frame in frames:
        assert scene.emit("r", 1, frame) is AppendStatus.OK
    for name in ("a", "b"):
        await scene.hears(name, 2)
        assert scene.heard[name] == frames


async def test_all_readers_hear_an_end_from_outside(scene: Scene) -> None:
    await scene.dispatch("r")
    await scene.b.attach(["r"])
    await scene.log.finish([("r", "ingress:a", ABORT)])
    for name in ("a", "b"):
        await scene.hears(name, 1)


async def test_the_last_reader_to_leave_leaves_it_unread(scene: Scene) -> None:
    await scene.dispatch("r")
    await scene.b.attach(["r"])
    assert await scene.a.detach(["r"]) == []
    assert await scene.b.detach(["r"]) == ["r"]


async def test_who_left_before_the_first_dispatch_is_no_reader(scene: Scene) -> None:
    await scene.b.attach(["r"])
    assert await scene.a.detach(["r"]) == []
    await scene.dispatch("r")
    assert scene.field("r", "reply_to") == b"ingress:b"
    assert await scene.b.detach(["r"]) == ["r"]


@pytest.mark.parametrize("force", [False, True])
async def test_who_left_is_not_added_at_a_later_dispatch(scene: Scene, force: bool) -> None:
    await scene.dispatch("r")
    await scene.b.attach(["r"])
    await scene.a.detach(["r"])
    await scene.dispatch("r", force=force)
    assert await scene.b.detach(["r"]) == ["r"]


async def test_who_comes_back_reads_again(scene: Scene) -> None:
    await scene.a.detach(["r"])
    await scene.a.attach(["r"])
    _, attempt = await scene.dispatch("r")
    assert scene.field("r", "reply_to") == b"ingress:a"
    scene.emit("r", attempt, Frame(0, [1]))
    await scene.hears("a", 1)


async def test_an_ingress_that_died_does_not_read(scene: Scene) -> None:
    await scene.dispatch("r")
    await Readers(scene.client, scene.settings, "ingress:dead").attach(["r"])
    assert await scene.a.detach(["r"]) == ["r"]


async def test_nobody_reads_what_is_not_known_yet(scene: Scene) -> None:
    assert await scene.a.detach(["r"]) == ["r"]
    assert 0 < scene.blocking.pttl(f"{scene.settings.namespace}req:r") <= scene.settings.lifetime_s * 1000


async def test_a_new_reader_takes_back_a_cancellation_that_met_nothing(scene: Scene) -> None:
    await scene.a.cancel(["r"])
    assert await scene.b.attach(["r"]) == [Standing.UNKNOWN]
    assert (await scene.dispatch("r"))[0] is DispatchStatus.OK


async def test_a_final_cancellation_is_not_taken_back(scene: Scene) -> None:
    await scene.a.cancel(["r"], final=True)
    assert await scene.b.attach(["r"]) == [Standing.DONE]
    assert (await scene.dispatch("r"))[0] is DispatchStatus.DONE, "the record is completed without running"
    assert await scene.b.revive("r", 0, b"") is Revival.FINAL


async def test_a_final_cancellation_ends_what_waits_in_the_queue(scene: Scene) -> None:
    """Only the record says that it is a who waits for it."""
    assert await scene.b.cancel(["r"], final=True) == 1
    await scene.hears("a", 1)
    assert scene.heard["a"] == [ABORT] == await scene.log.read("r")
    assert scene.blocking.pttl(f"{scene.settings.namespace}req:r") > scene.settings.retention_s * 1000
    assert (await scene.dispatch("r"))[0] is DispatchStatus.DONE
    await scene.hears("a", 2)  # it may not have listened yet


@pytest.mark.parametrize("gone", [True, False])
async def test_a_final_cancellation_ends_what_its_replica_has_lost(scene: Scene, gone: bool) -> None:
    _, attempt = await scene.dispatch("r")
    if gone:
        scene.blocking.delete(f"{scene.settings.namespace}replica:e")
    else:
        scene.blocking.hset(f"{scene.settings.namespace}req:r", "lost", "1")
    await scene.b.cancel(["r"], final=True)
    await scene.hears("a", 1)
    assert scene.emit("r", attempt, Frame(0, [7])) is AppendStatus.DONE


async def test_a_final_cancellation_of_what_runs_is_left_to_its_engine(scene: Scene) -> None:
    _, attempt = await scene.dispatch("r")
    await scene.b.cancel(["r"], final=True)
    assert await scene.log.read("r") == []
    assert scene.emit("r", attempt, ABORT) is AppendStatus.OK


async def parked(scene: Scene, end: Frame = ABORT) -> None:
    """A request with two tokens that was cancelled."""
    await scene.dispatch("r")
    scene.emit("r", 1, Frame(0, [7]))
    scene.emit("r", 1, Frame(1, [8]))
    await scene.a.cancel(["r"])
    assert scene.emit("r", 1, end) is AppendStatus.OK


async def test_revived_it_goes_on_where_it_was(scene: Scene) -> None:
    await parked(scene)
    assert await scene.b.revive("r", 2, b"") is Revival.REVIVED
    assert await scene.log.read("r") == [Frame(0, [7]), Frame(1, [8])]
    assert await scene.b.progress(["r"]) == [Progress(False, 2, False)]
    assert await scene.b.attach(["r"]) == [Standing.UNKNOWN], "whoever revived it may have died before publishing it"
    status, attempt = await scene.dispatch("r", expected=2)
    assert status is DispatchStatus.OK
    assert await scene.b.attach(["r"]) == [Standing.RUNNING]
    assert scene.emit("r", attempt, Frame(2, [9], finish=Finish.LENGTH)) is AppendStatus.OK
    await scene.hears("b", 1)


async def test_the_cancelled_attempt_is_fenced(scene: Scene) -> None:
    await parked(scene)
    await scene.b.revive("r", 2, b"")
    assert scene.emit("r", 1, Frame(2, [66])) is AppendStatus.STALE


async def test_tokens_that_came_with_the_end_stay(scene: Scene) -> None:
    await parked(scene, Frame(2, [9], finish=Finish.ABORT))
    assert await scene.b.revive("r", 2, encode(Frame(2, [9]))) is Revival.REVIVED
    assert [frame.tokens for frame in await scene.log.read("r")] == [[7], [8], [9]]


async def test_only_one_reader_revives(scene: Scene) -> None:
    await parked(scene)
    assert await scene.a.revive("r", 2, b"") is Revival.REVIVED
    assert await scene.b.revive("r", 2, b"") is Revival.LIVE


async def test_who_comes_too_late_to_revive_reads_along(scene: Scene) -> None:
    await parked(scene)
    assert await scene.a.attach(["r"]) == [Standing.DONE]
    await scene.b.revive("r", 2, b"")
    heard = len(scene.heard["a"])
    assert await scene.a.revive("r", 2, b"") is Revival.LIVE
    _, attempt = await scene.dispatch("r", expected=2, reply_to="ingress:b")
    scene.emit("r", attempt, Frame(2, [9]))
    await scene.hears("a", heard + 1)


async def test_a_proper_end_cannot_be_revived_away(scene: Scene) -> None:
    await parked(scene)
    assert await scene.b.revive("r", 1, b"") is Revival.LIVE
    assert len(await scene.log.read("r")) == 3


async def test_cancelled_for_good_is_never_revived(scene: Scene) -> None:
    await parked(scene)
    await scene.b.cancel(["r"], final=True)
    assert await scene.b.revive("r", 2, b"") is Revival.FINAL


@pytest.mark.parametrize("end", [Finish.LENGTH, Finish.ERROR])
async def test_what_has_ended_stays_as_it_is(scene: Scene, end: Finish) -> None:
    await scene.dispatch("r")
    logprobs = Logprobs(1, b"\xff" * 4, b"\xff" * 4, b"\xff" * 4)
    scene.emit("r", 1, Frame(0, [7], finish=end, logprobs=logprobs))
    assert await scene.b.cancel(["r"], final=True) == 0
    assert await scene.b.progress(["r"]) == [Progress(True, 1, False)]


@pytest.mark.parametrize("record", ["r", "r:1"])
async def test_the_end_limits_how_long_the_request_is_kept(scene: Scene, record: str) -> None:
    key = f"{scene.settings.namespace}http:r"
    scene.blocking.set(key, b"stored", px=scene.settings.lifetime_s * 1000)
    await scene.dispatch(record)
    scene.emit(record, 1, Frame(0, [1]))
    assert scene.blocking.pttl(key) > scene.settings.retention_s * 1000
    scene.emit(record, 1, Frame(1, [2], finish=Finish.LENGTH))
    assert 0 < scene.blocking.pttl(key) <= scene.settings.retention_s * 1000


async def test_who_published_hears_the_end_beside_who_came_later(scene: Scene) -> None:
    """Before the first dispatch Redis knows of the second reader only."""
    await scene.listening()
    await scene.b.attach(["r"])
    await scene.log.finish([("r", "ingress:a", ABORT)])
    await scene.hears("a", 1)
    await scene.hears("b", 1)
