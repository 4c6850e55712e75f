"""One request in a dispatcher's hands."""

from __future__ import annotations

import msgspec

from penstock.queue.messages import Run, Stage, encode, lua_string
from penstock.queue.protocol import Delivery
from penstock.queue.records import Record, encode_record
from penstock.queue.token_log import Dispatch
from penstock.workers.placement import ANSWER_RESERVE_TOKENS


class Errand:
    """A request on loan from the queue, where it is, and what is known of its progress.

    ``deliveries`` are several when the queue delivered it again, or holds it twice. ``target`` is the replica whose
    inbox gets it; ``decode`` the replica that generates (the same, unless it goes through the prefill pool first). Both
    are empty while it waits. ``runs`` counts the replicas it was given to.
    """

    def __init__(self, delivery: Delivery) -> None:
        self.record = delivery.record
        self.deliveries = [delivery]
        self.emitted: list[int] = []
        self.attempt = 0
        self.runs = 0
        self.force = False
        self.ended = False
        self.stage = Stage.WHOLE
        self.target = ""
        self.decode = ""
        self._encoded = encode_record(_for_engine(self.record))

    @property
    def id(self) -> str:
        """Internal request id."""
        return self.record.id

    @property
    def prompt_tokens(self) -> int:
        """Tokens the engine has to prefill."""
        return self.record.num_tokens + len(self.emitted)

    @property
    def kv_tokens(self) -> int:
        """KV cache to reserve: the prompt and a likely answer."""
        left = self.record.max_tokens - len(self.emitted)
        return self.prompt_tokens + min(left, ANSWER_RESERVE_TOKENS)

    def urgency(self) -> tuple[int, int]:
        """Sort key: class, then age."""
        return self.record.priority_class.rank, self.record.accepted_ms

    def dispatch(self) -> Dispatch:
        """The entry of the dispatch script."""
        hand_over = self.decode if self.stage is Stage.PREFILL else None
        run = Run(self.id, self.stage, msgspec.Raw(self._encoded), self.emitted, hand_over)
        record = self.record
        return Dispatch(
            self.id, len(self.emitted), record.reply_to, self.target, lua_string(encode(run)), record.tenant, self.force
        )


def _for_engine(record: Record) -> Record:
    """Without what an engine does not read: the body alone is often larger than the rest."""
    return msgspec.structs.replace(record, body=None, prefix_hashes=[])
