"""Batches in Redis.

``{ns}batch:{id}`` the batch (a hash), ``…:done`` one bit per finished line, ``…:segments`` where the results are,
``…:lease`` whose work it is; ``{ns}batches:{tenant}`` a tenant's batches by time of creation, ``{ns}batches-open``
those on which there is something to do, as ``tenant/id``.

The list of segments is the truth: results that are not in it do not exist. It only grows through ``commit.lua``, which
takes the lease's owner alone and no line twice.

A server that comes back without its last second has forgotten the latest of these writes, together and in order. So a
coordinator works within one *life* of the server: each status is left in the life in which its work began, or the
work is begun again; and what cannot be taken back waits until the status it follows from is on disk.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import redis.asyncio

from penstock.queue.errors import PermanentError, TransientError
from penstock.queue.redis_client import store_errors
from penstock.queue.settings import RedisSettings
from penstock.serving.batches.inspection import Inspection
from penstock.serving.batches.lines import Problem
from penstock.serving.batches.model import Batch, BatchSpec, Counters, Status
from penstock.serving.errors import NotFound
from penstock.serving.files.index import read_page

LEASE_S = 5.0
"""How long a coordinator may be silent: longer than a pause of its process that passes, short enough to be taken over
within seconds."""
KEPT_S = 60
"""How long the token log of a committed line is kept: a dispatcher that is given it once more, after a restart of the
broker, must find that it is done. A million lines would fill Redis if each stayed for an hour."""
LONGEST_LIFE_S = 8 * 86_400
"""No batch is worked on for longer: windows end after seven days."""
_COUNTERS = frozenset(Counters.__struct_fields__)


class LeaseLost(PermanentError):
    """Another coordinator has taken over; nothing more may be written."""

    code = "lease_lost"


class StoreRestarted(TransientError):
    """Redis was started again: what was written before may be gone, so it is looked at again."""

    code = "store_restarted"


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """One object of results: its name, how many lines, and the lowest and highest of their indexes."""

    name: str
    lines: int
    first: int
    last: int


class Committed(NamedTuple):
    """A segment and what it adds; ``records`` are those of its lines in the token log, not to be kept for long."""

    segment: Segment
    indexes: list[int]
    counters: Counters
    records: list[str]


class BatchStore:
    """All batches. Methods raise :class:`~penstock.queue.errors.StoreUnavailable` when Redis is away."""

    def __init__(self, client: redis.asyncio.Redis, settings: RedisSettings) -> None:
        self._client = client
        self._ns = settings.namespace
        self._open = f"{self._ns}batches-open"
        self._transition, self._commit, self._renew, self._release = (
            client.register_script(Path(__file__).with_name(f"{name}.lua").read_text())
            for name in ("transition", "commit", "renew", "release")
        )

    async def create(self, spec: BatchSpec, inspection: bytes) -> Batch:
        """Store a new batch, with what is known of its input; a coordinator will find it."""
        pipeline = self._client.pipeline()
        fields: dict[Any, Any] = {
            "spec": msgspec.msgpack.encode(spec),
            "inspection": inspection,
            "status": Status.VALIDATING,
        }
        pipeline.hset(self._key(spec.id), mapping=fields)
        pipeline.zadd(f"{self._ns}batches:{spec.tenant}", {spec.id: spec.created_ms})
        pipeline.sadd(self._open, f"{spec.tenant}/{spec.id}")
        with store_errors():
            await pipeline.execute()
        return Batch(spec=spec, status=Status.VALIDATING)

    async def find(self, tenant: str, batch_id: str) -> Batch:
        """The batch. Raises :class:`NotFound` when the tenant has none of this id."""
        batch = await self.load(batch_id) if _ID.fullmatch(batch_id) else None  # else it might name one of our keys
        if batch is None or batch.spec.tenant != tenant:
            raise NotFound(f"No batch found with id '{batch_id[:100]}'.")
        return batch

    async def load(self, batch_id: str) -> Batch | None:
        """The batch, whoever's it is."""
        with store_errors():
            fields = cast(dict[bytes, bytes], await self._client.hgetall(self._key(batch_id)))
        return _decode(fields) if fields else None

    async def inspection(self, batch_id: str) -> Inspection:
        """What is known of the input."""
        with store_errors():
            return _inspection.decode(cast(bytes, await self._client.hget(self._key(batch_id), "inspection")))

    async def page(self, tenant: str, *, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """A page of the tenant's batches, newest first, and whether there are more."""
        found = await read_page(self._client, f"{self._ns}batches:{tenant}", after=after, limit=limit)
        pipeline = self._client.pipeline(transaction=False)
        for batch_id in found.ids:
            pipeline.hgetall(self._key(batch_id))
        with store_errors():
            values = await pipeline.execute() if found.ids else []
        return [_decode(fields) for fields in values if fields], found.has_more

    async def open_batches(self) -> list[tuple[str, str]]:
        """Tenant and id of every batch on which there is something to do."""
        with store_errors():
            members = cast(set[bytes], await self._client.smembers(self._open))
        return [(tenant, batch_id) for tenant, _, batch_id in (m.decode().rpartition("/") for m in sorted(members))]

    async def acquire(self, batch_id: str, owner: str) -> bool:
        """Take the lease, if nobody has it."""
        with store_errors():
            return bool(await self._client.set(self._key(batch_id, "lease"), owner, nx=True, px=_LEASE_MS))

    async def renew(self, batch_id: str, owner: str) -> str:
        """Keep the lease; returns which life of the server this is. Raises :class:`LeaseLost`."""
        with store_errors():
            life = cast(bytes | None, await self._renew(keys=[self._key(batch_id, "lease")], args=[owner, _LEASE_MS]))
        if life is None:
            raise LeaseLost(f"{batch_id} was taken over")
        return life.decode()

    async def release(self, batch_id: str, owner: str) -> None:
        """Give the lease back, so that another takes over at once."""
        with store_errors():
            await self._release(keys=[self._key(batch_id, "lease")], args=[owner])

    async def transition(
        self,
        batch_id: str,
        allowed: tuple[Status, ...],
        new: Status,
        *,
        owner: str = "",
        life: str = "",
        **fields: Any,
    ) -> Status:
        """Set a status and further fields if the batch is in one of ``allowed``; returns the status it had.

        Raises:
            LeaseLost: an ``owner`` was given and the lease is not its own.
            StoreRestarted: ... and Redis was started again since its ``life``.
            NotFound: there is no such batch.
        """
        pairs: list[Any] = [f"{new}_at", int(time.time())]
        for name, value in fields.items():
            pairs += [name, value]
        with store_errors():
            had = await self._transition(
                keys=[self._key(batch_id), self._key(batch_id, "lease")],
                args=[owner, life, " ".join(allowed), new, *pairs],
            )
        if had is None:
            raise NotFound(f"No batch found with id '{batch_id[:100]}'.")
        if had == b"lost":
            raise LeaseLost(f"{batch_id} was taken over")
        if had == b"restarted":
            raise StoreRestarted("Redis was started again and may have forgotten something")
        return Status(had.decode())

    async def commit(self, batch_id: str, owner: str, new: Committed) -> None:
        """Count the lines of a segment as finished. May be repeated.

        Raises:
            LeaseLost: the lease is not ``owner``'s, or one of the lines was finished before.
        """
        counters = [(name, n) for name, n in msgspec.structs.asdict(new.counters).items() if n]
        entry = msgspec.msgpack.encode(new.segment)
        args = [
            owner,
            entry,
            self._ns,
            len(new.indexes),
            _KEPT_MS,
            len(counters),
            *(word for pair in counters for word in pair),
            *new.indexes,
            *new.records,
        ]
        keys = [self._key(batch_id, part) for part in ("", "lease", "done", "segments")]
        with store_errors():
            answer = await self._commit(keys=keys, args=args)
        if answer != b"ok":
            raise LeaseLost(f"{batch_id}: results refused ({answer.decode()})")

    async def done(self, batch_id: str) -> bytearray:
        """One bit per line, the first the highest of the first byte; shorter than the input where zeros end it."""
        with store_errors():
            return bytearray(cast(bytes | None, await self._client.get(self._key(batch_id, "done"))) or b"")

    async def segments(self, batch_id: str) -> list[Segment]:
        """Everything committed, oldest first."""
        with store_errors():
            entries = await cast(Any, self._client.lrange(self._key(batch_id, "segments"), 0, -1))
        return [msgspec.msgpack.decode(entry, type=Segment) for entry in entries]

    async def close(self, spec: BatchSpec, retention_s: int) -> None:
        """Nothing is left to do: forget everything but the batch itself, and that in time, as its elders by now."""
        pipeline = self._client.pipeline()
        pipeline.delete(*(self._key(spec.id, part) for part in ("done", "segments")))
        pipeline.expire(self._key(spec.id), retention_s)
        pipeline.srem(self._open, f"{spec.tenant}/{spec.id}")
        elders = spec.created_ms - (retention_s + LONGEST_LIFE_S) * 1000
        pipeline.zremrangebyscore(f"{self._ns}batches:{spec.tenant}", 0, elders)
        with store_errors():
            await pipeline.execute()

    def _key(self, batch_id: str, part: str = "") -> str:
        return f"{self._ns}batch:{batch_id}" + (f":{part}" if part else "")


_ID = re.compile(r"batch_[0-9a-f]{32}")
_LEASE_MS = int(LEASE_S * 1000)
_KEPT_MS = KEPT_S * 1000
_BINARY = frozenset({b"spec", b"inspection"})
_spec = msgspec.msgpack.Decoder(BatchSpec)
_inspection = msgspec.msgpack.Decoder(Inspection)
_problems = msgspec.json.Decoder(list[Problem])


def encode_problems(problems: list[Problem]) -> bytes:
    """The value of the field ``problems``."""
    return msgspec.json.encode(problems)


def _decode(fields: dict[bytes, bytes]) -> Batch:
    texts = {name.decode(): value.decode() for name, value in fields.items() if name not in _BINARY}
    return Batch(
        spec=_spec.decode(fields[b"spec"]),
        status=Status(texts["status"]),
        total=int(texts.get("total", 0)),
        model=texts.get("model"),
        counters=Counters(**{name: int(value) for name, value in texts.items() if name in _COUNTERS}),
        problems=_problems.decode(texts.get("problems", "[]")),
        output_file_id=texts.get("output_file_id"),
        error_file_id=texts.get("error_file_id"),
        times={status: int(texts[f"{status}_at"]) for status in Status if f"{status}_at" in texts},
    )
