"""Maps boto3's errors to ours, in sentences without secrets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from stable_diffusion_server.errors import KeyBusy, NotFound, ServerError, StorageUnavailable

_CREDENTIAL_CODES = frozenset(
    "InvalidAccessKeyId SignatureDoesNotMatch InvalidToken ExpiredToken AuthFailure Unauthorized 401 "
    "TokenRefreshRequired AuthorizationHeaderMalformed InvalidSecurity".split()
)
_THROTTLE_CODES = frozenset(
    "SlowDown Throttling ThrottlingException RequestLimitExceeded TooManyRequests 429 503".split()
)
_CONFLICT_CODES = frozenset("PreconditionFailed 412 ConditionalRequestConflict OperationAborted 409".split())
_UNSUPPORTED_CODES = frozenset("NotImplemented 501".split())
# 4xx error codes that concern the whole store, not one key.
_STORE_WIDE_CODES = frozenset(
    "AllAccessDisabled AccountProblem InvalidBucketName NoSuchUpload RequestTimeout 404 405 407 408".split()
)
_NO_ACLS = "AccessControlListNotSupported"
FORBIDDEN = frozenset("AccessDenied Forbidden 403".split())
# What an operation that sends objects is, in sentences.
WRITE = "write to it"


class ConditionFailed(KeyBusy):
    """Another writer was first, or is writing now."""


class RangeNotSatisfiable(StorageUnavailable):
    """A range that starts after the object's last byte."""


class NotSupported(StorageUnavailable):
    """The store does not implement the request, for example a condition."""


class Refused(StorageUnavailable):
    """A rejection of this key or of every request; `classify_refusal` finds out which."""

    def __init__(self, detail: str, code: str) -> None:
        super().__init__(detail)
        self.code = code


def _error_for_code(code: str, status: int, what: str, name: str, *, named: bool, acl: str) -> ServerError:
    """Return our error for an S3 error code; for the arguments see `translate_s3_errors`."""
    if code in _CONFLICT_CODES:
        return ConditionFailed("The storage is busy with other writers of this name.", retry_after=5)
    if code in ("InvalidRange", "416"):
        return RangeNotSatisfiable("The object is shorter.")
    if code == _NO_ACLS:
        return StorageUnavailable(f"The bucket takes no ACLs: leave BUCKET_ACL empty ({code}).")
    if code == "NoSuchBucket":
        return StorageUnavailable(f"There is no bucket {name!r} at the storage (BUCKET_NAME).")
    if named and code in ("NoSuchKey", "404"):
        return NotFound("There is no picture under this name.")
    if code in _CREDENTIAL_CODES:
        return StorageUnavailable(f"The storage does not accept the credentials ({code}).")
    if code == "RequestTimeTooSkewed":
        return StorageUnavailable(f"This machine's clock is too far from the storage's to sign for it ({code}).")
    if code in _THROTTLE_CODES:
        return StorageUnavailable(f"The storage asks to slow down ({code}).", retry_after=5)
    # Stores without ACLs answer these to each object that is sent with one.
    hint = f" BUCKET_ACL={acl} may be the reason: try it empty." if acl and what == WRITE else ""
    if code in _UNSUPPORTED_CODES:
        return NotSupported(f"The storage does not know what it was asked ({code}).{hint}")
    if code in FORBIDDEN:
        return Refused(f"The storage does not let these credentials {what}: bucket {name!r} ({code}).{hint}", code)
    if HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR and code not in _STORE_WIDE_CODES:
        return Refused(f"The storage refuses this ({code}).", code)
    return StorageUnavailable(f"The storage answered with an error ({code}).")


def _connection_error(kind: str) -> StorageUnavailable:
    if kind in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"):
        names = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return StorageUnavailable(f"There are no credentials for the storage; {names} are one way ({kind}).")
    if kind == "ParamValidationError":
        return Refused(f"The storage's client refuses this ({kind}).", kind)
    if kind == "ResponseParserError":
        return malformed_response(kind)
    return StorageUnavailable(f"The storage does not answer ({kind}).")


def malformed_response(why: str) -> StorageUnavailable:
    """Return the error for an invalid response: a proxy's page, missing headers, a truncated body."""
    return StorageUnavailable(f"The storage's answer cannot be understood ({why}).")


@contextmanager
def translate_s3_errors(what: str, name: str, *, named: bool = False, acl: str = "") -> Iterator[None]:
    """Raise boto3's errors as ours. `what` completes "do not let these credentials …"; `name` is the bucket.

    `named`: a 404 means that the object is missing. `acl` is BUCKET_ACL, for hints. Any other exception comes from
    parsing a response or boto3's configuration, and becomes `StorageUnavailable` too.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ServerError:
        raise
    except ClientError as error:
        response: dict[str, Any] = getattr(error, "response", None) or {}
        status = (response.get("ResponseMetadata") or {}).get("HTTPStatusCode") or 0
        raise _error_for_code(
            str((response.get("Error") or {}).get("Code") or status), int(status), what, name, named=named, acl=acl
        ) from error
    except BotoCoreError as error:
        raise _connection_error(type(error).__name__) from error
    except OSError as error:
        raise StorageUnavailable(f"The storage does not answer ({type(error).__name__}).") from error
    except Exception as error:
        raise malformed_response(type(error).__name__) from error
