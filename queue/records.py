"""The record a request becomes on the broker: our own versioned schema, map-encoded msgpack.

Records outlive upgrades, so nothing in them is a type of an engine: token ids are packed little-endian ``uint32``,
sampling parameters a map by name. Readers ignore fields they do not know and refuse versions they do not know.
"""

from __future__ import annotations

import hashlib
import sys
import time
import uuid
from array import array
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import msgspec

from penstock.queue.errors import InvalidRecord, UnknownVersion

SCHEMA_VERSION = 1
PREFIX_BLOCK_TOKENS = 64
"""Tokens per prefix hash. Coarser than an engine's KV block: the hashes choose a replica, they do not address KV."""
DEFAULT_MAX_TOKENS = 16
"""vLLM's own default, for records that name no limit."""
MAX_PREFIX_BLOCKS = 256
"""Hashes stop after 16k tokens: a match that long already decides the placement."""


class PriorityClass(StrEnum):
    """Service classes in strict order of urgency; OpenAI's ``service_tier`` priority, default and flex."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"

    @property
    def rank(self) -> int:
        """0 is the most urgent."""
        return _RANKS[self]


_RANKS = {cls: rank for rank, cls in enumerate(PriorityClass)}


class Record(msgspec.Struct, kw_only=True):
    """One accepted generation request.

    ``prompt`` holds ``num_tokens`` token ids, 4 bytes each, or is empty when ``payload_ref`` names where the heavy
    fields are stored. ``hints`` are further engine arguments by name (such as ``reasoning_ended``). Times are
    wall-clock milliseconds since the epoch.
    """

    v: int = SCHEMA_VERSION
    id: str
    model: str
    pool: str
    release: str
    tenant: str
    priority_class: PriorityClass = msgspec.field(name="class")
    num_tokens: int
    prompt: bytes
    sampling: dict[str, Any]
    reply_to: str
    accepted_ms: int
    deadline_ms: int | None = None
    external_id: str | None = None
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    trace: dict[str, str] = msgspec.field(default_factory=dict)
    prefix_hashes: list[bytes] = msgspec.field(default_factory=list)
    cache_salt: str | None = None
    hints: dict[str, Any] = msgspec.field(default_factory=dict)
    body: bytes | None = None
    payload_ref: str | None = None

    @property
    def max_tokens(self) -> int:
        """Upper bound of the answer in tokens; :data:`DEFAULT_MAX_TOKENS` when the client named none."""
        limit = self.sampling.get("max_tokens")
        return DEFAULT_MAX_TOKENS if limit is None else int(limit)

    def token_ids(self) -> list[int]:
        """The prompt as a list of token ids."""
        return unpack_tokens(self.prompt)

    def expired(self, now_ms: int) -> bool:
        """Whether nobody waits for this request any more."""
        return self.deadline_ms is not None and now_ms >= self.deadline_ms


def new_request_id() -> str:
    """A fresh internal request id. Everything is keyed by it; a client's ``X-Request-Id`` is only an index."""
    return uuid.uuid4().hex


def now_ms() -> int:
    """Wall-clock milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as packed little-endian ``uint32``: 4 bytes a token, encoded at memory speed."""
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """Inverse of :func:`pack_tokens`."""
    packed = array("I")
    packed.frombytes(data)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()


def prefix_hashes(prompt: bytes, salt: str) -> list[bytes]:
    """Chained 8-byte hashes of the prompt's whole blocks of :data:`PREFIX_BLOCK_TOKENS` tokens.

    Equal prefixes give equal hashes; ``salt`` (tenant and cache salt) keeps tenants from probing each other's cache.
    """
    step = PREFIX_BLOCK_TOKENS * 4
    digest = hashlib.blake2b(salt.encode(), digest_size=8).digest()
    hashes = []
    for start in range(0, min(len(prompt) // step, MAX_PREFIX_BLOCKS) * step, step):
        digest = hashlib.blake2b(digest + prompt[start : start + step], digest_size=8).digest()
        hashes.append(digest)
    return hashes


class _Version(msgspec.Struct):
    v: int


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)
_version = msgspec.msgpack.Decoder(_Version)


def encode_record(record: Record) -> bytes:
    """The record's bytes on the broker."""
    return _encoder.encode(record)


def decode_record(data: bytes) -> Record:
    """Read a record.

    Raises:
        UnknownVersion: the schema version is not one this build reads.
        InvalidRecord: the bytes are not a record.
    """
    try:
        version = _version.decode(data).v
    except msgspec.MsgspecError as error:
        raise InvalidRecord(f"not a Penstock record: {error}") from error
    if version != SCHEMA_VERSION:
        raise UnknownVersion(f"record has schema version {version}; this build reads {SCHEMA_VERSION}")
    try:
        return _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise InvalidRecord(f"record does not match schema version {version}: {error}") from error
