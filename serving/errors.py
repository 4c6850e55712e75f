"""How the edge says that something went wrong: refusals of its own, and one conversion to what travels and
renders.

The edge's refusals join the tree of :mod:`penstock.queue.errors` under ``RequestError``::

    RequestError
    ├── InvalidField       one field of the request has a wrong value (400)
    ├── Unauthorized       no key, an unknown or a revoked one (401)
    ├── NotFound           a path or object that is not offered (404)
    ├── BodyTimeout        the request's body did not arrive in time (408)
    ├── IdempotencyKeyReused  the key came with another request before (422)
    └── UnsafeBinding      reachable from other machines while no API key exists (the ingress does not start)
"""

from __future__ import annotations

from http import HTTPStatus

from penstock.queue.errors import PenstockError, RequestError, TransientError
from penstock.queue.messages import StreamError

INTERNAL = PenstockError("The server failed on this request. Quote the x-request-id of this response.")


class InvalidField(RequestError):
    """One field of the request has a wrong value; ``param`` names it as OpenAI's error shape does."""

    code = "invalid_value"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Unauthorized(RequestError):
    """No API key, or none that is known."""

    code = "invalid_api_key"
    status = 401


class NotFound(RequestError):
    """The path or object is not offered here."""

    code = "not_found"
    status = 404


class BodyTimeout(RequestError):
    """The client stopped sending in the middle of its body."""

    code = "request_timeout"
    status = 408


class IdempotencyKeyReused(RequestError):
    """The Idempotency-Key belongs to another request of this tenant."""

    code = "idempotency_key_reused"
    status = 422


class UnsafeBinding(RequestError):
    """The ingress would be open to the network."""

    code = "unsafe_binding"


def stream_error(error: PenstockError) -> StreamError:
    """The error as it travels in a frame and as the edge renders it."""
    message = str(error) or (type(error).__doc__ or "").partition("\n")[0]
    return StreamError(error.code, message, error.status, isinstance(error, TransientError))


def to_vllm_error(error: PenstockError | StreamError) -> Exception:
    """The exception that makes vLLM's handlers answer with this error's status and message.

    Raised inside ``EngineClient`` methods: an unstarted response gets the status, a started stream ends
    with ``data: {"error": ...}`` and ``data: [DONE]``. vLLM can only put the numeric status into ``code``;
    the edge writes our own code instead where :meth:`penstock.serving.context.Outcome.fail` was called as
    well.
    """
    from vllm.exceptions import GracefulHTTPError  # heavy, and only an ingress has it loaded

    wire = error if isinstance(error, StreamError) else stream_error(error)
    converted: Exception = GracefulHTTPError(wire.message, HTTPStatus(wire.status))
    return converted
