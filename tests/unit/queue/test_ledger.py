"""The ledger against a model: whatever the order of events, nothing is lost and nothing encoded is run twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.queue.ledger import METADATA_LIMIT, Ledger, decode_finished, encode_finished

pytestmark = pytest.mark.unit


class LedgerMachine(RuleBasedStateMachine):
    """A partition with gaps, one consumer at a time, which may crash between any two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[int] = []
        self.end = 0
        self.finished: set[int] = set()
        self.working: set[int] = set()
        self.committed = (0, "")
        self.promised: set[int] = set()
        self.ledger = Ledger(0)
        self.position = 0

    @initialize(start=st.integers(0, 2**40))
    def begin(self, start: int) -> None:
        """Offsets start anywhere."""
        self.end = self.position = start
        self.committed = (start, "")
        self.ledger = Ledger(start)

    @rule(gaps=st.lists(st.sampled_from([0, 0, 0, 0, 1, 5, 300]), min_size=1, max_size=8))
    def append(self, gaps: list[int]) -> None:
        """Records, with gaps as transaction markers and compaction leave them."""
        for gap in gaps:
            self.log.append(self.end + gap)
            self.end += gap + 1

    @precondition(lambda self: self.unread())
    @rule(count=st.integers(1, 10))
    def deliver(self, count: int) -> None:
        """The consumer reads on."""
        for offset in self.unread()[:count]:
            self.position = offset + 1
            if self.ledger.deliver(offset):
                assert offset not in self.promised, "delivered again although its end was committed"
                self.working.add(offset)
            else:
                assert offset in self.finished, "skipped although it is not finished"

    @precondition(lambda self: self.working)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """Any delivered request ends."""
        offset = data.draw(st.sampled_from(sorted(self.working)))
        assert self.ledger.finish(offset)
        assert not self.ledger.finish(offset)
        self.working.remove(offset)
        self.finished.add(offset)

    @rule()
    def commit(self) -> None:
        """The broker stores watermark and metadata."""
        self.committed = (self.ledger.watermark, self.ledger.metadata())
        ranges = list(decode_finished(*self.committed))
        self.promised = {
            offset
            for offset in self.log
            if offset < self.committed[0] or any(start <= offset < end for start, end in ranges)
        }

    @rule()
    def crash(self) -> None:
        """Another consumer takes the partition over from the last commit."""
        self.ledger = Ledger(*self.committed)
        self.position = self.committed[0]
        self.working.clear()

    @precondition(lambda self: self.working)
    @rule(data=st.data())
    def cut_back(self, data: st.DataObject) -> None:
        """The log loses its end and is written anew: the same offsets are other records now."""
        offset = data.draw(st.sampled_from(sorted(self.working)))
        self.log = [known for known in self.log if known <= offset]
        for known in (self.finished, self.working, self.promised):
            known -= {lost for lost in known if lost >= offset}
        self.position, self.end = offset, offset + 1
        self.deliver(1)
        self.commit()

    @invariant()
    def nothing_unfinished_is_below_the_watermark(self) -> None:
        """What a commit would declare finished is."""
        assert all(offset in self.finished for offset in self.log if offset < self.ledger.watermark)

    @invariant()
    def nothing_unfinished_is_encoded(self) -> None:
        """Nor does the metadata declare more."""
        encoded = list(decode_finished(self.ledger.watermark, self.ledger.metadata()))
        covered = {offset for offset in self.log for start, end in encoded if start <= offset < end}
        assert covered <= self.finished

    @invariant()
    def pending_counts_the_work(self) -> None:
        """Every loan is known, and nothing else."""
        assert self.ledger.pending == len(self.working)

    def unread(self) -> list[int]:
        """Offsets the consumer has not reached."""
        return [offset for offset in self.log if offset >= self.position]


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(deadline=None)


def alternating(count: int, step: int) -> Ledger:
    """Every ``step``-th request finished."""
    ledger = Ledger(0)
    for offset in range(count):
        assert ledger.deliver(offset)
    for offset in range(1, count, step):
        assert ledger.finish(offset)
    return ledger


@settings(deadline=None)
@given(count=st.integers(1, 20_000), step=st.integers(2, 1000))
def test_metadata_never_exceeds_the_brokers_limit(count: int, step: int) -> None:
    metadata = alternating(count, step).metadata()
    assert len(metadata) <= METADATA_LIMIT


def test_what_does_not_fit_is_the_end_and_is_delivered_again() -> None:
    restored = Ledger(0, alternating(10_000, 2).metadata())
    again = [offset for offset in range(10_000) if restored.deliver(offset)]
    skipped = sorted(set(range(10_000)) - set(again))
    assert skipped == list(range(1, skipped[-1] + 1, 2))
    assert len(skipped) > 1000


def test_one_straggler_costs_a_few_bytes() -> None:
    ledger = Ledger(0)
    for offset in range(100_000):
        ledger.deliver(offset)
    for offset in range(1, 100_000):
        ledger.finish(offset)
    assert ledger.watermark == 0
    assert len(ledger.metadata()) < 16


def test_a_restored_consumer_passes_on_what_it_has_not_reached() -> None:
    first = alternating(10, 2)
    second = Ledger(first.watermark, first.metadata())
    assert second.deliver(0)
    third = Ledger(second.watermark, second.metadata())
    assert [offset for offset in range(10) if third.deliver(offset)] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("metadata", ["", "somebody else's", "2:AAAA", "1:not base64!", "1:gA=="])
def test_metadata_of_another_build_is_ignored(metadata: str) -> None:
    ledger = Ledger(7, metadata)
    assert [ledger.deliver(offset) for offset in (7, 8)] == [True, True]


@settings(deadline=None)
@given(
    watermark=st.integers(0, 2**62),
    lengths=st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 2**20)), max_size=50),
)
def test_ranges_survive_encoding(watermark: int, lengths: list[tuple[int, int]]) -> None:
    ranges, cursor = [], watermark
    for gap, length in lengths:
        ranges.append((cursor + gap, cursor + gap + length))
        cursor += gap + length
    assert list(decode_finished(watermark, encode_finished(watermark, ranges))) == ranges
