"""A token log on a Redis of the test's own, and what its readers hear."""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.queue.messages import (
    TERMINAL,
    Finish,
    Frame,
    Inbound,
    Run,
    Stage,
    StreamError,
    decode_inbound,
    encode,
    lua_string,
)
from penstock.queue.redis_client import connect, connect_async
from penstock.queue.settings import RedisSettings
from penstock.queue.token_log import (
    Append,
    Dispatch,
    Dispatched,
    DispatchStatus,
    RequestLog,
    TokenWriter,
    emitted_tokens,
)

OK, ADOPTED = DispatchStatus.OK, DispatchStatus.ADOPTED
ERROR = Frame(TERMINAL, [], finish=Finish.ERROR, error=StreamError("failed", "no luck", 500))
CANCELLED = Frame(TERMINAL, [], finish=Finish.ABORT)


def entry(
    request: str, attempt: int, index: int, tokens: list[int], finish: Finish | None = None, **fields: object
) -> Append:
    """One step of one request."""
    frame = Frame(index, tokens, finish=finish, **fields)  # type: ignore[arg-type]
    return Append(request, attempt, index, len(tokens), lua_string(encode(frame)), finish is not None)


def hand_over(step: Append, replica: str, stage: Stage = Stage.DECODE) -> Append:
    run = Run(step.id, stage, msgspec.Raw(encode({"v": 1})), [], kv={"block": 7})
    return msgspec.structs.replace(step, hand_over=replica, work=lua_string(encode(run)))


class Store:
    """Both ends of a token log, and a look at its keys."""

    def __init__(self, settings: RedisSettings) -> None:
        self.settings = settings
        self.blocking = connect(settings)
        self.client = connect_async(settings)
        self.writer = TokenWriter(self.blocking, settings)
        self.log = RequestLog(self.client, settings)

    def key(self, name: str) -> str:
        return self.settings.namespace + name

    def lease(self, *replicas: str) -> None:
        for replica in replicas:
            self.blocking.set(self.key(f"replica:{replica}"), b"alive")

    def bury(self, replica: str) -> None:
        self.blocking.delete(self.key(f"replica:{replica}"))

    def inbox(self, replica: str) -> list[Inbound]:
        rows: Any = self.blocking.xrange(self.key(f"inbox:{replica}"))
        return [decode_inbound(fields[b"w"]) for _, fields in rows]

    async def dispatch(
        self, request: str, replica: str, *, expect: int = 0, force: bool = False, dispatcher: str = "d1", **known: Any
    ) -> Dispatched:
        work = lua_string(encode(Run(request, Stage.WHOLE, msgspec.Raw(encode({"v": 1})))))
        one = Dispatch(request, expect, "ingress", replica, work, "acme", force, **known)
        return (await self.log.dispatch(dispatcher, [one]))[0]

    async def tokens(self, request: str) -> list[int]:
        return emitted_tokens(await self.log.read(request))

    async def close(self) -> None:
        await self.client.aclose()
        self.writer.close()
        self.blocking.close()


class Wire:
    """Everything published in a namespace."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pubsub = store.blocking.pubsub()  # type: ignore[no-untyped-call]
        self._pubsub.psubscribe(store.key("*"))
        assert self._pubsub.get_message(timeout=5) is not None  # the confirmation

    def read(self) -> list[tuple[str, bytes]]:
        """Messages so far, in order: a marker of our own comes back after all of them."""
        self._store.blocking.publish(self._store.key("marker"), b"")
        read: list[tuple[str, bytes]] = []
        while True:
            message = self._pubsub.get_message(timeout=5)
            assert message is not None, "the marker did not arrive"
            channel = message["channel"].decode().removeprefix(self._store.settings.namespace)
            if channel == "marker":
                return read
            read.append((channel, message["data"]))

    def close(self) -> None:
        self._pubsub.close()
