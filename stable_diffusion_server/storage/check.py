"""Self-test of a bucket: writes, reads, lists and deletes a probe object."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from stable_diffusion_server.errors import ServerError, StorageUnavailable
from stable_diffusion_server.storage.base import Bucket


def check_bucket(bucket: Bucket, key: str, get: Callable[[str], bytes]) -> Iterator[tuple[str, str | None]]:
    """Run every bucket operation; yield the name of each check and its error, or `None` if it passed.

    `key` must be unused; the last check deletes the object. `get` fetches a URL.
    """
    data, record = b"check-storage", {"made": "by check-storage"}

    def require(condition: bool, otherwise: str) -> None:
        if not condition:
            raise StorageUnavailable(otherwise)

    def fetch() -> None:
        url = bucket.url(key)
        require(url is None or get(url) == data, f"{(url or '').partition('?')[0]} gives something else.")

    def delete() -> None:
        bucket.delete(key)
        require(bucket.stat(key) is None, "It is still there.")

    def put(expected: bool, otherwise: str) -> None:
        require(bucket.create(key, data, "text/plain", record)[1] is expected, otherwise)

    def stat() -> None:
        stored = bucket.stat(key)
        require(stored is not None and dict(stored.record) == record, "It is not there with its record.")

    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("open", bucket.open),
        ("put", lambda: put(True, "Something is there already.")),
        ("stat", stat),
        ("conditional put", lambda: put(False, "The second put of a name was not refused.")),
        ("read", lambda: require(bucket.read(key, 6) == data[6:], "Other bytes came back.")),
        ("address", fetch),
        ("delete", delete),
    )
    for name, step in steps:
        try:
            step()
        except ServerError as error:
            yield name, error.detail
        else:
            yield name, None
