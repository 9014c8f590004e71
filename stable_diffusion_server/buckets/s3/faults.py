"""What boto3's errors mean, in sentences of ours that hold no key and no secret. Asks nothing of any store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from stable_diffusion_server.errors import NotFound, ServerError, StorageUnavailable

_WRONG_KEYS = frozenset(
    "InvalidAccessKeyId SignatureDoesNotMatch InvalidToken ExpiredToken AuthFailure Unauthorized 401 "
    "TokenRefreshRequired AuthorizationHeaderMalformed InvalidSecurity".split()
)
_SLOW = frozenset("SlowDown Throttling ThrottlingException RequestLimitExceeded TooManyRequests 429 503".split())
LOST = frozenset("PreconditionFailed 412 ConditionalRequestConflict OperationAborted 409".split())


class ConditionFailed(StorageUnavailable):
    """Someone else was there first, or is there right now."""


class BeyondTheEnd(StorageUnavailable):
    """A range that begins after the object's last byte."""


def _ours(code: str, what: str, name: str) -> ServerError:
    """The error of ours for one of S3's codes; `what` was being tried, `name` is the bucket's."""
    if code in LOST:
        return ConditionFailed("The storage is busy with other writers of this name.", retry_after=5)
    if code in ("InvalidRange", "416"):
        return BeyondTheEnd("The object is shorter.")
    if code == "NoSuchBucket":
        return StorageUnavailable(f"There is no bucket {name!r} at the storage (BUCKET_NAME).")
    if code in ("NoSuchKey", "404"):
        return NotFound("There is no picture under this name.")
    if code in _WRONG_KEYS:
        return StorageUnavailable(f"The storage does not accept the credentials ({code}).")
    if code == "RequestTimeTooSkewed":
        return StorageUnavailable(f"This machine's clock is too far from the storage's to sign for it ({code}).")
    if code in ("AccessDenied", "403", "AllAccessDisabled"):
        return StorageUnavailable(f"The storage does not let these credentials {what}: bucket {name!r} ({code}).")
    if code in _SLOW:
        return StorageUnavailable(f"The storage asks to slow down ({code}).", retry_after=5)
    return StorageUnavailable(f"The storage answered with an error ({code}).")


def _unreached(kind: str) -> StorageUnavailable:
    if kind in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"):
        names = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return StorageUnavailable(f"There are no credentials for the storage; {names} are one way ({kind}).")
    return StorageUnavailable(f"The storage does not answer ({kind}).")


@contextmanager
def told(what: str, name: str) -> Iterator[None]:
    """Turn boto3's errors into ours. `what` is being tried with the bucket called `name`."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        raise _ours(code_of(error), what, name) from error
    except BotoCoreError as error:
        raise _unreached(type(error).__name__) from error


def code_of(error: Exception) -> str:
    """The error's code, or the status where the answer had no body to name one; empty for what is no answer."""
    response = getattr(error, "response", {})
    code = str(response.get("Error", {}).get("Code", ""))
    status = str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    return code or status
