"""moto's S3 server with atomic conditional writes: moto checks `If-None-Match` and stores in two steps; S3 in one."""

from __future__ import annotations

import threading
from typing import Any

from moto.s3.responses import S3Response
from moto.server import main

_lock = threading.Lock()
_put_object = S3Response.put_object


def _put_atomically(response: S3Response) -> Any:
    with _lock:
        return _put_object(response)


if __name__ == "__main__":
    S3Response.put_object = _put_atomically
    main()
