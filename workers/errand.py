"""One request in a dispatcher's hands."""

from __future__ import annotations

import time

import msgspec

from penstock.queue.messages import Run, Stage, encode, lua_string
from penstock.queue.pauses import jittered
from penstock.queue.protocol import Delivery
from penstock.queue.records import PriorityClass, Record, encode_record
from penstock.queue.token_log import Dispatch
from penstock.workers.placement import ANSWER_RESERVE_TOKENS
from penstock.workers.sampling import continuable

PROBATION_TOKENS = 16
"""A request that replicas died with is cleared when it has got this many tokens further. A prefill replica's first
token is not enough: what kills decode replicas would never be found out."""
BACKOFF_S = 0.25
"""Pause before the third try, doubled with each further one. The second comes at once: most deaths are a machine's."""
BACKOFF_MAX_S = 30.0
"""No pause is longer, but for its jitter: doubled without a bound it would soon outlast who waits for the answer."""


class Errand:
    """A request on loan from the queue, where it is, and what is known of its progress.

    ``deliveries`` are several when the queue delivered it again, or holds it twice. ``target`` is the replica whose
    inbox gets it; ``decode`` the replica that generates (the same, unless it goes through the prefill pool first);
    ``source`` the prefill replica whose KV cache ``decode`` has yet to read. All are empty while it waits. ``deaths``
    counts the replicas that died or failed with it since it last got on well; those that failed are in ``avoid``;
    ``stuck`` that the last of them died before it had got far; ``alone`` that it has its target for itself. With a
    ``verdict`` it was given up for this reason, and goes to the dead letters.
    """

    def __init__(self, delivery: Delivery) -> None:
        self.record = delivery.record
        self.deliveries = [delivery]
        self.emitted: list[int] = []
        self.attempt = 0
        self.deaths = 0
        self.stuck = False
        self.avoid: set[str] = set()
        self.force = False
        self.ended = False
        self.verdict = ""
        self.stage = Stage.WHOLE
        self.target = ""
        self.decode = ""
        self.source = ""
        self.alone = False
        self._not_before = 0.0
        self._continuable = continuable(self.record.sampling)
        self._encoded = encode_record(_for_engine(self.record))

    @property
    def id(self) -> str:
        """Internal request id."""
        return self.record.id

    @property
    def replay(self) -> bool:
        """Whether an engine must produce again what was emitted: it cannot tell its sampling state from tokens."""
        return bool(self.emitted) and not self._continuable

    @property
    def given(self) -> int:
        """Emitted tokens that an engine takes as part of its prompt."""
        return 0 if self.replay else len(self.emitted)

    @property
    def prompt_tokens(self) -> int:
        """Tokens the engine has to prefill."""
        return self.record.num_tokens + self.given

    @property
    def left_tokens(self) -> int:
        """Tokens the engine may generate."""
        return self.record.max_tokens - self.given

    @property
    def kv_tokens(self) -> int:
        """KV cache to reserve: the prompt and a likely answer."""
        return self.prompt_tokens + min(self.left_tokens, ANSWER_RESERVE_TOKENS)

    @property
    def rank(self) -> int:
        """Rank of its class; 0 is the most urgent."""
        return self.record.priority_class.rank

    @property
    def ready(self) -> bool:
        """Whether its pause after a failure is over."""
        return time.monotonic() >= self._not_before

    def promote(self, priority_class: PriorityClass) -> None:
        """Raise its class, if this one is more urgent. An engine that has it already is not told."""
        if priority_class.rank < self.rank:
            self.record = msgspec.structs.replace(self.record, priority_class=priority_class)
            self._encoded = encode_record(_for_engine(self.record))

    def urgency(self) -> tuple[int, int]:
        """Sort key: class, then age."""
        return self.rank, self.record.accepted_ms

    def suspect(self, deaths: int) -> None:
        """So many replicas died or failed with it: the more, the longer it waits, and never in step with others."""
        self.deaths = deaths
        if deaths > 1:
            self._not_before = time.monotonic() + jittered(min(BACKOFF_MAX_S, BACKOFF_S * 2.0 ** (deaths - 2)))

    def got_far(self, position: int) -> bool:
        """Whether its last run shows no sign of trouble, the log being at ``position``: of a replay it cannot tell."""
        return self.replay or position - len(self.emitted) >= PROBATION_TOKENS

    def clear(self) -> None:
        """It got on well: whatever happened before was not its fault."""
        self.deaths = 0
        self.stuck = False
        self.avoid.clear()

    def dispatch(self) -> Dispatch:
        """The entry of the dispatch script."""
        hand_over = self.decode if self.stage is Stage.PREFILL else None
        run = Run(self.id, self.stage, msgspec.Raw(self._encoded), self.emitted, hand_over, replay=self.replay)
        return Dispatch(
            self.id,
            len(self.emitted),
            self.record.reply_to,
            self.target,
            lua_string(encode(run)),
            self.record.tenant,
            self.force,
            self.attempt,
            self.deaths,
            len(self.emitted) + PROBATION_TOKENS,
            self.alone,
        )


def _for_engine(record: Record) -> Record:
    """Without what an engine does not read: the body alone is often larger than the rest."""
    return msgspec.structs.replace(record, body=None, prefix_hashes=[])
