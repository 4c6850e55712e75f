"""A reserved port is nobody else's, and ours to listen on."""

from __future__ import annotations

import errno
import socket

import pytest
import zmq

from penstock.workers.ports import reserved_port

pytestmark = pytest.mark.unit


def test_zeromq_can_listen_on_it_and_be_reached() -> None:
    with reserved_port() as held, zmq.Context() as context:
        port = held.getsockname()[1]
        with context.socket(zmq.ROUTER) as listener, context.socket(zmq.REQ) as asking:
            listener.bind(f"tcp://127.0.0.1:{port}")
            asking.connect(f"tcp://127.0.0.1:{port}")
            asking.send(b"hello")
            assert listener.poll(10_000) == zmq.POLLIN
            assert listener.recv_multipart()[-1] == b"hello"


def test_others_cannot_have_it() -> None:
    with reserved_port() as held, socket.socket() as other:
        with pytest.raises(OSError, match="in use") as found:
            other.bind(("127.0.0.1", held.getsockname()[1]))
        assert found.value.errno == errno.EADDRINUSE
