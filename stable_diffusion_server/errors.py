"""The error hierarchy: each class has an HTTP status, a problem type, and whether a retry can succeed."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import ClassVar

# Every integer below is a float without rounding.
_EXACT = 2**53


class ServerError(Exception):
    """Base class of the errors that callers see; the details of all other exceptions are hidden from them.

    Attributes:
        status: HTTP status code.
        kind: Last part of the problem type URN; clients and stored jobs compare it, so it never changes.
        title: Short description of the class, for people.
        retryable: Whether the same request can succeed later.
        detail: One sentence about this failure, for people.
        field: Name of the invalid parameter, if there is one.
        faults: Pairs of field and sentence, one for each invalid parameter.
        retry_after: Seconds to wait before a retry, if known.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "internal-error"
    title: ClassVar[str] = "Internal error"
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
    """The body cannot be parsed: broken JSON, broken multipart, or a parameter sent twice."""

    status = 400
    kind = "malformed"
    title = "The request could not be parsed"


class InvalidInput(ServerError):
    """A parameter is missing, unknown, of the wrong type or out of range."""

    status = 422
    kind = "invalid-input"
    title = "A parameter was refused"

    @classmethod
    def from_faults(cls, faults: Sequence[tuple[str, str]]) -> InvalidInput:
        """The error for one or more (field, sentence) pairs: `detail` has all sentences, `field` is the first field."""
        detail = " ".join(dict.fromkeys(sentence for _, sentence in faults))
        return cls(detail, field=faults[0][0], faults=faults)


class TooLarge(ServerError):
    """A body, or an image in it or at a URL, has more bytes than the settings allow."""

    status = 413
    kind = "too-large"
    title = "The request is too large"


class HeadersTooLarge(ServerError):
    """The URL and headers of a request, or one header, are longer than the server reads."""

    status = 431
    kind = "headers-too-large"
    title = "The URL or the headers are too large"


class UnsupportedMedia(ServerError):
    """The media type of the body, or of an image in it, is not supported."""

    status = 415
    kind = "unsupported-media-type"
    title = "The media type is not supported"


class Unauthorized(ServerError):
    """An API key is required, and it is missing or wrong."""

    status = 401
    kind = "unauthorized"
    title = "A valid API key is required"


class Forbidden(ServerError):
    """The client, its API key or the web page that sends the request has no permission."""

    status = 403
    kind = "forbidden"
    title = "Not allowed"


class NotFound(ServerError):
    """No object, job or route has this name."""

    status = 404
    kind = "not-found"
    title = "Not found"


class ModelNotFound(NotFound):
    """No model has this name. Raised at the OpenAI endpoints; elsewhere a wrong model is `InvalidInput`."""

    kind = "model-not-found"
    title = "There is no such model"


class UnknownHost(ServerError):
    """The Host header is not in ALLOWED_HOSTS: a DNS rebinding attack, or a missing setting."""

    status = 421
    kind = "misdirected"
    title = "The host name is not served here"


class QueueFull(ServerError):
    """The queue, or the caller's share of it, is full."""

    status = 429
    kind = "busy"
    title = "The queue is full"
    retryable = True


class RateLimited(ServerError):
    """The caller sends more requests, or more at a time, than its API key allows."""

    status = 429
    kind = "rate-limited"
    title = "Too many requests"
    retryable = True


class RequestTimedOut(ServerError):
    """The body of the request arrived too slowly."""

    status = 408
    kind = "request-timed-out"
    title = "The request took too long to arrive"


class NotReady(ServerError):
    """The models are loading or unusable, or the server is shutting down."""

    status = 503
    kind = "not-ready"
    title = "The server is not ready"
    retryable = True


class ModelChanged(NotReady):
    """The files of a model were replaced after the request was accepted, which named the former ones."""

    kind = "model-changed"
    title = "The model's files have changed"


class JobStoreUnavailable(ServerError):
    """A job could not be stored, so it is not accepted: the job store is full or not writable."""

    status = 503
    kind = "journal-unavailable"
    title = "The job could not be stored"
    retryable = True


class RequestInProgress(ServerError):
    """A request with this idempotency key or job id is still running."""

    status = 409
    kind = "in-flight"
    title = "This request is still running"
    retryable = True


class IdempotencyKeyReused(ServerError):
    """The idempotency key was used for a different request before."""

    status = 422
    kind = "idempotency-key-reused"
    title = "The idempotency key belongs to another request"


class ModelStays(ServerError):
    """A model cannot be unloaded: none is loaded on demand here, or what was made of it cannot be freed."""

    status = 409
    kind = "model-stays"
    title = "The model stays loaded"


class RequestCancelled(ServerError):
    """The job was cancelled by its id while a caller waited for its result."""

    status = 409
    kind = "cancelled"
    title = "The job was cancelled"


class PoisonJob(ServerError):
    """The process crashed several times while it ran this job (a "poison message"); the job is not retried."""

    kind = "poison-job"
    title = "The job crashes the server"


class RemoteFetchFailed(ServerError):
    """The host of an image URL did not deliver the image: an error, a timeout or a slow response."""

    status = 502
    kind = "remote-failed"
    title = "The remote image could not be fetched"
    retryable = True


class StorageUnavailable(ServerError):
    """The bucket failed to store or to return an object."""

    status = 503
    kind = "storage-unavailable"
    title = "The storage is unavailable"
    retryable = True


class KeyBusy(StorageUnavailable):
    """The bucket rejected a write because of concurrent writes to the same key; other keys are unaffected."""


class StorageRefused(ServerError):
    """The bucket works, but rejects this object, and would again; the caller is not the cause."""

    status = 502
    kind = "storage-refused"
    title = "The storage refused this image"


class DeadlineExceeded(ServerError):
    """The request's `timeout` passed before the image was stored."""

    status = 504
    kind = "deadline-exceeded"
    title = "The image was not ready in time"
    retryable = True


class NotFinite(ServerError):
    """The latents contain NaN or infinity, so there is no image to decode."""

    kind = "not-finite"
    title = "The model produced NaN or infinity"
    retryable = True


class OutOfMemory(ServerError):
    """The device has too little free memory for this request."""

    status = 503
    kind = "out-of-memory"
    title = "The device ran out of memory"
    retryable = True


class DeviceLost(ServerError):
    """The device context is unusable until the process restarts, for example after a device-side assert."""

    status = 503
    kind = "device-lost"
    title = "The device is lost until the server restarts"
    retryable = True


class ModelLoadError(ServerError):
    """Model files are missing, truncated or of another model class; reported at load in `/readyz` and the log."""

    status = 503
    kind = "weights-unusable"
    title = "The model files are unusable"


class ModelTooLarge(ModelLoadError):
    """A model needs more memory than the device has free, or another kind of device."""


def number_text(value: float) -> str:
    """A number as people write it in a sentence: `4294967295` and not `4.29497e+09`, `20` and not `20.0`."""
    if isinstance(value, int):
        return str(value)
    if value.is_integer() and abs(value) < _EXACT:
        return str(int(value))
    return f"{Decimal(repr(value)):f}"


def error_of_kind(kind: str) -> type[ServerError]:
    """The error class with this `kind`, or `ServerError` if there is none."""
    classes = [ServerError]
    for cls in classes:
        classes += cls.__subclasses__()
    return next((cls for cls in classes if cls.kind == kind), ServerError)
