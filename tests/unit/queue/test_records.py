"""The record schema: what goes in comes out, and nothing unknown is guessed at."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.queue.errors import InvalidRecord, UnknownVersion
from penstock.queue.records import (
    DEFAULT_MAX_TOKENS,
    MAX_PREFIX_BLOCKS,
    PREFIX_BLOCK_TOKENS,
    SCHEMA_VERSION,
    PriorityClass,
    decode_record,
    encode_record,
    pack_tokens,
    prefix_hashes,
    unpack_tokens,
)
from tests.support.frozen_records import FROZEN
from tests.support.requests import make_record

pytestmark = pytest.mark.unit

token_ids = st.lists(st.integers(0, 2**32 - 1), max_size=300)
plain = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text()
mapping = st.dictionaries(st.text(), plain | st.lists(plain, max_size=3), max_size=4)
words = st.dictionaries(st.text(), st.text(), max_size=3)


@given(prompt=token_ids, sampling=mapping, hints=mapping, tags=words, body=st.none() | st.binary(), data=st.data())
def test_round_trip(
    prompt: list[int], sampling: dict[str, Any], hints: dict[str, Any], tags: dict[str, str], body: bytes | None,
    data: st.DataObject,
) -> None:  # fmt: skip
    record = make_record(
        prompt, sampling=sampling, hints=hints, tags=tags, trace=tags, body=body,
        priority_class=data.draw(st.sampled_from(PriorityClass)),
        deadline_ms=data.draw(st.none() | st.integers(0, 2**53)),
        external_id=data.draw(st.none() | st.text()),
        payload_ref=data.draw(st.none() | st.text()),
    )  # fmt: skip
    read = decode_record(encode_record(record))
    assert read == record
    assert read.token_ids() == prompt


def as_map(**changes: Any) -> dict[str, Any]:
    return msgspec.msgpack.decode(encode_record(make_record())) | changes


def test_wire_names_are_the_schema() -> None:
    """Renaming one of these is a new version."""
    assert set(as_map()) == {
        "v", "id", "model", "pool", "release", "tenant", "class", "num_tokens", "prompt", "sampling", "reply_to",
        "accepted_ms", "deadline_ms", "external_id", "tags", "trace", "prefix_hashes", "cache_salt", "hints", "body",
        "payload_ref",
    }  # fmt: skip
    assert as_map()["v"] == SCHEMA_VERSION


@pytest.mark.parametrize("version", FROZEN)
def test_records_of_released_versions_are_read(version: int) -> None:
    """[I7] Also those of every version before this one, whole."""
    record = decode_record(FROZEN[version])
    assert (record.id, record.token_ids(), record.max_tokens) == (f"frozen-v{version}", [11, 12, 13, 14, 15], 12)
    assert (record.tenant, record.priority_class, record.reply_to) == ("acme", "standard", "ingress:test")
    assert record.sampling == {"max_tokens": 12, "temperature": 0.5, "stop_token_ids": [7]}
    assert (record.cache_salt, record.hints, record.body) == ("salt", {"reasoning_ended": True}, b"{}")
    assert (record.external_id, record.accepted_ms, record.deadline_ms) == ("req-1", 1_767_225_600_000, None)


def test_every_version_up_to_this_one_is_frozen() -> None:
    assert list(FROZEN) == list(range(1, SCHEMA_VERSION + 1))


def test_fields_of_a_later_release_are_ignored() -> None:
    assert decode_record(msgspec.msgpack.encode(as_map(lora="x"))).model == "m"


@pytest.mark.parametrize("version", [0, 2, 99])
def test_unknown_version_is_refused_whatever_it_holds(version: int) -> None:
    with pytest.raises(UnknownVersion, match=str(version)):
        decode_record(msgspec.msgpack.encode({"v": version, "new": "shape"}))


@given(st.binary(max_size=64))
def test_junk_is_invalid(data: bytes) -> None:
    with pytest.raises(InvalidRecord):
        decode_record(data)


@pytest.mark.parametrize("field", ["id", "tenant", "class", "prompt", "num_tokens", "reply_to"])
def test_missing_or_mistyped_field_is_invalid(field: str) -> None:
    whole = as_map()
    for broken in ({k: v for k, v in whole.items() if k != field}, whole | {field: 1.5}):
        with pytest.raises(InvalidRecord, match=field):
            decode_record(msgspec.msgpack.encode(broken))


def test_truncated_record_is_invalid() -> None:
    data = encode_record(make_record())
    for length in range(len(data)):
        with pytest.raises(InvalidRecord):
            decode_record(data[:length])


@given(token_ids)
def test_tokens_are_packed_in_four_bytes(ids: list[int]) -> None:
    packed = pack_tokens(ids)
    assert packed == b"".join(token.to_bytes(4, "little") for token in ids)
    assert unpack_tokens(packed) == ids


def test_deadline_is_exclusive() -> None:
    record = make_record(deadline_ms=1000)
    assert [record.expired(now) for now in (999, 1000, 1001)] == [False, True, True]
    assert not make_record().expired(2**60)


def test_answer_limit() -> None:
    assert make_record(sampling={"max_tokens": 5}).max_tokens == 5
    assert make_record(sampling={}).max_tokens == make_record(sampling={"max_tokens": None}).max_tokens == 16
    assert DEFAULT_MAX_TOKENS == 16


def test_classes_are_ranked_by_urgency() -> None:
    assert sorted(PriorityClass, key=lambda cls: cls.rank) == ["interactive", "standard", "batch"]


@given(blocks=st.integers(0, 4), rest=st.integers(0, PREFIX_BLOCK_TOKENS - 1), common=st.integers(0, 4))
def test_prefix_hashes_agree_as_far_as_prompts_do(blocks: int, rest: int, common: int) -> None:
    length = blocks * PREFIX_BLOCK_TOKENS + rest
    here = list(range(length))
    same = min(common * PREFIX_BLOCK_TOKENS, length)
    there = here[:same] + [token + 1 for token in here[same:]]
    ours, theirs = (prefix_hashes(pack_tokens(ids), "salt") for ids in (here, there))
    assert len(ours) == len(theirs) == blocks
    shared = min(common, blocks)
    assert [a == b for a, b in zip(ours, theirs, strict=True)] == [True] * shared + [False] * (blocks - shared)


def test_prefix_hashes_depend_on_the_salt_and_are_bounded() -> None:
    prompt = pack_tokens(range(PREFIX_BLOCK_TOKENS * (MAX_PREFIX_BLOCKS + 3)))
    ours, theirs = prefix_hashes(prompt, "acme"), prefix_hashes(prompt, "other")
    assert len(ours) == len(set(ours)) == MAX_PREFIX_BLOCKS
    assert not set(ours) & set(theirs)
