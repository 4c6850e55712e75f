"""Ports that are told to somebody before anybody listens on them."""

from __future__ import annotations

import socket


def reserved_port() -> socket.socket:
    """A port for this engine's NIXL handshakes, which nobody else gets while this socket is open.

    vLLM listens on it ten seconds after it was told which. Where another process has taken a port meanwhile it waits
    for ever: the thread that should listen has died. A socket that is bound and does not listen keeps others away, and
    lets ZeroMQ in, which sets the same option.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("", 0))
    return sock
