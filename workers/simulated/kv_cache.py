"""KV cache accounting in blocks: reference counts, prefix cache, LRU eviction; after vLLM's block pool.

A block is *used* (some request refers to it), *cached* (nobody does, but its content is known by hash and
may be taken up again) or *blank*. It is in exactly one of the three, so a leak shows in
:attr:`KVCache.used_blocks`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence


def root_hash(tenant: str, cache_salt: str | None) -> bytes:
    """Start of a hash chain. It keeps tenants, and salts of one tenant, from probing each other's blocks."""
    return hashlib.blake2b(f"{tenant}\0{cache_salt or ''}".encode(), digest_size=8).digest()


def chained_hash(parent: bytes, tokens: array[int]) -> bytes:
    """Identity of a whole block: its tokens and, by the chain, everything before them."""
    return hashlib.blake2b(parent + tokens.tobytes(), digest_size=8).digest()


class KVCache:
    """A pool of ``num_blocks`` blocks."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._blank = list(range(num_blocks))
        self._refs = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._idle: dict[int, None] = {}  # cached blocks nobody refers to, least recently used first

    @property
    def free_blocks(self) -> int:
        """Blocks that can be taken, cached ones included."""
        return len(self._blank) + len(self._idle)

    @property
    def used_blocks(self) -> int:
        """Blocks some request refers to."""
        return self.num_blocks - self.free_blocks

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of ``hashes``; nothing is taken yet."""
        blocks = []
        for digest in hashes:
            block = self._by_hash.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def take(self, matched: Sequence[int], fresh: int) -> list[int] | None:
        """Refer to ``matched`` and ``fresh`` new blocks; None, and no change, if those are too many."""
        idle = sum(not self._refs[block] for block in matched)
        if idle + fresh > self.free_blocks:
            return None
        for block in matched:
            self._idle.pop(block, None)
            self._refs[block] += 1
        return [*matched, *(self._fresh() for _ in range(fresh))]

    def remember(self, block: int, digest: bytes) -> None:
        """Make a full block findable. A second block of the same content stays unknown."""
        if self._hashes[block] is None and digest not in self._by_hash:
            self._hashes[block] = digest
            self._by_hash[digest] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each block, tail first: a prefix is worth more than what follows it."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if self._hashes[block] is None:
                self._blank.append(block)
            else:
                self._idle[block] = None

    def _fresh(self) -> int:
        block = self._blank.pop() if self._blank else self._evict()
        self._refs[block] = 1
        return block

    def _evict(self) -> int:
        block = next(iter(self._idle))
        del self._idle[block]
        digest = self._hashes[block]
        if digest is not None:
            del self._by_hash[digest]
        self._hashes[block] = None
        return block
