"""What is asked of every contender."""

from __future__ import annotations

import msgspec


class Arrival(msgspec.Struct, frozen=True):
    """One request of a replayed trace: when it arrives, and how long it is.

    ``blocks`` name its prompt's leading blocks of ``Workload.block_tokens`` tokens; equal names are equal text.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


class Workload(msgspec.Struct, frozen=True):
    """One round: ``requests`` completions, ``concurrency`` of them open at any time. Special tokens count.

    ``shared_tokens`` of each prompt are the same in all of a round's requests. With ``arrivals`` the lengths are
    theirs; with ``open_loop`` they also come when those say, however many are open.
    """

    name: str
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    requests: int
    shared_tokens: int = 0
    arrivals: tuple[Arrival, ...] = ()
    block_tokens: int = 0
    open_loop: bool = False

    @property
    def prompt_lens(self) -> list[int]:
        """Prompt tokens, request by request."""
        return [arrival.prompt_tokens for arrival in self.arrivals] or [self.prompt_tokens] * self.requests

    @property
    def output_lens(self) -> list[int]:
        """Output tokens, request by request."""
        return [arrival.output_tokens for arrival in self.arrivals] or [self.output_tokens] * self.requests


def _closed(kind: str, concurrency: int, prompt: int, output: int, requests: int, shared: int = 0) -> Workload:
    streams = "1 stream" if concurrency == 1 else f"{concurrency} streams"
    return Workload(f"{streams}, {kind}", concurrency, prompt, output, requests, shared)


QUICK = (
    _closed("101/32", 1, 101, 32, 10),
    _closed("101/32", 32, 101, 32, 96),
    _closed("1500/32", 1, 1500, 32, 4),
)
"""One to two seconds a round on two idle cores."""
FULL = (
    _closed("101/32", 1, 101, 32, 10),
    _closed("101/32", 8, 101, 32, 32),
    _closed("101/32", 32, 101, 32, 96),
    _closed("101/32", 128, 101, 32, 128),
    _closed("1500/32", 1, 1500, 32, 4),
    _closed("1500/32", 8, 1500, 32, 8),
    _closed("101/512", 1, 101, 512, 1),
    _closed("101/512", 8, 101, 512, 8),
    _closed("512 shared + 64/32", 8, 576, 32, 32, shared=512),
    _closed("512 shared + 64/32", 32, 576, 32, 64, shared=512),
)
"""About half a minute a round on two idle cores, replay apart."""
SHORT = FULL[:5]
"""The load curve and one long prompt; all of :data:`QUICK` is in it."""
SETS = {"quick": QUICK, "short": SHORT, "full": FULL, "all": FULL}
"""What ``--workloads`` names. ``full`` asks :data:`SHORT` of pairs that vary another one's queue or settings."""
