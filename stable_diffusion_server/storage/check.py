"""Self-test of a bucket: writes, reads, lists and deletes a probe object."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from stable_diffusion_server.errors import ServerError, StorageUnavailable
from stable_diffusion_server.storage.base import Bucket


def check_bucket(bucket: Bucket, key: str, get: Callable[[str], bytes]) -> Iterator[tuple[str, str | None]]:
    """Try everything the server does with a bucket: pairs of what was tried and what is wrong with it, or `None`.

    `key` is to be one that no one uses, and is removed in the end; `get` fetches an address.
    """
    data, record = b"check-storage", {"made": "by check-storage"}

    def kept(condition: bool, otherwise: str) -> None:
        if not condition:
            raise StorageUnavailable(otherwise)

    def fetch() -> None:
        url = bucket.url(key)
        kept(url is None or get(url) == data, f"{(url or '').partition('?')[0]} gives something else.")

    def remove() -> None:
        bucket.delete(key)
        kept(bucket.stat(key) is None, "It is still there.")

    def put(expected: bool, otherwise: str) -> None:
        kept(bucket.create(key, data, "text/plain", record)[1] is expected, otherwise)

    def look() -> None:
        stored = bucket.stat(key)
        kept(stored is not None and dict(stored.record) == record, "It is not there with its record.")

    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("open", bucket.open),
        ("put", lambda: put(True, "Something is there already.")),
        ("stat", look),
        ("conditional put", lambda: put(False, "The second put of a name was not refused.")),
        ("read", lambda: kept(bucket.read(key, 6) == data[6:], "Other bytes came back.")),
        ("address", fetch),
        ("delete", remove),
    )
    for name, step in steps:
        try:
            step()
        except ServerError as error:
            yield name, error.detail
        else:
            yield name, None
