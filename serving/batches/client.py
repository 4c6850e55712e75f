"""The API of files and batches, as the command line uses it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx

from penstock.queue.errors import PenstockError, RequestError, TransientError

TIMEOUT = httpx.Timeout(60.0, connect=5.0)
"""An upload's answer comes when 200 MB are on disk and checked, some seconds after the last byte."""
PIECE_BYTES = 256 * 1024


class Refused(RequestError):
    """The server's answer was an error of the client."""


class Unreachable(TransientError):
    """The server did not answer, or could not."""


class BatchClient:
    """``with BatchClient(url, key) as client``; methods raise :class:`Refused` or :class:`Unreachable`."""

    def __init__(self, base_url: str, api_key: str) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        url = base_url.rstrip("/").removesuffix("/v1") + "/v1"
        self._http = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()

    def upload(self, path: Path) -> dict[str, Any]:
        """Upload an input file; it is read as it is sent."""
        with path.open("rb") as file:
            return self._call("POST", "/files", data={"purpose": "batch"}, files={"file": (path.name, file)})

    def create(self, file_id: str, endpoint: str, window: str, metadata: dict[str, str]) -> dict[str, Any]:
        """Create a batch."""
        asked = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": window, "metadata": metadata}
        return self._call("POST", "/batches", json=asked)

    def batch(self, batch_id: str) -> dict[str, Any]:
        """One batch."""
        return self._call("GET", f"/batches/{batch_id}")

    def batches(self, limit: int) -> list[dict[str, Any]]:
        """The newest batches."""
        found: list[dict[str, Any]] = self._call("GET", "/batches", params={"limit": limit})["data"]
        return found

    def cancel(self, batch_id: str) -> dict[str, Any]:
        """Cancel a batch."""
        return self._call("POST", f"/batches/{batch_id}/cancel")

    def content(self, file_id: str) -> Iterator[bytes]:
        """A file's bytes, piece by piece."""
        try:
            with self._http.stream("GET", f"/files/{file_id}/content") as response:
                if response.is_error:
                    response.read()
                    raise _error(response)
                yield from response.iter_bytes(PIECE_BYTES)
        except httpx.TransportError as error:
            raise Unreachable(f"{self._http.base_url}: {error}") from error

    def _call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.TransportError as error:
            raise Unreachable(f"{self._http.base_url}: {error}") from error
        if response.is_error:
            raise _error(response)
        answer: dict[str, Any] = response.json()
        return answer


def _error(response: httpx.Response) -> PenstockError:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    kind = Unreachable if response.is_server_error else Refused
    return kind(f"{response.status_code}: {message}")
