"""A GCS emulator as a separate process, with the feature it lacks: `python gcs_emulator.py PORT WIRE_LOG`.

The emulator ignores `ifGenerationMatch`. Here uploads pass through a check that answers 412 as Google does, and each
upload's condition is written to WIRE_LOG, one JSON line each. It is our own test code: it shows what our client sends
and how it handles a 412, and nothing about Google's own atomicity. The emulator serves one request at a time.
"""

from __future__ import annotations

import json
import sys
from http import HTTPStatus
from http.server import HTTPServer
from typing import Any

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

_insert = objects.insert


def insert(request: Any, response: Any, storage: Any, *more: Any, **named: Any) -> Any:
    """The emulator's upload, if the condition in the query holds."""
    body = request.data if isinstance(request.data, dict) else {}
    name = request.query["name"][0] if "name" in request.query else (body.get("meta") or body).get("name")
    wanted = request.query.get("ifGenerationMatch", [None])[0]
    with open(sys.argv[2], "a") as wire:
        wire.write(json.dumps({"name": name, "ifGenerationMatch": wanted}) + "\n")
    if wanted is not None and "upload_id" not in request.query:
        try:
            there = str(storage.get_file_obj(request.params["bucket_name"], name)["generation"])
        except NotFound:
            there = "0"
        if there != wanted:
            response.status = HTTPStatus.PRECONDITION_FAILED
            response.json({"error": {"code": 412, "message": "conditionNotMet"}})
            return None
    return _insert(request, response, storage, *more, **named)


if __name__ == "__main__":
    objects.insert = insert  # before the server's module is imported, which binds the handler at import
    from gcp_storage_emulator.server import create_server

    HTTPServer.request_queue_size = 128  # five is too few for concurrent writers
    create_server("127.0.0.1", int(sys.argv[1]), in_memory=True).run()
