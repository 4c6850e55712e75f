"""Reading event streams as bytes, to compare them byte for byte."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

_ID = re.compile(rb"^id: ([\d.]+-[0-9a-f]{8})\n", re.MULTILINE)
_CHOICE = re.compile(rb'"choices":\[\{"index":(\d+)')
END = b"\n\n"


@dataclass
class Answer:
    """A whole answer."""

    status: int
    stream_id: str
    body: bytes

    @property
    def events(self) -> list[bytes]:
        """Its blocks."""
        return [event + END for event in self.body.split(END) if event.strip()]

    @property
    def ids(self) -> list[str]:
        """The id of each event that has one."""
        return [found.decode() for found in _ID.findall(self.body)]


def counts(ids: list[str]) -> list[str]:
    """Ids without their checksums."""
    return [id_.partition("-")[0] for id_ in ids]


def read(client: httpx.Client, method: str, url: str, **options: Any) -> Answer:
    """Send a request and read its answer to the end."""
    with client.stream(method, url, **options) as response:
        body = response.read()
    return Answer(response.status_code, response.headers.get("x-stream-id", ""), body)


class Part:
    """What a client has of a stream so far, in whole events."""

    def __init__(self, response: httpx.Response) -> None:
        self.stream_id: str = response.headers["x-stream-id"]
        self._raw = response.iter_raw()
        self._body = b""

    @property
    def body(self) -> bytes:
        """Up to the end of the last whole event: what a client has processed."""
        return self._body[: self._body.rfind(END) + 2] if END in self._body else b""

    @property
    def last_id(self) -> str:
        """Of the last whole event."""
        return _ID.findall(self.body)[-1].decode()

    def read_events(self, count: int) -> None:
        """Read on until there are that many events."""
        while self.body.count(END) < count:
            self._body += next(self._raw)

    def read_rest(self) -> None:
        """Read to the end, or to where the connection breaks."""
        try:
            for piece in self._raw:
                self._body += piece
        except httpx.TransportError:
            return


@contextmanager
def opened(client: httpx.Client, method: str, url: str, **options: Any) -> Iterator[Part]:
    """A stream under way; leaving closes the connection."""
    with client.stream(method, url, **options) as response:
        assert response.status_code == 200, response.read()
        yield Part(response)


def tracks(answer: Answer) -> dict[bytes, list[bytes]]:
    """Events by choice, without their ids: several choices may interleave differently each time."""
    found: dict[bytes, list[bytes]] = {}
    for event in answer.events:
        choice = _CHOICE.search(event)
        found.setdefault(choice[1] if choice else b"", []).append(_ID.sub(b"", event))
    return found
