"""What can go wrong, as one hierarchy: each error knows its status and problem type, and nothing of HTTP's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class ServerError(Exception):
    """A failure the caller is told about.

    `detail` is one sentence for a person. `field` names the offending parameter, where there is one; `faults` are
    pairs of (field, sentence) where there may be several. `retry_after` is in seconds. Raise a subclass; anything
    outside this tree stays opaque to callers.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "internal-error"
    title: ClassVar[str] = "Something went wrong here"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        detail: str,
        *,
        field: str | None = None,
        faults: Sequence[tuple[str, str]] = (),
        retry_after: int | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.field = field
        self.faults = tuple(faults) or (((field, detail),) if field else ())
        self.retry_after = retry_after


class MalformedRequest(ServerError):
    """The body could not be read at all: broken JSON, a broken multipart, a parameter given twice."""

    status = 400
    kind = "malformed"
    title = "The request could not be read"


class InvalidInput(ServerError):
    """A parameter was read and refused: missing, unknown, of the wrong type, out of its bounds."""

    status = 422
    kind = "invalid-input"
    title = "A parameter was refused"

    @classmethod
    def from_faults(cls, faults: Sequence[tuple[str, str]]) -> InvalidInput:
        """The error for one or more faults; the first of them gives its sentence and its field."""
        field, detail = faults[0]
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        return cls(detail + more, field=field, faults=faults)


class TooLarge(ServerError):
    """A body, or a picture in it or behind a URL, has more bytes than the settings allow."""

    status = 413
    kind = "too-large"
    title = "This is too large"


class HeadersTooLarge(ServerError):
    """The address and the headers of a request, or one header, are longer than is looked into."""

    status = 431
    kind = "headers-too-large"
    title = "The head of the request is too large"


class UnsupportedMedia(ServerError):
    """The body, or a picture in it, is of a type that is not taken here."""

    status = 415
    kind = "unsupported-media-type"
    title = "This type is not taken"


class Unauthorized(ServerError):
    """A key is asked for, and none or a wrong one was given."""

    status = 401
    kind = "unauthorized"
    title = "A valid API key is needed"


class Forbidden(ServerError):
    """A client, or a web page, that may not draw here."""

    status = 403
    kind = "forbidden"
    title = "Not allowed from here"


class NotFound(ServerError):
    """No object of that name."""

    status = 404
    kind = "not-found"
    title = "There is nothing under this name"


class UnknownHost(ServerError):
    """The Host header names a server this one is not (a rebinding attack, or a missing setting)."""

    status = 421
    kind = "misdirected"
    title = "This host name is not served here"


class QueueFull(ServerError):
    """The queue is full; the caller may come back after `retry_after` seconds."""

    status = 429
    kind = "busy"
    title = "The queue is full"
    retryable = True


class RateLimited(ServerError):
    """The caller asks more often, or for more at a time, than its key allows."""

    status = 429
    kind = "rate-limited"
    title = "Too many requests"
    retryable = True


class RequestTimedOut(ServerError):
    """The body of a request did not arrive in time."""

    status = 408
    kind = "request-timed-out"
    title = "The request took too long to arrive"


class NotReady(ServerError):
    """The models are still loading, or could not be loaded, or the server is going down."""

    status = 503
    kind = "not-ready"
    title = "Not able to draw yet"
    retryable = True


class JobStoreUnavailable(ServerError):
    """A job could not be written down, so it is not accepted: the disk is full, or the journal cannot be used."""

    status = 503
    kind = "journal-unavailable"
    title = "The job could not be written down"
    retryable = True


class RequestInProgress(ServerError):
    """A request with this idempotency key, or this job id, is being answered already."""

    status = 409
    kind = "in-flight"
    title = "This is being answered already"
    retryable = True


class IdempotencyKeyReused(ServerError):
    """The idempotency key came with another request before."""

    status = 422
    kind = "idempotency-key-reused"
    title = "This idempotency key belongs to another request"


class RequestCancelled(ServerError):
    """The job was cancelled by its id while someone waited for its answer."""

    status = 409
    kind = "cancelled"
    title = "The job was cancelled"


class PoisonJob(ServerError):
    """The server has died too often while this job was drawn; it is not tried again."""

    kind = "poison-job"
    title = "The server does not survive this job"


class RemoteFetchFailed(ServerError):
    """The server a picture was to be fetched from did not give it: an error, silence, or too slow."""

    status = 502
    kind = "remote-failed"
    title = "The remote picture could not be fetched"
    retryable = True


class StorageUnavailable(ServerError):
    """The bucket did not take or give an object."""

    status = 503
    kind = "storage-unavailable"
    title = "The storage is not available"
    retryable = True


class KeyBusy(StorageUnavailable):
    """The bucket did not take an object because others write its name right now; other names are not concerned."""


class StorageRefused(ServerError):
    """The bucket takes objects, but not this one, for a reason that is not the caller's: it would refuse it again."""

    status = 502
    kind = "storage-refused"
    title = "The storage refused this picture"


class DeadlineExceeded(ServerError):
    """The caller's `timeout` passed before the picture was stored."""

    status = 504
    kind = "deadline-exceeded"
    title = "The picture was not ready in time"
    retryable = True


class NotFinite(ServerError):
    """The latents hold NaN or infinity, so there is no picture to decode."""

    kind = "not-finite"
    title = "The model produced numbers that are not finite"
    retryable = True


class OutOfMemory(ServerError):
    """The device had no memory left for this job."""

    status = 503
    kind = "out-of-memory"
    title = "The device ran out of memory"
    retryable = True


class DeviceLost(ServerError):
    """The device context is unusable until the process is replaced (a device-side assert)."""

    status = 503
    kind = "device-lost"
    title = "The device has to be restarted"
    retryable = True


class ModelLoadError(ServerError):
    """Model files are missing, truncated or of another class. Told once, at load, in `/readyz` and the log."""

    status = 503
    kind = "weights-unusable"
    title = "The model files cannot be used"


class ModelTooLarge(ModelLoadError):
    """A model needs more memory than the device has free, or a device of another kind."""


def error_of_kind(kind: str) -> type[ServerError]:
    """The class of that kind; `ServerError` itself for one that is not known here."""
    found = [ServerError]
    for cause in found:
        found += cause.__subclasses__()
    return next((cause for cause in found if cause.kind == kind), ServerError)
