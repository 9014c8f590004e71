"""Finds out whether a bucket rejects one key or every request, by repeating the request with the server's own key."""

from __future__ import annotations

from collections.abc import Callable

from stable_diffusion_server.errors import InvalidInput, KeyBusy, NotFound, ServerError, StorageUnavailable


def classify_refusal(detail: str, code: object, try_own_key: Callable[[], object]) -> ServerError:
    """Return `InvalidInput` if the same request works for another key, otherwise `StorageUnavailable`.

    `detail` describes the rejection, `code` is the store's error code. `try_own_key` repeats the request with the
    server's own key and raises the store's errors.
    """
    if not is_store_available(try_own_key):
        return StorageUnavailable(detail)
    return InvalidInput(f"save_path makes a name that the storage refuses ({code}).", field="save_path")


def is_store_available(call: Callable[[], object]) -> bool:
    """Return whether the call succeeds, or fails only because the object is absent or another call writes it."""
    try:
        call()
    except (NotFound, KeyBusy):
        return True
    except StorageUnavailable:
        return False
    return True
