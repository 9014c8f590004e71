"""Tells a store's refusal of one name from a refusal of everything, by trying another name. Knows no store."""

from __future__ import annotations

from collections.abc import Callable

from stable_diffusion_server.errors import InvalidInput, KeyBusy, NotFound, ServerError, StorageUnavailable


def classify_refusal(detail: str, code: object, try_own_key: Callable[[], object]) -> ServerError:
    """The error for a refusal: `InvalidInput` if the same is done for another name, else `StorageUnavailable`.

    `detail` is the sentence of the refusal, `code` the store's word or number for it. `try_own_key` does the same under
    a name of the server's own, and raises as the store does.
    """
    if not is_store_available(try_own_key):
        return StorageUnavailable(detail)
    return InvalidInput(f"save_path makes a name that the storage refuses ({code}).", field="save_path")


def is_store_available(call: Callable[[], object]) -> bool:
    """Whether the store does what a call asks, or says that the object is absent or was written by someone else."""
    try:
        call()
    except (NotFound, KeyBusy):
        return True
    except StorageUnavailable:
        return False
    return True
