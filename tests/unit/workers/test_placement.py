"""Credits, prefix affinity and the better of two."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.queue.records import PREFIX_BLOCK_TOKENS
from penstock.queue.registry import Replica
from penstock.workers import placement
from penstock.workers.placement import PREFILL_AHEAD_TOKENS, Pool, Seat

pytestmark = pytest.mark.unit

PREFIX = [b"one", b"two", b"three"]


def make_replica(id_: str = "a", role: str = "decode", **fields: Any) -> Replica:
    values: dict[str, Any] = {
        "max_seqs": 4, "kv_tokens": 1000, "block_size": 4, "max_model_len": 100, "node": "n", "pid": 1,
    }  # fmt: skip
    return Replica(id=id_, pool="p", role=role, **(values | fields))


def make_pool(*ids: str, **fields: Any) -> Pool:
    pool = Pool()
    pool.refresh([make_replica(id_, **fields) for id_ in ids], shared=False, keep=False)
    return pool


def test_room_is_taken_and_given_back() -> None:
    seat = Seat(make_replica())
    seat.take("r", 300, PREFIX)
    assert (seat.requests, seat.tokens, seat.use) == (3, 700, 0.3)
    seat.give_back("r")
    seat.give_back("r")
    assert (seat.requests, seat.tokens, seat.use) == (4, 1000, 0.0)


def test_taking_twice_holds_once() -> None:
    seat = Seat(make_replica())
    seat.take("r", 300, ())
    seat.take("r", 100, ())
    assert (seat.requests, seat.tokens) == (3, 900)


def test_fits_by_requests_and_tokens() -> None:
    seat = Seat(make_replica(max_seqs=2))
    assert seat.fits(5000)
    seat.take("r1", 900, ())
    assert seat.fits(100)
    assert not seat.fits(101)
    seat.take("r2", 0, ())
    assert not seat.fits(0)


def test_use_is_of_what_is_scarcer() -> None:
    seat = Seat(make_replica())
    seat.take("r", 10, ())
    assert seat.use == 0.25


def test_prefill_is_given_little_ahead() -> None:
    assert Seat(make_replica(role="prefill", kv_tokens=10**6)).tokens == PREFILL_AHEAD_TOKENS
    assert Seat(make_replica(role="decode", kv_tokens=10**6)).tokens == 10**6


def test_cached_is_the_unbroken_prefix() -> None:
    seat = Seat(make_replica())
    seat.take("r", 1, PREFIX)
    assert seat.cached([b"one", b"two", b"other", b"three"]) == 2 * PREFIX_BLOCK_TOKENS
    assert seat.cached([b"other", b"one"]) == 0


def test_oldest_prefixes_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "REMEMBERED_BLOCKS", 3)
    seat = Seat(make_replica())
    seat.take("r1", 1, PREFIX)
    seat.take("r2", 1, [b"one"])
    seat.take("r3", 1, [b"four"])
    assert seat.cached([b"one"]) == seat.cached([b"four"]) == PREFIX_BLOCK_TOKENS
    assert seat.cached([b"two"]) == 0


def test_others_work_counts_when_shared() -> None:
    seat = Seat(make_replica())
    seat.take("r", 1, ())
    report = make_replica(running=2, waiting=1)
    seat.refresh(report, shared=True)
    assert seat.requests == 1
    seat.refresh(report, shared=False)
    assert seat.requests == 3


def test_refresh_keeps_what_is_held_and_drops_the_gone() -> None:
    pool = make_pool("a", "b")
    pool.seats["a"].take("r", 10, ())
    pool.refresh([make_replica("a"), make_replica("c")], shared=False, keep=False)
    assert {id_: seat.requests for id_, seat in pool.seats.items()} == {"a": 3, "c": 4}


def test_closed_until_the_next_refresh() -> None:
    pool = make_pool("a")
    pool.seats["a"].closed = True
    assert pool.choose(1, ()) is None
    assert pool.room(0.0) == (0, 0)
    pool.refresh([make_replica("a")], shared=False, keep=False)
    assert pool.room(0.0) == (4, 1000)


def test_room_of_the_full_does_not_count() -> None:
    pool = make_pool("a", "b", max_seqs=1)
    pool.seats["a"].take("r", 10, ())
    assert pool.room(0.0) == (1, 1000)


def test_longest_prefix_wins_unless_overloaded() -> None:
    pool = make_pool("a", "b", "c", max_seqs=100)
    pool.seats["a"].take("r1", 500, PREFIX[:1])
    pool.seats["b"].take("r2", 899, PREFIX)
    for _ in range(20):
        chosen = pool.choose(1, PREFIX)
        assert chosen is not None
        assert chosen.replica.id == "b"
    pool.seats["b"].take("r3", 1, ())
    busy = {seat.replica.id for _ in range(50) if (seat := pool.choose(1, PREFIX)) is not None}
    assert "b" not in busy


def test_better_of_two_is_never_the_worst() -> None:
    pool = make_pool("a", "b", "c")
    for request in ("r1", "r2", "r3"):
        pool.seats["c"].take(request, 1, ())
    chosen = [seat.replica.id for _ in range(100) if (seat := pool.choose(1, ())) is not None]
    assert set(chosen) == {"a", "b"}


def test_nothing_fits() -> None:
    pool = make_pool("a", max_seqs=1)
    pool.seats["a"].take("r", 1, ())
    assert pool.choose(1, ()) is None
    assert Pool().choose(1, ()) is None


def test_reserved_share_is_left_free() -> None:
    seat = Seat(make_replica(max_seqs=10))
    assert seat.room(0.1) == (9, 900)
    for number in range(9):
        seat.take(str(number), 50, ())
    assert (seat.fits(50, 0.1), seat.fits(50)) == (False, True)
    assert seat.room(0.1) == (0, 450)


def test_small_replicas_reserve_nothing() -> None:
    assert Seat(make_replica(max_seqs=4)).room(0.1).requests == 4


def test_draining_replica_takes_nothing() -> None:
    pool = make_pool("a", draining=True)
    assert (pool.room(0.0), pool.choose(1, ())) == ((0, 0), None)


def test_avoided_replica_is_the_last_resort() -> None:
    pool = make_pool("a", "b")
    assert {chosen(pool.choose(1, (), avoid={"a"})) for _ in range(20)} == {"b"}
    assert chosen(make_pool("a").choose(1, (), avoid={"a"})) == "a"


def chosen(seat: Seat | None) -> str:
    assert seat is not None
    return seat.replica.id


def test_suspect_has_a_replica_for_itself() -> None:
    """It gets the emptiest one, once what came there last has settled; nothing else is placed there meanwhile."""
    pool = make_pool("a", "b", "c", "d")
    for id_ in "abcd":
        pool.seats[id_].take(f"other-{id_}", 500 if id_ != "c" else 100, ())
    assert pool.isolate("suspect", 10) is None
    assert pool.seats["c"].guest == "suspect"
    assert "c" not in {chosen(pool.choose(1, ())) for _ in range(50)}
    assert pool.isolate("second", 10) is None
    assert pool.isolate("third", 10) is None
    assert [bool(seat.guest) for seat in pool.seats.values()].count(True) == 2, "half of the pool at most"
    pool.seats["c"].give_back("other-c")
    assert chosen(pool.isolate("suspect", 10)) == "c"
    pool.release("suspect")
    assert pool.seats["c"].open


def test_suspect_moves_on_to_a_replica_that_is_empty() -> None:
    """Such as the successor of the one that died: nobody goes down with it there."""
    pool = make_pool("a", "b")
    for id_ in "ab":
        pool.seats[id_].take(f"other-{id_}", 100, ())
    assert pool.isolate("suspect", 10) is None
    waited_for = next(seat for seat in pool.seats.values() if seat.guest)
    pool.seats |= make_pool("c").seats
    assert chosen(pool.isolate("suspect", 10)) == "c"
    assert waited_for.open, "it is for all again"
