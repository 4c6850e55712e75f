"""Deterministic tokens: the answer to a prompt is a pure function of the prompt and the position.

Whoever reads a stream can compute what it must contain, so that one lost, repeated or foreign token shows,
whichever engines and attempts produced it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from penstock.queue.records import pack_tokens

FIRST_TOKEN = 1024
"""Below are the special and single-byte tokens of every usual vocabulary."""
VOCABULARY = 2048
"""Ids end at 3,071: the smallest vocabulary in use has 4,096."""
_PERIOD = 1 << 16
_PAD = [
    number % VOCABULARY for number in array("H", hashlib.shake_128(b"penstock simulated tokens").digest(2 * _PERIOD))
]
"""Random numbers every answer is cut from: a look-up is cheaper than a hash, and done for every token."""


def seed_of(prompt: bytes) -> int:
    """27-bit digest of a packed prompt: 16 bits choose the place in the pad, 11 the mask on its numbers."""
    digest = hashlib.blake2b(prompt, digest_size=4).digest()
    return int.from_bytes(digest, "little") % (_PERIOD * VOCABULARY)


def token_at(seed: int, position: int) -> int:
    """The token at ``position``, 0 being the first generated one."""
    return FIRST_TOKEN + (_PAD[(seed + position) % _PERIOD] ^ (seed >> 16))


def expected_tokens(prompt_ids: Sequence[int], count: int) -> list[int]:
    """The first ``count`` tokens every simulated engine generates for this prompt, stop tokens left aside."""
    seed = seed_of(pack_tokens(prompt_ids))
    return [token_at(seed, position) for position in range(count)]
