"""Blocks, tokens and step times of the simulated engine, each by itself."""

from __future__ import annotations

import pytest

from penstock.workers.simulated.kv_cache import KVCache
from penstock.workers.simulated.step_times import PROFILES, step_times
from penstock.workers.simulated.tokens import FIRST_TOKEN, VOCABULARY, expected_tokens

pytestmark = pytest.mark.unit


def taken(kv: KVCache, matched: list[int], fresh: int) -> list[int]:
    blocks = kv.take(matched, fresh)
    assert blocks is not None
    return blocks


def cached_chain(kv: KVCache, *digests: bytes) -> list[int]:
    """A released, remembered chain of blocks."""
    blocks = taken(kv, [], len(digests))
    for block, digest in zip(blocks, digests, strict=True):
        kv.remember(block, digest)
    kv.release(blocks)
    return blocks


def test_take_all_or_nothing() -> None:
    kv = KVCache(4)
    assert len(set(taken(kv, [], 3))) == 3
    assert kv.take([], 2) is None
    assert kv.used_blocks == 3


def test_shared_blocks_count_once_and_live_until_the_last_release() -> None:
    kv = KVCache(4)
    blocks = cached_chain(kv, b"a", b"b")
    assert kv.match([b"a", b"b", b"c"]) == blocks
    first, second = taken(kv, blocks, 1), taken(kv, blocks, 1)
    assert kv.used_blocks == 4
    kv.release(first)
    assert kv.used_blocks == 3
    kv.release(second)
    assert kv.used_blocks == 0


def test_matched_idle_blocks_are_not_free_for_the_rest() -> None:
    kv = KVCache(3)
    blocks = cached_chain(kv, b"a", b"b")
    assert kv.take(blocks, 2) is None
    assert kv.used_blocks == 0
    assert kv.match([b"a", b"b"]) == blocks


def test_evicts_the_least_recently_used_and_the_tail_of_a_chain_first() -> None:
    kv = KVCache(4)
    cached_chain(kv, b"a", b"b")
    cached_chain(kv, b"c", b"d")
    kv.release(taken(kv, kv.match([b"a"]), 0))
    evicted = taken(kv, [], 2)
    assert [len(kv.match([digest])) for digest in (b"a", b"b", b"c", b"d")] == [1, 0, 1, 0]
    kv.release(evicted)


def test_equal_content_is_remembered_once() -> None:
    kv = KVCache(2)
    blocks = taken(kv, [], 2)
    for block in blocks:
        kv.remember(block, b"a")
    kv.release(blocks)
    assert kv.match([b"a"]) == blocks[:1]
    assert kv.free_blocks == 2


def test_tokens_depend_on_prompt_and_position_alone() -> None:
    answer = expected_tokens([1, 2, 3], 4000)
    assert answer[:100] == expected_tokens([1, 2, 3], 100)
    assert min(answer) >= FIRST_TOKEN
    assert max(answer) < FIRST_TOKEN + VOCABULARY
    assert len(set(answer)) > VOCABULARY // 2
    assert answer[:100] != answer[1:101]
    assert answer != expected_tokens([1, 2, 4], 4000)


@pytest.mark.parametrize(
    ("profile", "prefill", "decode"),
    [
        ("h100/llama3.1-8b", 38.22, 12.25),
        ("a100/llama3.1-8b", 117.8, 22.50),
        ("h100x4/llama3.1-70b", 117.9, 19.39),
    ],
)
def test_profiles_reproduce_their_calibration(profile: str, prefill: float, decode: float) -> None:
    times = step_times(profile)
    assert times.step_s(2048, 2048**2, 0, 0) * 1000 == pytest.approx(prefill, rel=0.02)
    assert times.step_s(0, 0, 64, 64 * 2048) * 1000 == pytest.approx(decode, rel=0.06)


@pytest.mark.parametrize("profile", sorted(set(PROFILES) - {"instant"}))
def test_chunks_cost_no_less_than_one_prefill(profile: str) -> None:
    times = step_times(profile)
    chunked = times.step_s(1024, 1024**2, 0, 0) + times.step_s(1024, 2048**2 - 1024**2, 0, 0)
    assert times.step_s(2048, 2048**2, 0, 0) <= chunked
    assert times.step_s(1, 1, 0, 0) * 1000 >= times.floor


def test_instant_takes_no_time() -> None:
    times = step_times("instant")
    assert times.step_s(1000, 1000**2, 100, 10_000) == 0
    assert times.transfer_s(1000) == 0


def test_unknown_profile_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"h100/llama3\.1-8b"):
        step_times("h100/other")
