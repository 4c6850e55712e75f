"""How a decode engine tells a prefill engine that its KV was read, as NIXL's notifications do.

One datagram a request, sent and forgotten: if it is lost, the lease frees the blocks.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import msgspec

from penstock.workers.engine import KV_LEASE_S as KV_LEASE_S
from penstock.workers.simulated.request import Handle

MAX_DATAGRAM = 512
"""A release takes some 50 bytes."""


class Release(msgspec.Struct, array_like=True, frozen=True):
    """KV that was read. ``engine`` guards against a port that another engine had before."""

    engine: str
    lease: int


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Release).decode


class ReleaseSocket:
    """Sends releases to other engines and reads those for this one; never blocks, and needs no thread."""

    def __init__(self, host: str, engine: str) -> None:
        self._engine = engine
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind((host, 0))
        self.address = "{}:{}".format(*self._socket.getsockname())

    def send(self, handle: Handle) -> None:
        """Tell the owner of ``handle`` that it may free the blocks."""
        host, _, port = handle.address.rpartition(":")
        with contextlib.suppress(OSError):  # the lease is the safety net
            self._socket.sendto(_encode(Release(handle.engine, handle.lease)), (host, int(port)))

    def reaches(self, handle: Handle) -> bool:
        """Whether the owner of ``handle`` is there: the kernel refuses a datagram for a port that nobody has."""
        host, _, port = handle.address.rpartition(":")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect((host, int(port)))
                probe.send(b"")
                probe.recv(MAX_DATAGRAM)
            except BlockingIOError:
                return True
            except OSError:
                return False
        return True

    def received(self) -> Iterator[int]:
        """Leases of this engine that were released since the last call."""
        while True:
            try:
                release = _decode(self._socket.recv(MAX_DATAGRAM))
            except BlockingIOError:
                return
            except msgspec.MsgspecError:  # not from an engine
                continue
            if release.engine == self._engine:
                yield release.lease

    def close(self) -> None:
        """Free the port."""
        self._socket.close()
