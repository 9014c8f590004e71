"""Maps the errors of Google's client to ours, in sentences without secrets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

from stable_diffusion_server.errors import KeyBusy, NotFound, ServerError, StorageUnavailable

# 4xx statuses that concern the whole store, not one key.
_STORE_WIDE_STATUSES = frozenset((401, 404, 405, 407, 408, 429))
FORBIDDEN = 403


class ConditionFailed(KeyBusy):
    """Another writer was first."""


class Refused(StorageUnavailable):
    """A rejection of this key or of every request; `classify_refusal` finds out which."""

    def __init__(self, detail: str, code: int) -> None:
        super().__init__(detail)
        self.code = code


def malformed_response(why: str) -> StorageUnavailable:
    """Return the error for an invalid response: a proxy's page, missing fields, a truncated body."""
    return StorageUnavailable(f"The storage's answer cannot be understood ({why}).")


@contextmanager
def translate_gcs_errors(what: str, name: str, *, bucket_asked: bool = False, beyond: bool = False) -> Iterator[None]:
    """Raise Google's errors as ours. `what` completes "do not let these credentials …"; `name` is the bucket.

    `bucket_asked`: a 404 means that the bucket is missing. `beyond`: a range after the object's end is no error. Any
    other exception comes from parsing a response or a credentials file, and becomes `StorageUnavailable` too.
    """
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
    from requests.exceptions import JSONDecodeError, RequestException

    try:
        yield
    except ServerError:
        raise
    except DefaultCredentialsError as error:
        raise StorageUnavailable(
            "There are no usable credentials for the storage (GOOGLE_APPLICATION_CREDENTIALS)."
        ) from error
    except TransportError as error:  # the token endpoint
        raise _error_for_status(0, what, name, bucket_asked=bucket_asked, kind=type(error).__name__) from error
    except GoogleAuthError as error:
        raise StorageUnavailable(f"The storage does not accept the credentials ({type(error).__name__}).") from error
    except JSONDecodeError as error:
        raise malformed_response(type(error).__name__) from error
    except (GoogleAPIError, RequestException, OSError) as error:
        code = int(getattr(error, "code", None) or 0)
        if beyond and code == 416:
            return
        raise _error_for_status(code, what, name, bucket_asked=bucket_asked, kind=type(error).__name__) from error
    except Exception as error:
        raise malformed_response(type(error).__name__) from error


def _error_for_status(code: int, what: str, name: str, *, bucket_asked: bool, kind: str) -> ServerError:
    """Return our error for an HTTP status; 0 means no response."""
    if code == 404 and bucket_asked:
        return StorageUnavailable(f"There is no bucket {name!r} at the storage (BUCKET_NAME).")
    if code == 404:
        return NotFound("There is no picture under this name.")
    if code == 401:
        return StorageUnavailable("The storage does not accept the credentials (401).")
    if code == FORBIDDEN:
        return Refused(f"The storage does not let these credentials {what}: bucket {name!r} (403).", code)
    if code in (429, 503):
        return StorageUnavailable(f"The storage asks to slow down ({code}).", retry_after=5)
    if HTTPStatus.BAD_REQUEST <= code < HTTPStatus.INTERNAL_SERVER_ERROR and code not in _STORE_WIDE_STATUSES:
        return Refused(f"The storage refuses this ({code}).", code)
    return StorageUnavailable(
        f"The storage answered with an error ({code})." if code else f"The storage does not answer ({kind})."
    )
