"""Which way a request goes, and that every credit comes back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.queue.messages import Stage
from penstock.queue.protocol import Bound, Delivery
from penstock.queue.registry import Replica
from penstock.workers.errand import Errand
from penstock.workers.routing import Router
from penstock.workers.settings import WorkerSettings
from tests.support.requests import make_record

pytestmark = pytest.mark.unit

SPLIT: dict[str, Any] = {"short_prompt_tokens": 8}
MIXED: dict[str, Any] = {"mixed": 1, "prefill": 0, "decode": 0}


def make_replica(id_: str, **fields: Any) -> Replica:
    values: dict[str, Any] = {
        "max_seqs": 2, "kv_tokens": 1000, "block_size": 4, "max_model_len": 500, "node": "n", "pid": 1,
    }  # fmt: skip
    return Replica(id=id_, pool="p", role=id_.rstrip("0123456789"), **(values | fields))


def make_router(shape: dict[str, Any], *ids: str) -> Router:
    router = Router(WorkerSettings.model_validate(shape))
    router.refresh([make_replica(id_) for id_ in ids])
    return router


def make_errand(prompt: int = 20, **fields: Any) -> Errand:
    return Errand(Delivery(make_record(prompt, **fields), ("", 0, "")))


def room(router: Router) -> dict[str, tuple[int, int]]:
    seats = router._prefill.seats | router._decode.seats
    return {id_: (seat.requests, seat.tokens) for id_, seat in seats.items()}


def test_long_prompts_take_the_prefill_pool() -> None:
    router, errand = make_router(SPLIT, "prefill1", "decode1"), make_errand(20)
    assert router.place(errand)
    assert (errand.stage, errand.target, errand.decode) == (Stage.PREFILL, "prefill1", "decode1")
    assert errand.dispatch().replica == "prefill1"
    assert room(router) == {"prefill1": (1, 980), "decode1": (1, 976)}


@pytest.mark.parametrize(
    "errand",
    [
        make_errand(8),
        make_errand(20, sampling={"max_tokens": 1}),
        make_errand(20, sampling={"max_tokens": 9, "prompt_logprobs": 0}),
    ],
    ids=["short", "one token", "prompt log probabilities"],
)
def test_others_go_straight_to_decode(errand: Errand) -> None:
    router = make_router(SPLIT, "prefill1", "decode1")
    assert router.place(errand)
    assert (errand.stage, errand.target, errand.decode) == (Stage.WHOLE, "decode1", "decode1")


def test_cached_prompts_skip_the_prefill_pool() -> None:
    router = make_router(SPLIT, "prefill1", "decode1")
    prompt = list(range(130))
    first, second = (Errand(Delivery(make_record(prompt), ("", 0, ""))) for _ in range(2))
    assert router.place(first)
    assert router.place(second)
    assert (first.stage, second.stage) == (Stage.PREFILL, Stage.WHOLE)


def test_mixed_replicas_do_everything() -> None:
    router, errand = make_router(MIXED, "mixed1"), make_errand(400)
    assert router.place(errand)
    assert (errand.stage, errand.target) == (Stage.WHOLE, "mixed1")


def test_without_prefill_nothing_is_reserved() -> None:
    router, errand = make_router(SPLIT, "decode1"), make_errand(20)
    before = room(router)
    assert not router.place(errand)
    assert (room(router), errand.target) == (before, "")
    assert router.room() == (Bound(0, 0),) * 3


def test_hand_over_frees_the_prefill_replica() -> None:
    router, errand = make_router(SPLIT, "prefill1", "decode1"), make_errand(20)
    router.place(errand)
    for _ in range(2):
        router.move(errand, "decode1")
        assert (errand.target, errand.decode) == ("decode1", "decode1")
        assert room(router) == {"prefill1": (2, 1000), "decode1": (1, 976)}


def test_adopted_work_is_followed() -> None:
    """First where another dispatcher had put it, then to the decode replica that one had chosen."""
    router, errand = make_router(SPLIT, "prefill1", "decode1", "decode2"), make_errand(20)
    router.place(errand)
    router.move(errand, "prefill1")
    router.move(errand, "decode2")
    router.refresh([make_replica("prefill1"), make_replica("decode1")])
    assert router.dead(errand) == "decode2"


def test_dead_is_either_replica_it_needs() -> None:
    router, errand = make_router(SPLIT, "prefill1", "decode1"), make_errand(20)
    assert router.dead(errand) == ""
    router.place(errand)
    assert router.dead(errand) == ""
    for gone, left in (("prefill1", "decode1"), ("decode1", "prefill1")):
        router.refresh([make_replica(left)])
        assert router.dead(errand) == gone


def test_closed_replica_keeps_its_errands() -> None:
    """Its lease ran out: nothing new goes there, and what runs there is still found should it be gone for good."""
    router, errand, other = make_router(MIXED, "mixed1"), make_errand(), make_errand()
    router.place(errand)
    router.close("mixed1")
    router.close("unknown")
    assert not router.place(other)
    assert router.dead(errand) == ""
    router.refresh([make_replica("mixed1")])
    assert router.place(other)
    assert room(router)["mixed1"][0] == 0


def test_engines_get_no_body() -> None:
    errand = make_errand(20, body=b"x" * 5000)
    assert len(bytes(errand.dispatch().work)) < 1000


def test_continuation_counts_what_was_emitted() -> None:
    errand = make_errand(20, sampling={"max_tokens": 10})
    errand.emitted = [1, 2, 3]
    assert (errand.prompt_tokens, errand.kv_tokens, errand.dispatch().next) == (23, 30, 3)


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["place", "move", "back", "refresh"]), st.integers(0, 2))))
def test_every_credit_comes_back(moves: list[tuple[int, str, int]]) -> None:
    """Whatever happened to them in between, once all errands have given back their room, all of it is there."""
    ids = ["prefill1", "decode1", "decode2"]
    router = make_router(SPLIT, *ids)
    before = room(router)
    errands = [make_errand(9 * k) for k in range(1, 7)]
    for which, what, where in moves:
        errand = errands[which]
        if what == "place" and not errand.target:
            router.place(errand)
        elif what == "move" and errand.target:
            router.move(errand, ids[where])
        elif what == "back":
            router.give_back(errand)
        elif what == "refresh":
            router.refresh([make_replica(id_) for id_ in ids])
    for errand in errands:
        router.give_back(errand)
    assert room(router) == before
