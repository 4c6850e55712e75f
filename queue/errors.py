"""The error tree of Penstock, classed by what the caller does next.

::

    PenstockError
    ├── RequestError      fix the request, then send it again (4xx, never retried by us)
    │   ├── InvalidRecord          a record that cannot be read or run
    │   ├── UnknownVersion         a record of a schema version this build does not know
    │   └── PayloadTooLarge        more bytes than the deployment accepts
    ├── TransientError    try again later, the same request is fine (503 with Retry-After)
    │   ├── QueueUnavailable       the broker did not acknowledge
    │   ├── StoreUnavailable       Redis did not answer
    │   └── NoCapacity             no replica with room
    └── PermanentError    give up: trying again cannot help
        ├── DeadlineExceeded       nobody waits for the answer any more
        ├── StreamInterrupted      the engine died and the stream cannot be continued exactly
        └── EngineFailed           the engine refused or broke on this request

The split follows kopf (errors classed by the handler's next step) rather than by the layer that raised them.
"""

from __future__ import annotations


class PenstockError(Exception):
    """Root of the tree. ``code`` is the stable machine-readable name, ``status`` the HTTP status it maps to."""

    code = "internal_error"
    status = 500


class RequestError(PenstockError):
    """The request itself is at fault; the message says what to change."""

    code = "invalid_request"
    status = 400


class InvalidRecord(RequestError):
    """A queue record that cannot be decoded or run."""

    code = "invalid_record"


class UnknownVersion(InvalidRecord):
    """A queue record whose schema version this build does not know; dead-lettered, never guessed at."""

    code = "unknown_record_version"


class PayloadTooLarge(RequestError):
    """The body or prompt is over the configured limit."""

    code = "payload_too_large"
    status = 413


class TransientError(PenstockError):
    """A dependency is away; the same request may be sent again after ``retry_after`` seconds."""

    code = "temporarily_unavailable"
    status = 503
    retry_after = 1


class QueueUnavailable(TransientError):
    """The broker did not acknowledge in time; nothing was accepted."""

    code = "queue_unavailable"


class StoreUnavailable(TransientError):
    """Redis did not answer in time."""

    code = "store_unavailable"


class NoCapacity(TransientError):
    """No replica has room, or none is alive."""

    code = "no_capacity"


class PermanentError(PenstockError):
    """The request cannot be finished and sending it again will not help."""

    code = "failed"


class DeadlineExceeded(PermanentError):
    """The request's deadline passed before it finished."""

    code = "deadline_exceeded"
    status = 504


class StreamInterrupted(PermanentError):
    """The replica died after tokens were delivered and the sampling state cannot be rebuilt from tokens alone."""

    code = "stream_interrupted"
    status = 502


class EngineFailed(PermanentError):
    """The engine refused the request or failed on it."""

    code = "engine_failed"
