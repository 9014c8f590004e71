"""What the errors of Google's client mean, in sentences of ours that hold no key. Asks nothing of any store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

from stable_diffusion_server.errors import KeyBusy, NotFound, ServerError, StorageUnavailable

# Statuses of 4xx that are of the whole store, whatever the name.
_STORE_WIDE_STATUSES = frozenset((401, 404, 405, 407, 408, 429))
FORBIDDEN = 403


class ConditionFailed(KeyBusy):
    """Someone else was there first."""


class Refused(StorageUnavailable):
    """A refusal that may be of this one name or of everything: the bucket finds out which by trying another name."""

    def __init__(self, detail: str, code: int) -> None:
        super().__init__(detail)
        self.code = code


def malformed_response(why: str) -> StorageUnavailable:
    """The error for an answer that is none of Google's: a proxy's page, facts that are missing, a body cut short."""
    return StorageUnavailable(f"The storage's answer cannot be understood ({why}).")


@contextmanager
def translate_gcs_errors(what: str, name: str, *, bucket_asked: bool = False, beyond: bool = False) -> Iterator[None]:
    """Turn Google's errors into ours, in sentences that hold no key.

    `what` is being tried with the bucket called `name`. `bucket_asked`: what is not found is the bucket.
    `beyond`: a range after the object's end is no error. Whatever else is raised in there is raised by reading an
    answer or a file of credentials, and is of the store too.
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
    except TransportError as error:  # where keys are made into tokens
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
    """The error of ours for one of HTTP's statuses, 0 for no answer."""
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
