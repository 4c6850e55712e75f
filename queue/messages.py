"""What travels between the processes of a deployment of one release: token frames and engine work.

Unlike :mod:`penstock.queue.records` these do not outlive an upgrade by more than a request's life, so they are
positional msgpack arrays: a frame costs some thirty bytes and one C call to decode.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Any

import msgspec

TERMINAL = -1
"""Frame index of an end that is not tied to a position: an error or a cancellation."""


class Finish(IntEnum):
    """Why a stream ended. The values of vLLM's ``FinishReason``, so that the edge converts by number."""

    STOP = 0
    LENGTH = 1
    ABORT = 2
    ERROR = 3
    REPETITION = 4


class StreamError(msgspec.Struct, array_like=True, frozen=True):
    """A typed error that ends a stream: ``code`` and ``status`` of a :class:`~penstock.queue.errors.PenstockError`."""

    code: str
    message: str
    status: int = 500
    retryable: bool = False


class Logprobs(msgspec.Struct, array_like=True, frozen=True):
    """Log probabilities of a frame's tokens, row-major.

    Shapes: ``token_ids`` int32 and ``logprobs`` float32 are ``[positions, width]``; ``ranks`` int32 is ``[positions]``.
    """

    width: int
    token_ids: bytes
    logprobs: bytes
    ranks: bytes


class Usage(msgspec.Struct, array_like=True, frozen=True):
    """Prefill accounting, sent once with the first token: prompt tokens, of which cached locally and transferred."""

    prompt_tokens: int
    cached_tokens: int = 0
    transferred_tokens: int = 0


class Frame(msgspec.Struct, array_like=True, frozen=True):
    """What one engine step produced for one request: tokens from position ``index`` on, and perhaps the end."""

    index: int
    tokens: list[int]
    finish: Finish | None = None
    stop_reason: int | str | None = None
    usage: Usage | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    error: StreamError | None = None


class Stage(StrEnum):
    """What a replica does with a request."""

    WHOLE = "whole"
    """Prefill and decode in one engine: the mixed pool, and short prompts sent straight to a decode replica."""
    PREFILL = "prefill"
    """Compute the KV cache, then hand over to the decode replica named in the work."""
    DECODE = "decode"
    """Load the KV cache from the prefill replica and generate."""
    RELEASE = "release"
    """Only tell the prefill replica that nobody will read the KV cache it holds."""


class Run(msgspec.Struct, array_like=True, tag="run", frozen=True):
    """One request for one engine. The attempt number travels beside it, stamped by the dispatch script.

    ``emitted`` are the tokens already in the log: the engine goes on from prompt + emitted, or with ``replay`` runs
    from the prompt alone and must produce them again. ``hand_over`` is the decode replica of a PREFILL, ``kv`` the
    transfer parameters of a DECODE, not to be used after ``kv_until_ms`` (wall clock).
    """

    id: str
    stage: Stage
    record: msgspec.Raw
    emitted: list[int] = []
    hand_over: str | None = None
    kv: dict[str, Any] | None = None
    replay: bool = False
    kv_until_ms: int = 0


class Abort(msgspec.Struct, array_like=True, tag="abort", frozen=True):
    """Stop these requests and free their KV blocks."""

    ids: list[str]


class Inbound(msgspec.Struct, array_like=True, frozen=True):
    """One entry of a replica's inbox. ``attempt`` is 0 for an abort, which reaches whatever attempt runs.

    ``fence`` is the time of the dispatch and goes back with every append: see ``append.lua``.
    """

    attempt: int
    work: Run | Abort
    fence: int = 0


class _Work(msgspec.Struct, array_like=True, frozen=True):
    kind: str
    id: str


class Address(msgspec.Struct, array_like=True, frozen=True):
    """What an :class:`Inbound` of a later release says as well: which attempt of which request it brings."""

    attempt: int
    work: _Work
    fence: int = 0


class EventKind(StrEnum):
    """What a dispatcher is told of a request it owns."""

    DONE = "done"
    """The end is in the token log."""
    GIVEN_UP = "given_up"
    """It ended because too many replicas died with it: it is for the dead letters."""
    PREFILLED = "prefilled"
    """``replica`` runs it now; the prefill replica that handed it over has room again."""
    LOADED = "loaded"
    """The replica it was handed to has its KV cache now, and needs the prefill replica no more."""
    LOST = "lost"
    """No replica's fault (the hand-over found nobody, a replica is drained, the log lost tokens): dispatch it again."""
    FAILED = "failed"
    """The replica could not run it: dispatch it elsewhere, but not for ever."""
    CLEARED = "cleared"
    """It has got well beyond the point where replicas had died with it."""
    GONE = "gone"
    """Redis knows nothing of it, or of its last attempt, any more."""


class Event(msgspec.Struct, array_like=True, frozen=True):
    """One line of a dispatcher's mail: what became of attempt ``attempt``."""

    id: str
    kind: EventKind
    attempt: int = 0
    replica: str = ""


class Delivered(msgspec.Struct, array_like=True, frozen=True):
    """A frame as it reaches an ingress."""

    id: str
    frame: Frame


encode = msgspec.msgpack.Encoder().encode


def lua_string(data: bytes) -> msgspec.Raw:
    """Bytes as a msgpack string: the decoder inside Redis' Lua knows no binary type, and its strings are bytes."""
    return msgspec.Raw(b"\xdb" + len(data).to_bytes(4, "big") + data)


decode_inbound = msgspec.msgpack.Decoder(Inbound).decode
decode_address = msgspec.msgpack.Decoder(Address).decode
decode_delivered = msgspec.msgpack.Decoder(list[Delivered]).decode
decode_events = msgspec.msgpack.Decoder(list[Event]).decode
decode_frame = msgspec.msgpack.Decoder(Frame).decode
